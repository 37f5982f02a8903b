"""The gene panel of a site at the start of its run, stored between rounds."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

from fedgex.common import parsing
from fedgex.common.data.genes import retired_symbols
from fedgex.common.system import files

PANEL = "panel.json"
"""File of the panel."""


@dataclass(frozen=True)
class Panel:
    """Genes and scale of a site's data, and the genes that the site reported."""

    scale: str
    genes: tuple[str, ...]
    reported: tuple[str, ...]
    """Genes observed in enough patients."""
    run: str
    """Name of the run; empty in a simulation, which has none."""

    def holds(self, scale: str, genes: Collection[str]) -> bool:
        """Return whether the data still match the panel, whatever genes are called.

        Unreported genes may disappear: their last patient may have opted out.
        """
        reported, now, before = map(_current, (self.reported, genes, self.genes))
        return scale == self.scale and reported <= now <= before


def remember_panel(state_dir: Path, panel: Panel) -> None:
    """Store the panel of a run that begins.

    Raises
    ------
    FedgexError
        If it cannot be written; then the previous panel stays.
    """
    path = state_dir / PANEL
    with files.explained(path):
        state_dir.mkdir(parents=True, exist_ok=True)
    content = asdict(panel)
    content["told"] = content.pop("reported")  # its name since the first release
    files.write_atomic(path, json.dumps(content).encode())


def read_panel(state_dir: Path) -> Panel | None:
    """Return the stored panel, None before the first run."""
    path = state_dir / PANEL
    if not path.exists():
        return None
    kept = files.read_json(path, "the panel", most=parsing.LONG_BYTES)
    return Panel(kept["scale"], tuple(kept["genes"]), tuple(kept["told"]), kept["run"])


def _current(genes: Collection[str]) -> set[str]:
    retired = retired_symbols(genes)
    return {retired.get(gene, gene) for gene in genes}
