"""A small model and samples for it, and a call of `fedgex-site predict`."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from typer.testing import CliRunner, Result

from fedgex.client.cli import app
from fedgex.client.policy import TEMPLATE
from fedgex.common.data.moments import Standardisation
from fedgex.common.data.vocabulary import Vocabulary
from fedgex.common.models import checkpoint, tasks
from fedgex.common.models.checkpoint import Checkpoint
from fedgex.common.study import Study

GENES = ("AAA1", "BBB2", "CCC3", "DDD4", "EEE5", "FFF6")
TYPES = ("BRCA", "KIRC")
NOTICE = "Research use only; not a medical device."
SHEET = """\
sample,CCC3,ALIEN,AAA1,FFF6,BBB2
007,3.10,1.5,0.30000000000000004,5.0,NA
S2,,2.50,7.25,6.125,4.0
S1,2.2,,6.5,4.4,3.3
"""


def model(
    folder: Path,
    n_done: int = 3,
    genes: tuple[str, ...] = GENES,
    study: dict[str, Any] | None = None,
    **survival: Any,
) -> Checkpoint:
    """Save a checkpoint with `n_done` of three phases trained; chance is its training.

    Six or more genes, on log2(x + 1); the survival phase takes changes.
    """
    values = {
        "name": "test",
        "pretraining": {"rounds": 1},
        "classification": {"rounds": 1, "classes": TYPES},
        "survival": {"rounds": 1, "cancer_types": TYPES} | survival,
    }
    made_for = Study.read(values | (study or {}), "test")
    whole = tasks.initial(made_for, len(genes))
    for phase in list(made_for.phases)[:n_done]:
        whole = tasks.begin(made_for, phase, whole)
    rng = np.random.default_rng(0)
    made = Checkpoint(
        study=made_for,
        vocabulary=Vocabulary(genes),
        standardisation=Standardisation(
            mean=np.full(len(genes), 4.0), sd=np.full(len(genes), 1.5)
        ),
        phase=list(made_for.phases)[n_done - 1],
        round=1,
        parameters={
            name: whole[name] + rng.normal(0, 0.1, whole[name].shape).astype("f4")
            for name in sorted(whole)
        },
        trained_on={"patients": 99, "sites": ["north", "south"]},
    )
    checkpoint.save(made, folder)
    return made


def sheet(folder: Path, text: str = SHEET) -> Path:
    path = folder / "in.csv"
    path.write_text(text)
    return path


def as_frame() -> pd.DataFrame:
    """Return SHEET as numbers."""
    file = StringIO(SHEET)
    frame = pd.read_csv(file, dtype={"sample": str}, float_precision="round_trip")
    return frame.set_index("sample")


def predict(task: str, folder: Path, *more: object, **options: object) -> Result:
    """Run a command on folder/in.csv with the model folder/model to folder/out.csv."""
    names = {"model": "model", "input": "in.csv", "output": "out.csv"}
    options = {name: folder / file for name, file in names.items()} | options
    arguments = [
        str(x) for name, value in options.items() for x in (f"--{name}", value)
    ]
    return CliRunner().invoke(app, ["predict", task, *arguments, *map(str, more)])


def table(path: Path) -> pd.DataFrame:
    """Read an output as text, empty cells too."""
    return pd.read_csv(path, dtype=str, keep_default_na=False).set_index("sample")


def card(folder: Path, name: str = "out.csv") -> Any:
    return json.loads((folder / f"{name}.card.json").read_text())


def write_site(folder: Path) -> Path:
    path = folder / "site.toml"
    path.write_text(
        'name = "north"\n'
        '[data]\nexpression = "none.csv"\nscale = "log10p1"\n'
        '[data.columns]\npatient = "case"\ncancer_type = "tumour"\nevent = "dead"\n'
    )
    path.with_name("policy.toml").write_text(TEMPLATE)
    return path
