"""Release a run's last model, once enough administrators order it.

releases/RUN.fedgex   the bundle (docs/bundle.md) of a released model
audits/SHA256.json    the audit reports that orders name
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from fedgex.common.errors import ConfigError, FedgexError
from fedgex.common.models import checkpoint
from fedgex.common.privacy.audit_report import AuditReport
from fedgex.common.system import failpoints, files
from fedgex.common.trust import bundle
from fedgex.common.trust.bundle import Evidence
from fedgex.common.trust.contract import Contract
from fedgex.common.trust.signed import Signed
from fedgex.server.consortium import commands, contracts, runs
from fedgex.server.consortium.commands import Order
from fedgex.server.consortium.contracts import Published
from fedgex.server.consortium.runs import Run
from fedgex.server.consortium.store import Consortium

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Released:
    """State of the release of a run's last model."""

    state: Literal["candidate", "released"]
    approvals: tuple[str, ...]
    """Administrators who ordered it; for a released model, those in its bundle."""
    needed: int
    """Number of orders that the contract requires."""

    @property
    def complete(self) -> bool:
        """Whether enough administrators have ordered it."""
        return len(self.approvals) >= self.needed


def approve(consortium: Consortium, order: Order) -> Released:
    """Count an order to release a run's model; write the bundle once there are enough.

    Repeated and surplus orders change nothing.

    Raises
    ------
    FedgexError
        If the run is not finished, or the order is for another model than its last.
    ConfigError
        If the contract demands an audit report, and the order names none that permits
        the release.
    TrustError
        If contract, receipts or model are invalid; nothing is released.
    """
    run = runs.load(consortium.folder, order.subject)
    if run.state != "finished":
        raise FedgexError(
            f'the run "{run.name}" is {run.state}; expected a finished one. Order the '
            "release again once it is at its end."
        )
    last = _last(run)
    model = manifest_digest(last)
    if order.model != model:
        raise FedgexError(
            f"the order is to release the model {order.model[:12]}, the last one of "
            f'the run "{run.name}" is {model[:12]}. Look at it with fedgex-admin model '
            "show, and order its release if it is the one you mean."
        )
    published = contracts.load(consortium, run.facts["contract"])
    pins = published.contract.administrator_keys
    require_audit(consortium, published.contract, model, order.audit)
    if not path(consortium, run.name).exists():
        consents = {
            name: signed
            for name, signed in commands.consents(
                consortium, run.name, model, pins
            ).items()
            if _is_audited(consortium, published.contract, model, signed)
        }
        if len(consents) >= published.contract.release.administrators:
            _write(consortium, run, last, published, consents)
    return status(consortium, run.name)


def keep_audit(consortium: Consortium, report: Path) -> str:
    """Store an audit report, and return its SHA-256.

    Raises
    ------
    ConfigError
        If it is no audit report.
    FedgexError
        If it cannot be stored.
    """
    AuditReport.load(report)
    text = report.read_bytes()
    digest = hashlib.sha256(text).hexdigest()
    kept = _audit(consortium, digest)
    with files.explained(kept):
        kept.parent.mkdir(exist_ok=True)
    files.write_atomic(kept, text)
    return digest


def require_audit(
    consortium: Consortium, contract: Contract, model: str, audit: str
) -> None:
    """Refuse a release without the audit report that the contract demands.

    Parameters
    ----------
    model
        SHA-256 of the model's manifest.
    audit
        SHA-256 of the report, see `keep_audit`; "" for none.

    Raises
    ------
    ConfigError
        If there is none, it is of another model or study, or finds more than the
        contract permits.
    """
    most = contract.release.audit_max_auc
    if most is None:
        return
    demand = f"the contract demands an audit report with an AUC up to {most:g}"
    if not audit:
        raise ConfigError(
            f"{demand}, and the order names none. Audit the model (docs/audit.md), and "
            "name the report with --audit."
        )
    kept = _audit(consortium, audit)
    report = AuditReport.load(kept)
    if checkpoint.digest(kept) != audit:
        raise ConfigError(f"{kept} was changed; name the report again with --audit.")
    objection = report.objection(contract.study.hash, model, most)
    if objection is not None:
        raise ConfigError(f"{demand}: {objection}. Nothing is released.")


def status(consortium: Consortium, run: str) -> Released:
    """Return the state of the release of a run's last model.

    Raises
    ------
    FedgexError
        If there is no such run, or it has no checkpoint yet.
    """
    found = runs.load(consortium.folder, run)
    contract = contracts.load(consortium, found.facts["contract"]).contract
    needed, written = contract.release.administrators, path(consortium, run)
    if written.exists():
        return Released("released", bundle.administrators(written), needed)
    model, pins = manifest_digest(_last(found)), contract.administrator_keys
    given = commands.approvals(consortium, run, model, pins)
    return Released("candidate", given, needed)


def export(consortium: Consortium, run: str, out: Path) -> bundle.Released:
    """Copy a released model's bundle to `out`, once it is verified.

    Raises
    ------
    FedgexError
        If the model is not released, or `out` exists or cannot be written.
    TrustError
        If the bundle was changed.
    """
    found = status(consortium, run)
    if found.state == "candidate":
        raise FedgexError(
            f'the model of the run "{run}" is not released: {len(found.approvals)} of '
            f"{found.needed} administrators ordered it "
            f"({', '.join(found.approvals) or 'nobody'}). Order it with fedgex-admin "
            "model release, and see that the server runs."
        )
    if out.exists():
        raise FedgexError(f"{out} exists already; choose another file.")
    source = path(consortium, run)
    released = bundle.verify(source, consortium.authority)
    with (
        files.explained(out),
        files.replacing(out, mode=0o644) as copy,
        source.open("rb") as content,
    ):
        shutil.copyfileobj(content, copy)
    return released


def path(consortium: Consortium, run: str) -> Path:
    """Return the path of a released run's bundle."""
    return consortium.folder / "releases" / f"{run}{bundle.SUFFIX}"


def manifest_digest(folder: Path) -> str:
    """Return the SHA-256 of a checkpoint's manifest, which holds those of its files."""
    return checkpoint.digest(folder / "manifest.json")


def _write(
    consortium: Consortium,
    run: Run,
    last: Path,
    published: Published,
    consents: dict[str, Signed],
) -> None:
    """Write the bundle under its final name once it is complete and verified."""
    final = path(consortium, run.name)
    partial = final.with_name(f".{final.name}.partial")
    evidence = Evidence(
        run=run.name,
        checkpoint=last,
        contract=published.signed,
        receipts=_receipts(run),
        orders=consents,
        authority=consortium.authority,
        released=datetime.now(UTC).replace(microsecond=0),
    )
    with files.explained(final):
        try:
            bundle.write(
                evidence, partial, consortium.coordinator_key, consortium.coordinator
            )
            bundle.verify(partial, consortium.authority)
            failpoints.reach("release.written")
            consortium.audit.append(
                "model-released",
                run=run.name,
                model=manifest_digest(last),
                administrators=sorted(consents),
                audits=sorted({_order(c).audit for c in consents.values()} - {""}),
                bundle=checkpoint.digest(partial),
            )
            os.replace(partial, final)
        except (OSError, FedgexError):
            partial.unlink(missing_ok=True)
            raise
        failpoints.reach("release.renamed")
        files.sync(final.parent)
    logger.info("run=%s released by %s", run.name, ", ".join(sorted(consents)))


def _is_audited(
    consortium: Consortium, contract: Contract, model: str, signed: Signed
) -> bool:
    """Return whether a pending or accepted order has the report that it needs."""
    try:
        require_audit(consortium, contract, model, _order(signed).audit)
    except ConfigError:
        return False
    return True


def _order(signed: Signed) -> Order:
    return Order.from_json(signed.content, "the order")


def _audit(consortium: Consortium, digest: str) -> Path:
    return consortium.folder / "audits" / f"{digest}.json"


def _receipts(run: Run) -> list[Signed]:
    """Return the receipts of a run in order.

    Raises
    ------
    FedgexError
        If there is none.
    """
    found = sorted((run.folder / "checkpoints").glob("[0-9]*/receipt.json"))
    if not found:
        raise FedgexError(
            f'the run "{run.name}" holds no receipts, so nobody could verify its '
            "model; restore its folder from the backup."
        )
    return [Signed.from_json(each.read_bytes(), str(each)) for each in found]


def _last(run: Run) -> Path:
    folder = checkpoint.latest(run.folder / "checkpoints")
    if folder is None:
        raise FedgexError(f'the run "{run.name}" has no model yet; let it run.')
    return folder
