"""What secure aggregation costs in computation: a round of the protocol beside a plain.

Everything that all sites and the server compute, one after the other in this process;
messages, disks and waiting are not in it.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from fedgex.common.federation import Update
from fedgex.common.models import tasks
from fedgex.common.models.gexbert import GexBert, n_parameters
from fedgex.common.models.parameters import parameters
from fedgex.common.models.training import fit, pretraining_loss
from fedgex.common.secure_aggregation import protocol, vectors
from fedgex.common.secure_aggregation.protocol import Context, Group, PrivateKeys
from fedgex.common.secure_aggregation.vectors import FixedPoint
from fedgex.common.study import Pretraining, StrategyRule
from fedgex.server.federation.strategy import Spooled, combine

from .rows import (
    LEARNING_RATE,
    SEED,
    Row,
    below,
    cpu_seconds,
    new_backbone,
    synthetic,
)

Change = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """A federation to be measured."""

    n_sites: int
    patients_per_site: int
    n_genes: int
    repeats: int


FULL = Size(n_sites=10, patients_per_site=100, n_genes=3_200, repeats=5)
"""1 M parameters."""
QUICK = Size(n_sites=4, patients_per_site=10, n_genes=60, repeats=1)


def measure(*, quick: bool) -> list[Row]:
    """Compare the processor's time of the protocol with that of a plain round."""
    size = QUICK if quick else FULL
    backbone = new_backbone("tiny", size.n_genes)
    change = parameters({tasks.BACKBONE: backbone})
    with tempfile.TemporaryDirectory(prefix="fedgex-bench-") as folder:
        file = Path(folder) / "update.safetensors"
        save_file(change, file)
        plain = median(
            size.n_sites * cpu_seconds(lambda: _train(size, backbone))
            + cpu_seconds(lambda: _aggregate(size, file, change))
            for _ in range(size.repeats)
        )
    everybody = median(
        cpu_seconds(lambda: exchange(size, change, gone=0)) for _ in range(size.repeats)
    )
    gone = size.n_sites - protocol.threshold(size.n_sites)
    fewest = median(
        cpu_seconds(lambda: exchange(size, change, gone=gone))
        for _ in range(size.repeats)
    )
    of = (
        f"{plain:.2f} CPU s plain, {size.n_sites} sites of {size.patients_per_site} "
        f"patients, {n_parameters(backbone) / 1e6:.1f} M parameters"
    )
    return [
        _row("secure aggregation / plain round", everybody / plain, everybody, of),
        _row(f"the same, {gone} sites lost midway", fewest / plain, fewest, of),
    ]


def exchange(size: Size, change: Change, *, gone: int) -> NDArray[np.float64]:
    """Take every step of the protocol for all sites; return the sum of the changes.

    Parameters
    ----------
    gone
        Sites that are lost after they shared their secrets.
    """
    names = [f"site-{i:03d}" for i in range(size.n_sites)]
    context = Context(contract="", run="bench", phase="", round=1, attempt=1)
    panel = np.ones(size.n_genes, dtype=np.bool_)
    own = {name: PrivateKeys.new() for name in names}
    group = Group(context, {name: keys.public(panel) for name, keys in own.items()})
    dealt = {name: protocol.share_out(group, own[name]) for name in names}
    boxes = {
        (a, b): protocol.seal(group, own[a], a, b, dealt[a][b])
        for a in names
        for b in names
        if a != b
    }
    held = {
        (a, b): protocol.unseal(group, own[b], a, b, box)
        for (a, b), box in boxes.items()
    } | {(a, a): dealt[a][a] for a in names}
    fixed, left = FixedPoint(100.0, size.n_sites), names[gone:]
    total = np.zeros(sum(array.size for array in change.values()), dtype=np.uint32)
    for name in left:
        words = fixed.encode(vectors.to_vector(change, 100.0, panel))
        total += protocol.masked(group, own[name], name, names, words)
    for name in left:
        tags = {
            other: protocol.confirm(group, own[other], other, name, names, left)
            for other in left
            if other != name
        }
        protocol.require_confirmed(group, own[name], name, names, left, tags)
    summed = protocol.unmasked(
        group,
        names,
        left,
        total,
        {a: {b: held[a, b].seed for b in left} for a in left},
        {a: {b: held[a, b].mask for b in left} for a in names[:gone]},
        {a: protocol.commitment(group, a, own[a].seed) for a in left},
    )
    return fixed.decode(summed)


def _train(size: Size, backbone: GexBert) -> None:
    patients = synthetic(size.patients_per_site, size.n_genes)
    phase, site = Pretraining(rounds=1), copy.deepcopy(backbone)
    fit(
        site.parameters(),
        pretraining_loss(site, patients, phase),
        len(patients),
        phase,
        learning_rate=LEARNING_RATE,
        seed=SEED,
    )


def _aggregate(size: Size, file: Path, incoming: Change) -> None:
    updates = [
        Update(
            site=f"site-{i:03d}",
            arrays=Spooled(file),
            num_examples=1,
            num_loss_terms=1,
            measured=np.ones(size.n_genes, dtype=np.bool_),
        )
        for i in range(size.n_sites)
    ]
    combine(StrategyRule(name="fedavg"), incoming, updates, 1, {})


def _row(name: str, value: float, seconds: float, of: str) -> Row:
    detail = f"{seconds:.2f} CPU s of the protocol alone, {of}"
    return below(name, value, 0.1, detail)
