"""`fedgex-site check-data`: the hospital's data, before a study uses them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime

import typer

from fedgex.client.admission.approvals import ApprovalStore
from fedgex.client.admission.coverage import coverage
from fedgex.client.cli.options import Form, Format, SiteToml, load, refusing
from fedgex.client.settings import SiteSettings
from fedgex.common.codes import Code
from fedgex.common.data.cohort import Cohort
from fedgex.common.data.scales import Scale
from fedgex.common.errors import ConfigError, DataError, Finding
from fedgex.common.ingestion.cohort import read_cohort

commands = typer.Typer()


@commands.command()
def check_data(site_toml: SiteToml, form: Form = Format.TEXT) -> None:
    """Check the hospital's data before a study does; nothing leaves the machine."""
    with refusing():
        settings = load(site_toml)

    cohort: Cohort | None = None
    contracts: dict[str, list[str]] = {}
    try:
        # Studies are on log2(x + 1) by default, or on relative values throughout.
        relative = settings.data.scale == Scale.RELATIVE
        target = Scale.RELATIVE if relative else Scale.LOG2P1
        cohort, findings = read_cohort(
            settings.data, settings.policy.minimum_cohort, target, settings.policy.tasks
        )
        with refusing():
            contracts = _against_contracts(cohort, settings)
    except DataError as error:
        findings = error.findings
    floor = settings.policy.minimum_cohort
    if form == Format.JSON:
        typer.echo(_as_json(cohort, findings, floor, contracts))
    else:
        typer.echo(_as_text(cohort, findings, floor, contracts))
    if cohort is None:
        typer.echo(
            "Error: the data cannot be used; correct every error and run check-data "
            "again",
            err=True,
        )
        raise typer.Exit(1)


def _against_contracts(cohort: Cohort, settings: SiteSettings) -> dict[str, list[str]]:
    """Return what each contract that may still run finds in the data, by its hash."""
    try:
        approvals = ApprovalStore.of(settings)
    except ConfigError:  # it has not joined a consortium yet
        return {}
    return {
        each.hash: list(
            coverage(cohort, each.contract.study, settings.policy.minimum_cohort)
        )
        for each in approvals.contracts()
        if not each.contract.expired(datetime.now(UTC))
    }


def _as_text(
    cohort: Cohort | None,
    findings: Sequence[Finding],
    min_cell_count: int,
    contracts: Mapping[str, Sequence[str]],
) -> str:
    """Return one line a finding, what the cohort holds, and one line for all."""
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
    held = [] if cohort is None else _held(cohort, min_cell_count)
    for hash, sentences in contracts.items():
        held += [f"contract {hash[:16]}: {each}" for each in sentences]
    return "\n".join([*map(str, findings), *held, summary])


def _held(cohort: Cohort, min_cell_count: int) -> list[str]:
    """Return what a person can compare with what they expected to export."""
    one = cohort.take(cohort.first_samples())
    followed = one.clinical[one.with_survival()]
    lines = []
    if len(followed) >= min_cell_count:
        middle, died = followed["duration"].median(), int(followed["event"].sum())
        deaths = died if died >= min_cell_count else f"fewer than {min_cell_count}"
        lines.append(
            f"follow-up: {len(followed)} patients, {deaths} with the event, "
            f"median {middle / 365.25:.1f} years"
        )
    if types := _types(one, min_cell_count):
        listed = ", ".join(f"{name} {n}" for name, n in types.items())
        lines.append(f"cancer types of {min_cell_count} patients or more: {listed}")
    return lines


def _types(one: Cohort, min_cell_count: int) -> dict[str, int]:
    """Return the patients of each cancer type that has enough of them."""
    if "cancer_type" not in one.clinical:
        return {}
    sizes = one.clinical["cancer_type"].value_counts()
    return {str(name): int(n) for name, n in sizes.items() if n >= min_cell_count}


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _as_json(
    cohort: Cohort | None,
    findings: Sequence[Finding],
    min_cell_count: int,
    contracts: Mapping[str, Sequence[str]],
) -> str:
    """Return the findings and sizes; null where the data were refused before."""
    patients: int | str | None = None
    if cohort is not None:
        patients = cohort.n_patients
    elif any(finding.code == Code.TOO_FEW_PATIENTS for finding in findings):
        patients = f"fewer than {min_cell_count}"
    report = {
        "ok": cohort is not None,
        "patients": patients,
        "genes": None if cohort is None else len(cohort.genes),
        "cancer_types": None
        if cohort is None
        else _types(cohort.take(cohort.first_samples()), min_cell_count),
        "contracts": dict(contracts),
        "findings": [asdict(finding) for finding in findings],
    }
    return json.dumps(report, indent=2, ensure_ascii=False)
