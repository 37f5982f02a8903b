"""The panel of genes that a site measured when its run began, kept between rounds."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

from fedgex.common.system import files

PANEL = "panel.json"
"""File with the panel that a run began with."""


@dataclass(frozen=True)
class Panel:
    """Genes and scale of a site's data, and the genes that the site reported."""

    scale: str
    genes: tuple[str, ...]
    reported: tuple[str, ...]
    """Those of enough patients."""
    run: str
    """Name of the run; empty in a simulation, which has none."""

    def holds(self, scale: str, genes: Collection[str]) -> bool:
        """Return whether the data still are what the site reported.

        A gene of few patients may go: its last one may have opted out.
        """
        return scale == self.scale and set(self.reported) <= set(genes) <= set(
            self.genes
        )


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
    content = asdict(panel)
    content["told"] = content.pop("reported")  # its name since the first release
    files.write_atomic(path, json.dumps(content).encode())


def read_panel(state_dir: Path) -> Panel | None:
    """Return what was measured when the run began; None if it has not."""
    path = state_dir / PANEL
    if not path.exists():
        return None
    kept = json.loads(path.read_text())
    return Panel(kept["scale"], tuple(kept["genes"]), tuple(kept["told"]), kept["run"])
