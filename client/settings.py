"""Settings of a hospital: its data files, its server and its policy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, Field

from fedgex.client import policy as policies
from fedgex.client.policy import Policy, read_toml
from fedgex.common.errors import ConfigError
from fedgex.common.ingestion.settings import DataSettings
from fedgex.common.settings import NAME_PATTERN, Settings

SERVER_PATTERN = r"^[A-Za-z0-9.-]+:[0-9]{1,5}$"
"""host:port."""

PROXY_PATTERN = r"https?://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\]):\d{1,5}"


def _without_login(proxy: str) -> str:
    """Refuse what is not a proxy's address, such as one with a login.

    The field's value is not printed (`repr=False`): it may hold a password.
    """
    if not re.fullmatch(PROXY_PATTERN, proxy):
        raise ValueError(
            "expected http(s)://host:port without a login; ask for a rule at the "
            "proxy that lets this machine pass"
        )
    return proxy


class SiteSettings(Settings):
    """One hospital's `site.toml`, and the `policy.toml` in its folder."""

    name: str = Field(pattern=NAME_PATTERN)
    """Lower-case letters, digits and hyphens."""
    policy: Policy
    """What the hospital permits, from `policy.toml`; no key of site.toml."""
    state_dir: Path = Path("state")
    """Folder of keys, approvals, cached replies and logs."""
    server: str | None = Field(default=None, pattern=SERVER_PATTERN)
    """host:port of the consortium's server; a kit must name the same. None: the kit's
    is taken as it comes."""
    proxy: Annotated[str, AfterValidator(_without_login)] | None = Field(
        default=None, repr=False
    )
    """Proxy on the way to the server, as http(s)://host:port; None: none."""
    server_authority: Path | None = None
    """The hospital's own CA certificates in PEM, where its proxy opens TLS."""
    health_port: int = Field(default=0, ge=0, le=65535)
    """Loopback port of the health check; 0: none."""
    metrics_port: int = Field(default=0, ge=0, le=65535)
    """Loopback port with numbers for monitoring; 0: none."""
    data: DataSettings

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a `site.toml` and its policy; relative paths start at their folder.

        Raises
        ------
        ConfigError
            If a file cannot be read, or any key is unknown, missing or unusable.
        """
        values, problems = read_toml(path), []
        misplaced = [k for k in values if k == "policy" or k in Policy.model_fields]
        if misplaced:
            problems.append(
                f"{path.name}: {', '.join(misplaced)} cannot be set here; what the "
                f"hospital permits stands in its folder's {policies.FILE}. Move it."
            )
        policy = Policy.proposed()  # stands in, to find what else is wrong
        try:
            policy = Policy.load(path.with_name(policies.FILE))
        except ConfigError as error:
            problems.append(str(error))
        ours = {key: value for key, value in values.items() if key not in misplaced}
        try:
            settings = cls.read({**ours, "policy": policy}, path.name)
        except ConfigError as error:
            raise ConfigError("\n".join([str(error), *problems])) from error
        if problems:
            raise ConfigError("\n".join(problems))
        folder = path.resolve().parent
        data = settings.data.anchored(folder)
        return settings.model_copy(update={"data": data}).anchored(folder)
