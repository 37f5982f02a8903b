"""What a site keeps between rounds: its panel, and heads that stay local.

A head carries the number of its round, so that a round asked for again starts from the
same head as the first time.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.numpy import load_file, save
from torch import nn

from fedgex.common import files
from fedgex.common.errors import CheckpointError
from fedgex.common.parameters import load_parameters, parameters

PANEL = "panel.json"
"""File with the panel that a run began with."""
KEPT_ROUNDS = 3
"""Rounds kept on disk: the server asks again for at most the last one."""


@dataclass(frozen=True)
class Panel:
    """Genes and scale of a site's data, and the genes that the site reported."""

    scale: str
    genes: tuple[str, ...]
    told: tuple[str, ...]
    """Those of enough patients."""
    run: str
    """Name of the run; empty in a simulation, which has none."""

    def holds(self, scale: str, genes: Collection[str]) -> bool:
        """Return whether the data still are what the site reported.

        A gene of few patients may go: its last one may have opted out.
        """
        return scale == self.scale and set(self.told) <= set(genes) <= set(self.genes)


def save_head(
    head: Mapping[str, nn.Module], state_dir: Path, phase: str, number: int
) -> None:
    """Keep a local head as of the end of a round; does nothing for an empty mapping.

    Raises
    ------
    FedgexError
        If it cannot be written; then the round's file is as it was.
    """
    if not head:
        return
    path = _path(state_dir, phase, number)
    with files.explained(path):
        state_dir.mkdir(parents=True, exist_ok=True)
    files.write_atomic(path, save(parameters(head)), point="head")
    _path(state_dir, phase, number - KEPT_ROUNDS).unlink(missing_ok=True)


def remember_panel(state_dir: Path, panel: Panel) -> None:
    """Note what is measured as a run begins, see `read_panel`.

    Raises
    ------
    FedgexError
        If it cannot be written; then the panel is the one noted before.
    """
    path = state_dir / PANEL
    with files.explained(path):
        state_dir.mkdir(parents=True, exist_ok=True)
    files.write_atomic(path, json.dumps(asdict(panel)).encode())


def read_panel(state_dir: Path) -> Panel | None:
    """Return what was measured when the run began; None if it has not."""
    path = state_dir / PANEL
    if not path.exists():
        return None
    kept = json.loads(path.read_text())
    return Panel(kept["scale"], tuple(kept["genes"]), tuple(kept["told"]), kept["run"])


def load_head(
    head: Mapping[str, nn.Module], state_dir: Path, phase: str, number: int
) -> None:
    """Load a local head as of round `number`, or the last one before it.

    A site that was away for a round goes on from where it left off; one that never took
    part keeps the head it was built with.
    """
    if not head:
        return
    earlier = [
        p for p in _kept(state_dir, phase) if p <= _path(state_dir, phase, number)
    ]
    if earlier:
        load_parameters(head, load_file(earlier[-1]))


def latest_head(head: Mapping[str, nn.Module], state_dir: Path, phase: str) -> None:
    """Load the local head of the last round that this site took part in.

    Raises
    ------
    CheckpointError
        If the site has none.
    """
    found = _kept(state_dir, phase)
    if not found:
        raise CheckpointError(
            f"{state_dir} holds no {phase} head; this study kept heads at their sites, "
            "and this site did not take part."
        )
    load_parameters(head, load_file(found[-1]))


def _path(state_dir: Path, phase: str, number: int) -> Path:
    return state_dir / f"{phase}-head-{number:05d}.safetensors"


def _kept(state_dir: Path, phase: str) -> list[Path]:
    return sorted(state_dir.glob(f"{phase}-head-*.safetensors"))
