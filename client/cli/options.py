"""Options, output formats and error handling that the commands share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from fedgex.common.errors import FedgexError

if TYPE_CHECKING:
    from fedgex.client.settings import SiteSettings

NOT_FOUND, NOT_RUNNING, UNREACHABLE = 3, 4, 4
"""Exit codes; 1 is refused, 2 wrong usage."""


class Format(StrEnum):
    """Output for people or for scripts."""

    TEXT = "text"
    JSON = "json"


SiteToml = Annotated[Path, typer.Argument(help="The hospital's site.toml.")]
Form = Annotated[
    Format, typer.Option("--format", help="Lines for people, or JSON for scripts.")
]
Authority = Annotated[
    Path | None,
    typer.Option(
        help="The consortium's authority.crt, against which a released model is "
        "verified; default: that of --site."
    ),
]
Model = Annotated[
    Path,
    typer.Option(
        help="A released model (.fedgex), a run's folder (its last checkpoint), or a "
        "checkpoint's."
    ),
]


def load(site_toml: Path) -> SiteSettings:
    """Read a `site.toml`; see `SiteSettings.load`."""
    from fedgex.client.settings import SiteSettings

    return SiteSettings.load(site_toml)


@contextmanager
def refusing() -> Iterator[None]:
    """Turn an expected error into an `Error:` line and exit code 1."""
    try:
        yield
    except FedgexError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error


def not_found(message: str) -> NoReturn:
    """Leave with an `Error:` line and the exit code for what does not exist."""
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(NOT_FOUND)
