"""`fedgex-site`: for a hospital's operator."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from fedgex.client import (
    audit_cli,
    daemon_cli,
    ledger_cli,
    predict_cli,
    site_cli,
    study_cli,
)
from fedgex.client.settings import SiteSettings
from fedgex.client.validation import load_cohort
from fedgex.common.codes import Code
from fedgex.common.cohort import Cohort
from fedgex.common.errors import ConfigError, DataError, Finding
from fedgex.common.scale import Scale

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_show_locals=False
)
app.add_typer(site_cli.commands)
app.add_typer(daemon_cli.commands)
app.add_typer(study_cli.study, name="study")
app.add_typer(ledger_cli.ledger, name="ledger")
app.add_typer(predict_cli.predict, name="predict")
app.add_typer(audit_cli.commands)

SiteToml = Annotated[Path, typer.Argument(help="The hospital's site.toml.")]


class Format(StrEnum):
    """Output for people or for scripts."""

    TEXT = "text"
    JSON = "json"


@app.callback()
def main() -> None:
    """Serve a hospital's operator: join, decide about studies, use a finished model."""


@app.command()
def check_data(
    site_toml: SiteToml,
    form: Annotated[
        Format, typer.Option("--format", help="Lines for people, or JSON for scripts.")
    ] = Format.TEXT,
) -> None:
    """Check the hospital's data before a study does; nothing leaves the machine."""
    try:
        settings = SiteSettings.load(site_toml)
    except ConfigError as error:
        _refuse(str(error))
    cohort: Cohort | None = None
    try:
        # Studies are on log2(x + 1) by default, or on relative values throughout.
        relative = settings.data.scale == Scale.RELATIVE
        target = Scale.RELATIVE if relative else Scale.LOG2P1
        cohort, findings = load_cohort(settings, target, settings.policy.tasks)
    except DataError as error:
        findings = error.findings
    if form == Format.JSON:
        typer.echo(_as_json(cohort, findings, settings.policy.minimum_cohort))
    else:
        typer.echo(_as_text(cohort, findings))
    if cohort is None:
        _refuse("the data cannot be used; correct every error and run check-data again")


def _as_text(cohort: Cohort | None, findings: Sequence[Finding]) -> str:
    """Return one line a finding and one for all."""
    severities = [finding.severity for finding in findings]
    tally = ", ".join(
        _count(severities.count(severity), severity)
        for severity in ("error", "warning", "note")
    )
    summary = f"refused: {tally}"
    if cohort is not None:
        patients, genes = cohort.n_patients, len(cohort.genes)
        sizes = f"{_count(patients, 'patient')}, {_count(genes, 'gene')}"
        summary = f"ok: {sizes}; {tally}"
    return "\n".join([*map(str, findings), summary])


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _as_json(cohort: Cohort | None, findings: Sequence[Finding], floor: int) -> str:
    """Return the findings and sizes; null where the data were refused before."""
    patients: int | str | None = None
    if cohort is not None:
        patients = cohort.n_patients
    elif any(finding.code == Code.TOO_FEW_PATIENTS for finding in findings):
        patients = f"fewer than {floor}"
    report = {
        "ok": cohort is not None,
        "patients": patients,
        "genes": None if cohort is None else len(cohort.genes),
        "findings": [asdict(finding) for finding in findings],
    }
    return json.dumps(report, indent=2, ensure_ascii=False)


def _refuse(message: str) -> NoReturn:
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(1)
