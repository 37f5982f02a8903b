"""`fedgex-site` for a hospital's operator: set up, join, check, pause, resume."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from fedgex.client import identity, policy
from fedgex.client.cli.options import (
    UNREACHABLE,
    Form,
    Format,
    SiteToml,
    load,
    refusing,
)
from fedgex.client.identity import AUDIT, Identity, described
from fedgex.client.service.connection import Check, Step
from fedgex.client.settings import SERVER_PATTERN, SiteSettings
from fedgex.common.errors import ConfigError
from fedgex.common.settings import NAME_PATTERN
from fedgex.common.system.files import write_atomic
from fedgex.common.trust import pki
from fedgex.common.trust.audit_log import Chain
from fedgex.common.trust.enrolment import SiteRequest

TEMPLATE = """\
# The hospital's own settings. Relative paths start at the folder of this file.
# What studies may do here stands in policy.toml, in the same folder.
name = "{name}"                       # this hospital, as the consortium calls it
server = "{server}"     # host:port of the consortium; the one place that we connect to
state_dir = "state"                  # keys, approvals, replies, audit log; back it up

# proxy = "http://proxy.hospital:3128"       # if the way out leads through a proxy
# server_authority = "hospital-ca.pem"       # if that proxy opens TLS: its authority, PEM
# health_port = 9101                         # loopback port for health checks
# metrics_port = 9102                        # loopback port for monitoring (Prometheus)

[data]                               # docs/hospital-data.md; try it with check-data
expression = "expression.tsv.gz"     # .csv, .tsv (also .gz), .parquet or .h5ad
# clinical = "clinical.csv"          # needed for classification and survival
scale = "log2p1"                     # CHANGE to what your numbers are: linear, log2p1, ...
# hgnc_table = "hgnc_complete_set.txt"  # to update retired symbols
# opt_outs = "opt-outs.txt"          # patients to leave out, one identifier a line
# time_unit = "days"                 # of the follow-up: days, months, years

# [data.columns]                     # where your clinical columns are named otherwise
# patient = "patient"
"""  # noqa: E501


def is_server(server: str) -> str:
    """Return an option's value that is HOST:PORT."""
    if not re.fullmatch(SERVER_PATTERN, server):
        raise typer.BadParameter(f'"{server}" must be HOST:PORT')
    return server


def is_name(name: str) -> str:
    """Return an option's value that is a hospital's name."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise typer.BadParameter(
            f'"{name}" must be lower-case letters, digits and hyphens'
        )
    return name


commands = typer.Typer()


@commands.command()
def init(
    site_dir: Annotated[Path, typer.Argument(help="Folder for this hospital.")],
    name: Annotated[
        str,
        typer.Option(
            help="This hospital: lower-case letters, digits, hyphens.",
            callback=is_name,
        ),
    ],
    server: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT",
            help="The consortium's server.",
            callback=is_server,
        ),
    ],
) -> None:
    """Write settings, policy, keys and a request; what exists is kept as it is."""
    with refusing():
        site_toml, request = set_up(site_dir, name, server)
    typer.echo(
        f"Settings are in {site_toml} and {policy.FILE} of its folder: read both.\n"
        f"Send {request} to the administrator, and read this fingerprint out to them "
        "by telephone:",
        err=True,
    )
    typer.echo(SiteRequest.load(request).fingerprint)
    typer.echo(f"When the kit comes back: fedgex-site join {site_toml} KIT", err=True)


@commands.command()
def join(
    site_toml: SiteToml,
    kit: Annotated[Path, typer.Argument(help="The kit from the administrator.")],
    administrators_changed: Annotated[
        bool,
        typer.Option(
            "--administrators-changed",
            help="Other administrators than before may sign contracts: we compared "
            "their keys by telephone.",
        ),
    ] = False,
) -> None:
    """Take the kit that the administrator made from our request."""
    with refusing():
        settings = load(site_toml)
        held = settings.state_dir / "identity" / "kit.json"
        before = described(Identity.load(settings.state_dir)) if held.exists() else None
        joined = identity.join(
            settings, kit, administrators_changed=administrators_changed
        )
    until = joined.certificate.not_valid_after_utc
    typer.echo(
        f"joined {joined.consortium} as {joined.name}, server {joined.server}, "
        f"certificate until {until:%Y-%m-%d}"
    )
    if before not in (None, described(joined)):
        typer.echo(f"contracts needed {before}")
    typer.echo(f"contracts need {described(joined)}")
    typer.echo(
        "Compare these fingerprints with those that the administrators read out: "
        f"authority {pki.fingerprint(joined.authority)}\n"
        + "".join(f"{n} {key}\n" for n, key in joined.administrators.items())
        + f"Next: fedgex-site check-connection {site_toml}",
        err=True,
    )


@commands.command()
def rotate(site_toml: SiteToml) -> None:
    """Make keys that replace ours; the old ones serve until the new kit is joined."""
    with refusing():
        request = identity.rotate(load(site_toml))
    typer.echo(
        f"Send {request} to the administrator, and read this fingerprint out to them "
        "by telephone:",
        err=True,
    )
    typer.echo(SiteRequest.load(request).fingerprint)
    typer.echo(
        f"When the kit comes back: fedgex-site join {site_toml} KIT, then restart the "
        "service.",
        err=True,
    )


@commands.command()
def check_connection(site_toml: SiteToml, form: Form = Format.TEXT) -> None:
    """Check the connection to the server step by step; name the fault and its fix."""
    steps: list[Step] = []
    with refusing():
        for step in connection_check(load(site_toml)).steps():
            steps.append(step)
            if form == Format.TEXT:
                typer.echo(str(step))
    if form == Format.JSON:
        typer.echo(json.dumps([asdict(step) for step in steps], indent=2))
    failed = [step.name for step in steps if step.state == "failed"]
    if failed:
        raise typer.Exit(UNREACHABLE if failed[0] in ("name", "connection") else 1)


@commands.command()
def pause(
    site_toml: SiteToml,
    by: Annotated[str, typer.Option(help="Who pauses; stands in the log.")],
    reason: Annotated[str, typer.Option(help="Why; stands in the log.")],
) -> None:
    """Answer no message until `resume`; what is computed now is still sent."""
    with refusing():
        settings = load(site_toml)
        at = datetime.now(UTC).isoformat(timespec="seconds")
        content = {"by": by, "reason": reason, "at": at}
        settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomic(settings.state_dir / "paused", json.dumps(content).encode())
        Chain(settings.state_dir / AUDIT).append("paused", by=by, reason=reason)
    typer.echo(f"paused by {by}")


@commands.command()
def resume(
    site_toml: SiteToml,
    by: Annotated[str, typer.Option(help="Who resumes; stands in the log.")],
) -> None:
    """Answer messages again."""
    with refusing():
        settings = load(site_toml)
        path = settings.state_dir / "paused"
        if not path.exists():
            raise ConfigError("this hospital is not paused; there is nothing to do.")
        Chain(settings.state_dir / AUDIT).append("resumed", by=by)
        path.unlink()
    typer.echo(f"resumed by {by}")


def set_up(site_dir: Path, name: str, server: str) -> tuple[Path, Path]:
    """Write settings, policy, keys and request; existing ones are kept.

    Returns
    -------
    tuple of Path
        `site.toml` and `request.json`.

    Raises
    ------
    ConfigError
        If the folder is another hospital's.
    """
    site_toml = site_dir / "site.toml"
    files = {
        site_toml: TEMPLATE.format(name=name, server=server),
        site_dir / policy.FILE: policy.TEMPLATE,
    }
    site_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    for path, text in files.items():
        if not path.exists():
            write_atomic(path, text.encode())
    settings = load(site_toml)
    if (settings.name, settings.server) != (name, server):
        raise ConfigError(
            f'{site_toml} exists, for "{settings.name}" at {settings.server}, and is '
            f'kept; expected "{name}" at {server}. Change it by hand, or take another '
            "folder."
        )
    request = settings.state_dir / "request.json"
    if not (settings.state_dir / "identity").exists():
        request = identity.create(settings)
    return site_toml, request


def connection_check(settings: SiteSettings) -> Check:
    """Return the connection check of a hospital."""
    joined = (settings.state_dir / "identity" / "kit.json").exists()
    found = Identity.load(settings.state_dir) if joined else None
    if found is not None:
        identity.require_server(settings, found.server, "the kit")
    server = settings.server if found is None else found.server
    if server is None:
        raise ConfigError(
            "site.toml names no server, and there is no kit yet that does; set "
            'server = "HOST:PORT".'
        )
    return Check(server, found, settings.proxy, settings.server_authority)
