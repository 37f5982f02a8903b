"""What a site keeps between rounds: heads that stay local, one file a round.

A file carries the number of its round, so that a round asked for again starts from the
same head as the first time.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.numpy import load_file, save_file
from torch import nn

from fedgex.common.errors import CheckpointError
from fedgex.common.records import load_parameters, parameters

KEPT_ROUNDS = 3
"""Rounds kept on disk: the server asks again for at most the last one."""


def save_head(
    head: Mapping[str, nn.Module], state_dir: Path, phase: str, number: int
) -> None:
    """Keep a local head as of the end of a round; does nothing for an empty mapping."""
    if not head:
        return
    state_dir.mkdir(parents=True, exist_ok=True)
    path = _path(state_dir, phase, number)
    partial = path.with_suffix(".partial")
    save_file(parameters(head), partial)
    os.replace(partial, path)
    _path(state_dir, phase, number - KEPT_ROUNDS).unlink(missing_ok=True)


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
