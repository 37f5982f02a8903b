"""`fedgex-admin cohort`: make and check the hold-out and the public cohort."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fedgex.common import parsing
from fedgex.common.data.scales import Scale
from fedgex.common.errors import ConfigError, FedgexError
from fedgex.common.study import Study
from fedgex.server.cli.command_line import (
    Format,
    OptionalState,
    note,
    refusals,
    show,
)

cohort = typer.Typer(
    no_args_is_help=True, help="Make and check hold-out and public cohort."
)

PLACES = ("holdout", "public")
"""Folders of the state directory; any other `--to` is a folder by itself."""


@cohort.callback()
def _group() -> None:
    """Keep `build` a command of its group."""


@cohort.command("build")
def cohort_build(
    data_toml: Annotated[
        Path,
        typer.Argument(help="TOML with a [data] table like that of a site.toml."),
    ],
    to: Annotated[str, typer.Option(help="holdout, public, or a folder.")],
    study: Annotated[
        Path | None,
        typer.Option(help="A contract's file, or a TOML with a [study]; its scale."),
    ] = None,
    scale: Annotated[
        Scale | None, typer.Option(help="Scale of the studies, without --study.")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace a cohort that is there.")
    ] = False,
    state: OptionalState = None,
    form: Format = "text",
) -> None:
    """Read and check files as hospitals do, and write them as a cohort.

    Compares it with a study before anybody signs: genes, cancer types, follow-up, and
    patients that the other cohort has too.
    """
    # pandas, which other commands do not need
    from fedgex.common.data.cohort import MANIFEST, load_cohort, save_cohort
    from fedgex.common.ingestion.cohort import read_cohort
    from fedgex.server.federation import public_cohort

    with refusals():
        asked = None if study is None else _study(study)
        target = _scale(asked, scale)
        folder = _folder(to, state)
        if folder.exists() and any(folder.iterdir()) and not replace:
            raise FedgexError(
                f"{folder} is not empty; add --replace to put the new cohort there."
            )
        tasks = () if asked is None else tuple(asked.phases)
        made, findings = read_cohort(_data(data_toml), 1, target, tasks)
        for finding in findings:
            note(str(finding))
        compared = made if asked is None else public_cohort.under_names_of(asked, made)
        gaps = [] if asked is None else public_cohort.gaps(asked, compared)
        if to in PLACES and state is not None:
            other = state / PLACES[1 - PLACES.index(to)]
            if (other / MANIFEST).exists():
                known = load_cohort(other, target)
                public_cohort.require_apart(made, known)
        save_cohort(made, folder, target)
    one = made.take(made.first_samples()).clinical
    types = {}
    if "cancer_type" in one:
        sizes = one["cancer_type"].value_counts().sort_index()
        types = {str(name): int(n) for name, n in sizes.items()}
    facts: dict[str, Any] = {
        "cohort": str(folder),
        "scale": str(target),
        "patients": made.n_patients,
        "genes": len(made.genes),
        "cancer_types": types,
    }
    if asked is not None and asked.vocabulary.genes:
        shared = len(set(asked.vocabulary.genes) & set(compared.genes))
        facts["genes_of_the_study"] = f"{shared} of {len(asked.vocabulary.genes)}"
    show(facts | {"gaps": gaps}, form)


def _folder(to: str, state: Path | None) -> Path:
    if to not in PLACES:
        return Path(to)
    if state is None:
        raise ConfigError(f"--to {to} needs --state, the consortium's directory.")
    return state / to


def _scale(study: Study | None, scale: Scale | None) -> Scale:
    if study is not None:
        if scale not in (None, study.scale):
            raise ConfigError(
                f"--scale {scale} is not the study's, {study.scale}; leave --scale out."
            )
        return study.scale
    if scale is None:
        raise ConfigError("neither --study nor --scale; expected one of them.")
    return scale


def _study(path: Path) -> Study:
    """Read the study of a contract, a scenario or a study's file."""
    values = _toml(path)
    return Study.read(values.get("study", values), str(path))


def _data(path: Path) -> Any:
    """Read the [data] table of a TOML; its relative paths start at its folder."""
    from fedgex.common.ingestion.settings import DataSettings

    values = _toml(path).get("data")
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: no section [data]; expected that of a site.toml.")
    data = DataSettings.read(values, f"{path.name}: data")
    return data.anchored(path.resolve().parent)


def _toml(path: Path) -> dict[str, Any]:
    most = parsing.LONG_BYTES
    text = parsing.read_bytes(path, "a TOML file", most=most)
    return parsing.toml_table(text, f"{path}:", most=most)
