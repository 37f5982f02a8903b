"""Checkpoints: safetensors plus a JSON manifest, written completely or not at all.

The format stands in docs/checkpoint.md. A checkpoint is a folder:

    model.safetensors    parameters, and mean and sd of each gene
    server.safetensors   what the server's optimiser remembers (absent if nothing)
    receipt.json         signed record of the round that made it (absent if none)
    manifest.json        what, from which study, how good; SHA-256 of the other files
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import compress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fedgex.common import parsing
from fedgex.common.constants import deciding
from fedgex.common.data.moments import Standardisation
from fedgex.common.data.vocabulary import Vocabulary
from fedgex.common.errors import CheckpointError, ConfigError
from fedgex.common.settings import Digest, Settings
from fedgex.common.study import Study
from fedgex.common.system import failpoints, files

FORMAT = 1
MEAN, SD = "standardisation.mean", "standardisation.sd"
PACKAGES = ("fedgex", "flwr", "numpy", "torch")
CARD = (
    "Research use only; not a medical device. Restored values and risks are estimates "
    "of a statistical model, not measurements."
)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model at one point of its study."""

    study: Study
    vocabulary: Vocabulary
    standardisation: Standardisation
    phase: str
    """Phase that the last round belongs to."""
    round: int
    """Last round of the phase that went into the parameters; 0 before the first."""
    parameters: Mapping[str, NDArray[np.float32]]
    """Parameters of backbone and heads by name."""
    server: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)
    """State of the server's optimiser."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """What was measured in the last round, as in the journal."""
    trained_on: Mapping[str, Any] = field(default_factory=dict)
    """Sites that contributed to the model, and their number of patients (None if a site
    withholds it), for the model card; see `with_contributors`."""
    receipt: str | None = None
    """JSON text of the signed receipt in the checkpoint's folder."""

    def __post_init__(self) -> None:
        """Refuse statistics of other genes than the vocabulary's."""
        n_genes, n_known = len(self.vocabulary), len(self.standardisation.mean)
        if n_genes != n_known:
            raise CheckpointError(
                f"a model of {n_genes} genes has mean and SD of {n_known}; expected "
                "one list of genes."
            )

    @property
    def unknown_genes(self) -> tuple[str, ...]:
        """Genes of the vocabulary of which no site had a value."""
        known = self.standardisation.known
        return tuple(compress(self.vocabulary.genes, ~known))

    def with_contributors(self, patients: Mapping[str, int | None]) -> Checkpoint:
        """Return the model with more sites, and their patients, on its card.

        A site counts once, with the number that it reported when it first contributed.
        """
        so_far = {"sites": [], "patients": 0, **self.trained_on}
        new = {n: count for n, count in patients.items() if n not in so_far["sites"]}
        counts = [so_far["patients"], *new.values()]
        trained_on = {
            "sites": sorted([*so_far["sites"], *new]),
            "patients": None if None in counts else sum(counts),
        }
        return dataclasses.replace(self, trained_on=trained_on)

    @property
    def unlike_from(self) -> float | None:
        """Unlikeness above which a sample is none of the training's kinds.

        From the hold-out; None where nothing is known, as in earlier checkpoints.
        """
        found: float | None = self.metrics.get("unlike_from")
        return found

    @property
    def card(self) -> dict[str, Any]:
        """What every prediction carries: use, origin, hashes."""
        return {
            "use": CARD,
            "study": self.study.name,
            "study_hash": self.study.hash,
            "vocabulary_hash": self.vocabulary.hash,
            "phase": self.phase,
            "round": self.round,
            "scale": self.study.scale.value,
            "trained_on": dict(self.trained_on),
            "unknown_genes": list(self.unknown_genes),
        }


class Manifest(Settings):
    """What is read of `manifest.json`."""

    model_config = ConfigDict(extra="ignore")

    study: dict[str, Any]
    vocabulary: tuple[str, ...]
    phase: str
    round: int = Field(ge=0)
    metrics: dict[str, Any]
    trained_on: dict[str, Any]
    constants: dict[str, float] = Field(default_factory=deciding)
    """See `constants`; 0.1.0, which wrote none, had those of now."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Packages that made the checkpoint."""
    files: dict[
        Literal["model.safetensors", "server.safetensors", "receipt.json"], Digest
    ]
    """SHA-256 of each other file."""


def save(checkpoint: Checkpoint, folder: Path, receipt: str | None = None) -> None:
    """Write a checkpoint so that `folder` either holds all of it or does not exist.

    Parameters
    ----------
    receipt
        JSON text of the signed receipt of the round that made these parameters; it
        appears in the same rename as they do. `checkpoint.receipt`, which may be that
        of the round before, is not written.

    Raises
    ------
    CheckpointError
        If the folder exists already, or cannot be written; then it may be tried again.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} exists already; a checkpoint is written once.")
    partial = folder.with_name(f".{folder.name}.partial")
    with files.explained(folder, CheckpointError):
        try:
            _write(checkpoint, receipt, partial)
            failpoints.reach("checkpoint.written")
            partial.rename(folder)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        failpoints.reach("checkpoint.renamed")
        files.sync(folder.parent)
        failpoints.reach("checkpoint.synced")


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint and verify every file against the manifest.

    Raises
    ------
    CheckpointError
        If a file is missing or differs from its hash, the format is unknown, or the
        model was made with other constants.
    """
    manifest = read_manifest(folder)
    _refuse_other_constants(folder, manifest)
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file() or digest(path) != expected:
            raise CheckpointError(
                f"{path} is missing or differs from its SHA-256 in manifest.json; "
                "fetch the checkpoint again."
            )
    server, receipt = folder / "server.safetensors", folder / "receipt.json"
    try:
        tensors = load_file(folder / "model.safetensors")
        mean, sd = tensors.pop(MEAN), tensors.pop(SD)
        return Checkpoint(
            study=Study.read(manifest.study, str(folder / "manifest.json")),
            vocabulary=Vocabulary(manifest.vocabulary),
            standardisation=Standardisation(mean=mean, sd=sd),
            phase=manifest.phase,
            round=manifest.round,
            parameters=tensors,
            server=load_file(server) if server.name in manifest.files else {},
            metrics=manifest.metrics,
            trained_on=manifest.trained_on,
            receipt=receipt.read_text(encoding="utf-8")
            if receipt.name in manifest.files
            else None,
        )
    except Exception as error:  # another party may have made it
        raise CheckpointError(
            f"{folder} cannot be read ({error!s:.300}); expected a checkpoint that "
            "fedgex wrote. Fetch it again."
        ) from error


def _refuse_other_constants(folder: Path, manifest: Manifest) -> None:
    ours, theirs = deciding(), manifest.constants
    if differing := sorted(
        name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)
    ):
        raise CheckpointError(
            f"{folder} was made with other numbers than this fedgex predicts with "
            f"({', '.join(differing)}), so that it would predict otherwise. Use it "
            f"with fedgex {manifest.versions.get('fedgex', 'of its time')}."
        )


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint; its files are not verified.

    Raises
    ------
    CheckpointError
        If there is none, it cannot be read, or its format is unknown.
    """
    expected = "a checkpoint's manifest.json"
    content = parsing.read_bytes(
        folder / "manifest.json",
        expected,
        error=CheckpointError,
        most=parsing.LONG_BYTES,
    )
    manifest = parsing.json_object(
        content,
        f"{folder}/manifest.json",
        expected,
        error=CheckpointError,
        most=parsing.LONG_BYTES,
    )
    if (found := manifest.get("format")) != FORMAT:
        raise CheckpointError(
            f"{folder} is of format {found!s:.80}; this fedgex reads {FORMAT}."
        )
    try:
        return Manifest.read(manifest, f"{folder}/manifest.json")
    except ConfigError as error:
        raise CheckpointError(f"{error}\nFetch the checkpoint again.") from error


def latest(folder: Path) -> Path | None:
    """Return the last checkpoint in a run's folder of checkpoints, or None.

    Their names begin with a rising number; partial ones begin with a dot.
    """
    done = sorted(p for p in folder.glob("[0-9]*") if (p / "manifest.json").is_file())
    return done[-1] if done else None


def find(path: Path) -> Path:
    """Return the checkpoint that `path` is, or the last one of the run that it is.

    A run is the folder with `checkpoints`, or the one above it, where `fedgex-sim`
    writes the run as `run`.

    Raises
    ------
    CheckpointError
        If there is none.
    """
    if (path / "manifest.json").is_file():
        return path
    for run in (path, path / "run"):
        found = latest(run / "checkpoints")
        if found is not None:
            return found
    raise CheckpointError(
        f"{path} is neither a checkpoint (no manifest.json) nor a run (no "
        "checkpoints/); name the folder that `fedgex-sim run --out` wrote."
    )


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(checkpoint: Checkpoint, receipt: str | None, partial: Path) -> None:
    """Write all files of a checkpoint into a new folder, onto the disk."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors: dict[str, NDArray[np.generic]] = dict(checkpoint.parameters)
    tensors[MEAN] = checkpoint.standardisation.mean
    tensors[SD] = checkpoint.standardisation.sd
    _save_tensors(tensors, partial / "model.safetensors")
    if checkpoint.server:
        _save_tensors(checkpoint.server, partial / "server.safetensors")
    if receipt is not None:
        (partial / "receipt.json").write_text(receipt, encoding="utf-8")
    manifest = {
        "format": FORMAT,
        "card": checkpoint.card,
        "study": checkpoint.study.model_dump(mode="json"),
        "vocabulary": list(checkpoint.vocabulary.genes),
        "phase": checkpoint.phase,
        "round": checkpoint.round,
        "metrics": checkpoint.metrics,
        "trained_on": checkpoint.trained_on,
        "constants": deciding(),
        "versions": {name: version(name) for name in PACKAGES},
        "files": {path.name: digest(path) for path in sorted(partial.iterdir())},
    }
    text = json.dumps(manifest, indent=1, sort_keys=True)
    (partial / "manifest.json").write_text(text)
    for path in partial.iterdir():
        files.sync(path)
    files.sync(partial)


def _save_tensors(tensors: Mapping[str, Any], path: Path) -> None:
    ordered = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
    try:
        save_file(ordered, path)
    except SafetensorError as error:  # how it reports a full disk, in words
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
