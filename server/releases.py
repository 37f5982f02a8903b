"""From candidate to released: a run's last model, once enough administrators order it.

releases/RUN.fedgex   the bundle (docs/bundle.md); a model is released once it is here
"""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from fedgex.common import bundle, checkpoint, failpoints, files
from fedgex.common.bundle import Evidence
from fedgex.common.errors import FedgexError
from fedgex.common.pki import Signed
from fedgex.server import orders, runs, studies
from fedgex.server.consortium import Consortium
from fedgex.server.orders import Order
from fedgex.server.runs import Run
from fedgex.server.studies import Published

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Released:
    """How far the release of a run's last model is."""

    state: Literal["candidate", "released"]
    approvals: tuple[str, ...]
    """Administrators who ordered it, of a released model those in its bundle."""
    needed: int
    """How many must, by the contract."""

    @property
    def complete(self) -> bool:
        """Whether as many as must have ordered it."""
        return len(self.approvals) >= self.needed


def approve(consortium: Consortium, order: Order) -> Released:
    """Count an order to release a run's model; write the bundle once they are enough.

    The same order again, or one more than needed, changes nothing.

    Raises
    ------
    FedgexError
        If the run is not finished, or the order is for another model than its last.
    TrustError
        If contract, receipts or model do not hold; then nothing is released.
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
    published = studies.load(consortium, run.facts["contract"])
    if not path(consortium, run.name).exists():
        consents = orders.consents(consortium, run.name, model)
        if len(consents) >= published.contract.release.administrators:
            _write(consortium, run, last, published, consents)
    return status(consortium, run.name)


def status(consortium: Consortium, run: str) -> Released:
    """Return how far the release of a run's last model is.

    Raises
    ------
    FedgexError
        If there is no such run, or it has no checkpoint yet.
    """
    found = runs.load(consortium.folder, run)
    contract = studies.load(consortium, found.facts["contract"]).contract
    needed, written = contract.release.administrators, path(consortium, run)
    if written.exists():
        return Released("released", bundle.administrators(written), needed)
    given = orders.approvals(consortium, run, manifest_digest(_last(found)))
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
    partial = out.with_name(f".{out.name}.partial")
    with files.explained(out):
        try:
            shutil.copyfile(source, partial)
            files.sync(partial)
            os.replace(partial, out)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        files.sync(out.parent)
    return released


def path(consortium: Consortium, run: str) -> Path:
    """Return where the bundle of a run stands once it is released."""
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
    """Write the bundle under its final name, whole and verified or not at all."""
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
                bundle=checkpoint.digest(partial),
            )
            os.replace(partial, final)
        except (OSError, FedgexError):
            partial.unlink(missing_ok=True)
            raise
        failpoints.reach("release.renamed")
        files.sync(final.parent)
    logger.info("run=%s released by %s", run.name, ", ".join(sorted(consents)))


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
