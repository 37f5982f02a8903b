"""A contract may demand an audit report before its model is released."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fedgex.common.errors import ConfigError, TrustError
from fedgex.common.models import checkpoint
from fedgex.common.privacy.audit_report import AuditReport
from fedgex.common.trust import audit_log, bundle
from fedgex.server.cli import app
from fedgex.server.consortium import commands, contracts, releases, runs

from ...conftest import attack
from ..conftest import digest_of


@pytest.fixture
def finished(finish: Callable[[str], runs.Run]) -> runs.Run:
    """Return a run at its end, of a contract that permits an AUC up to 0.6."""
    return finish("audit_max_auc = 0.6\n")


@pytest.fixture
def report(finished: runs.Run, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a hospital's report on the run's model."""

    def make(high: float, **changes: Any) -> Path:
        values = {
            "kind": "hospital",
            "study": "small",
            "study_hash": "a" * 64,
            "model": digest_of(finished),
            "membership": [attack("released", high)],
        }
        path = tmp_path / f"audit-{high}.json"
        path.write_text(AuditReport.read(values | changes, "test").to_json())
        return path

    return make


def release(admitted: Any, name: str, *more: object) -> Result:
    options = ["--key", admitted.keys[name], "--state", admitted.folder, *more]
    return CliRunner().invoke(app, ["model", "release", "small", *map(str, options)])


def carry_out(admitted: Any) -> None:
    """Do what the supervisor does with orders."""
    consortium = admitted.consortium
    for order in commands.take(consortium):
        try:
            releases.approve(consortium, order)
        except ConfigError as error:
            commands.finish(consortium, order, refused=str(error))
        else:
            commands.finish(consortium, order)


def test_without_a_report_the_release_is_refused(
    admitted: Any, finished: runs.Run
) -> None:
    result = release(admitted, "ada")

    assert result.exit_code == 1
    assert "an AUC up to 0.6, and the order names none" in result.stderr
    assert commands.approvals(admitted.consortium, "small", digest_of(finished)) == ()


def test_a_report_above_is_refused_with_what_was_found(
    admitted: Any, report: Callable[..., Path]
) -> None:
    result = release(admitted, "ada", "--audit", report(0.65))

    assert result.exit_code == 1
    assert "0.650" in result.stderr
    assert "0.600" in result.stderr


def test_a_report_of_another_model_is_refused(
    admitted: Any, report: Callable[..., Path]
) -> None:
    result = release(admitted, "ada", "--audit", report(0.5, model="c" * 64))

    assert result.exit_code == 1
    assert "another one" in result.stderr


def test_with_reports_the_model_is_released_and_the_record_names_them(
    admitted: Any, finished: runs.Run, report: Callable[..., Path]
) -> None:
    for name in ("ada", "bo"):
        result = release(admitted, name, "--audit", report(0.6))
        assert result.exit_code == 0, result.output
    carry_out(admitted)

    path = releases.path(admitted.consortium, "small")
    assert bundle.verify(path, admitted.consortium.authority).administrators == (
        "ada",
        "bo",
    )
    entry = [
        e
        for e in audit_log.read(admitted.folder / "audit.jsonl")
        if e["event"] == "model-released"
    ]
    kept = checkpoint.digest(report(0.6))
    assert entry[0]["audits"] == [kept]
    assert (admitted.folder / "audits" / f"{kept}.json").is_file()


def test_the_server_counts_no_order_without_a_report(
    admitted: Any, finished: runs.Run, report: Callable[..., Path]
) -> None:
    consortium = admitted.consortium
    commands.submit(
        consortium, "release", "small", admitted.key("bo"), model=digest_of(finished)
    )
    audit = releases.keep_audit(consortium, report(0.6))
    mine = commands.submit(
        consortium,
        "release",
        "small",
        admitted.key("ada"),
        model=digest_of(finished),
        audit=audit,
    )

    releases.approve(consortium, mine)
    carry_out(admitted)

    assert not releases.path(consortium, "small").exists()
    assert commands.approvals(consortium, "small", digest_of(finished)) == ("ada",)


def test_a_report_that_was_changed_at_the_server_does_not_count(
    admitted: Any, finished: runs.Run, report: Callable[..., Path]
) -> None:
    consortium = admitted.consortium
    digest = releases.keep_audit(consortium, report(0.7))
    path = admitted.folder / "audits" / f"{digest}.json"
    path.write_text(path.read_text().replace("0.7", "0.6"))
    contract = contracts.load(consortium, finished.facts["contract"]).contract

    with pytest.raises(ConfigError, match="was changed"):
        releases.require_audit(consortium, contract, digest_of(finished), digest)


def test_a_bundle_whose_orders_name_no_report_is_not_used(
    admitted: Any,
    finished: runs.Run,
    report: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(releases, "require_audit", lambda *_: None)
    consortium = admitted.consortium
    for name in ("ada", "bo"):
        key = admitted.key(name)
        order = commands.submit(
            consortium, "release", "small", key, model=digest_of(finished)
        )
        if name == "ada":
            releases.approve(consortium, order)

    with pytest.raises(TrustError, match="names no audit report"):
        releases.approve(consortium, order)
    assert not releases.path(consortium, "small").exists()
