"""Settings of a hospital: its data files, its server and its policy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import AfterValidator, Field

from fedgex.client import policy as policies
from fedgex.client.policy import Policy, read_toml
from fedgex.common.data.scales import Scale
from fedgex.common.errors import ConfigError
from fedgex.common.settings import NAME_PATTERN, Settings

SERVER_PATTERN = r"^[A-Za-z0-9.-]+:[0-9]{1,5}$"
"""host:port."""

PROXY_PATTERN = r"https?://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\]):\d{1,5}"

Anchored = TypeVar("Anchored", bound=Settings)


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


class DataColumns(Settings):
    """Names of the clinical columns in the hospital's file.

    A column that is not set is read under its own name here, if the file has it.
    """

    patient: str | None = None
    """Identifier of the patient; the one column that a clinical table must have."""
    sample: str | None = None
    """Label of the sample in the expression file, if it is not the patient's."""
    duration: str | None = None
    """Time to event or end of follow-up, in `time_unit`."""
    event: str | None = None
    """1 if the event happened at that time, 0 if follow-up ended before."""
    age: str | None = None
    """Age, years."""
    sex: str | None = None
    """female or male, or f or m, in any case."""
    cancer_type: str | None = None
    """Cancer type, spelt as in the study."""
    library_size: str | None = None
    """All reads of the sample, for raw counts."""


class DataSettings(Settings):
    """The hospital's files, and what the numbers in them mean."""

    expression: Path
    """CSV or TSV (also .gz), Parquet, or AnnData (.h5ad)."""
    clinical: Path | None = None
    """CSV or TSV (also .gz) or Parquet. Without it, `obs` of an .h5ad is read."""
    scale: Scale
    """Scale of the expression values; never guessed."""
    orientation: Literal["auto", "samples-by-genes", "genes-by-samples"] = "auto"
    """What the rows are; `auto` looks at the labels."""
    hgnc_table: Path | None = None
    """HGNC's complete set; needed to update retired symbols."""
    unknown_genes: Literal["refuse", "keep"] = "refuse"
    """What becomes of a file of whose labels fewer than half name known human genes,
    and whether labels of no known gene may leave as names of genes."""
    opt_outs: Path | None = None
    """Text file of patients to leave out, one identifier a line; # begins a comment."""
    unknown_opt_outs: Literal["warn", "refuse"] = "warn"
    """What a line of `opt_outs` that matches nobody does: warn, or refuse the data."""
    columns: DataColumns = DataColumns()
    time_unit: Literal["days", "months", "years"] = "days"
    """Unit of the duration; a month is 30.4375 days, a year 365.25."""
    max_missing_per_gene: float = Field(default=0.5, ge=0, le=1)
    """Share of missing samples above which a gene is reported."""
    max_missing_per_patient: float = Field(default=0.5, ge=0, le=1)
    """Share of missing genes above which a patient's sample is reported."""


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
        data = _anchored(
            settings.data, folder, "expression", "clinical", "hgnc_table", "opt_outs"
        )
        settings = settings.model_copy(update={"data": data})
        return _anchored(settings, folder, "state_dir", "server_authority")


def _anchored(settings: Anchored, folder: Path, *names: str) -> Anchored:
    """Return settings in which the relative paths of some keys start at a folder."""
    named = {name: getattr(settings, name) for name in names}
    paths = {name: folder / path for name, path in named.items() if path is not None}
    return settings.model_copy(update=paths)
