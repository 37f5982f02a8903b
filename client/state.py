"""What a site keeps between rounds: its panel, and heads that stay local.

A head carries the number of its round, so that a round asked for again starts from the
same head as the first time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.numpy import load_file, save
from torch import nn

from fedgex.common import files
from fedgex.common.errors import CheckpointError
from fedgex.common.parameters import load_parameters, parameters

PANEL = "panel.sha256"
"""File with the digest of the genes and the scale that a run began with."""
KEPT_ROUNDS = 3
"""Rounds kept on disk: the server asks again for at most the last one."""


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


def remember_panel(state_dir: Path, digest: str) -> None:
    """Note what is measured as a run begins, see `panel`."""
    path = state_dir / PANEL
    with files.explained(path):
        state_dir.mkdir(parents=True, exist_ok=True)
    files.write_atomic(path, digest.encode())


def panel(state_dir: Path) -> str | None:
    """Return what was measured when the run began; None if it has not."""
    path = state_dir / PANEL
    return path.read_text() if path.exists() else None


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
