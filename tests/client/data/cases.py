"""A small hospital, and one case of its data for each code."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedgex.client.policy import Policy
from fedgex.client.settings import SiteSettings
from fedgex.common.data.cohort import Cohort
from fedgex.common.data.scales import Scale
from fedgex.common.errors import DataError, Finding
from fedgex.common.ingestion.cohort import read_cohort
from fedgex.common.ingestion.settings import DataSettings

ROOT = Path(__file__).parents[3]
GENES = ("TP53", "MYC", "EGFR", "ACTB", "KRAS", "VIM")
PATIENTS = [f"PAT-{i:03d}" for i in range(1, 21)]
FLOOR = 10


def expression() -> pd.DataFrame:
    """Return 20 patients x 6 genes on log2(x + 1), one decimal."""
    values = np.random.default_rng(0).normal(8, 1, (20, 6)).round(1)
    index = pd.Index(PATIENTS, name="patient")
    return pd.DataFrame(values, index=index, columns=list(GENES)).astype(object)


def clinical() -> pd.DataFrame:
    """Return 20 patients, of whom 19 had the event."""
    return pd.DataFrame(
        {
            "patient": PATIENTS,
            "duration": [100 * i for i in range(1, 21)],
            "event": [1] * 19 + [0],
            "age": [40 + i for i in range(20)],
            "sex": ["male", "F"] * 10,
            "cancer_type": ["BRCA"] * 20,
        }
    ).astype(object)


def load(
    folder: Path,
    sheet: pd.DataFrame,
    table: pd.DataFrame | None = None,
    *,
    target: Scale = Scale.LOG2P1,
    tasks: tuple[str, ...] = ("pretraining",),
    **data: Any,
) -> tuple[Cohort, tuple[Finding, ...]]:
    """Write the files as CSV and read them through the door."""
    data = {"scale": Scale.LOG2P1, "expression": folder / "e.csv", **data}
    if data["expression"].suffix == ".csv":
        sheet.to_csv(data["expression"])
    if table is not None:
        data["clinical"] = folder / "c.csv"
        table.to_csv(data["clinical"], index=False)
    settings = SiteSettings(
        name="north",
        policy=Policy.proposed(minimum_cohort=FLOOR),
        data=DataSettings(**data),
    )
    return read_cohort(settings.data, settings.policy.minimum_cohort, target, tasks)


def reported(*args: Any, **kwargs: Any) -> dict[str, Finding]:
    """Return all findings by code, whether the data are refused or not."""
    try:
        _, findings = load(*args, **kwargs)
    except DataError as error:
        findings = error.findings
    by_code = {finding.code: finding for finding in findings}
    assert len(by_code) == len(findings), "a code was told twice"
    return by_code


def opt_outs(folder: Path, *identifiers: str) -> Path:
    path = folder / "opt-outs.txt"
    path.write_text("\n".join(identifiers), encoding="utf-8")
    return path


HGNC = """\
hgnc_id\tsymbol\tname\tstatus\talias_symbol\tprev_symbol\tensembl_gene_id
1\tTP53\t.\tApproved\tp53\t\tENSG00000141510
2\tMYC\t.\tApproved\tbHLHe39\t\tENSG00000136997
3\tEGFR\t.\tApproved\tTWIN\tERBB\tENSG00000146648
4\tACTB\t.\tApproved\tTWIN\t\tENSG00000075624
5\tKRAS\t.\tApproved\t\tKRAS2\tENSG00000133703
"""


Case = tuple[pd.DataFrame, pd.DataFrame | None, dict[str, Any]]


def cell(row: int, column: int | str, value: Any, table: bool = False) -> Case:
    sheet, follow_up = expression(), clinical()
    if table:
        follow_up.loc[row, column] = value
    else:
        sheet.iloc[row, int(column)] = value
    return sheet, follow_up, {}


def filled(value: Any, **data: Any) -> Case:
    return pd.DataFrame(value, expression().index, expression().columns), None, data


def spread(factor: float, **data: Any) -> Case:
    sheet = expression().astype(float).mul(factor)
    return sheet, None, data


def wide(mean: float, **data: Any) -> Case:
    rng = np.random.default_rng(0)
    names = [*GENES, *(f"G{i}X" for i in range(150))]
    values = rng.normal(mean, 0.1, (20, 156))
    return (
        pd.DataFrame(values, PATIENTS, names),
        None,
        {"unknown_genes": "keep", **data},
    )


def with_hgnc(folder: Path) -> Case:
    (folder / "hgnc.txt").write_text(HGNC)
    sheet = expression().rename(columns={"EGFR": "TWIN", "KRAS": "KRAS2"})
    return sheet, clinical(), {"hgnc_table": folder / "hgnc.txt"}


def twice(label: str, shift: float, table: Path | None = None) -> Case:
    sheet = expression()
    extra = (sheet["TP53"].astype(float) + shift).rename(label)
    data = {} if table is None else {"hgnc_table": table}
    return pd.concat([sheet, extra], axis=1), clinical(), data


def barcodes(kind: str) -> Case:
    names = [f"TCGA-AA-{i:04d}" for i in range(20)]
    samples = [f"{name}-{kind}" for name in names]
    table = clinical().assign(patient=names, sample=samples)
    return expression().set_axis(samples), table, {}


PERSONS = [*(f"P{i:03d}" for i in range(19)), "P000.1"]
S = Scale
CASES: dict[str, Case | Any] = {
    "FX-DATA-006": cell(2, 1, "1,5"),
    "FX-DATA-010": (expression(), clinical(), {}),
    "FX-DATA-011": (expression().set_axis(list("abcdef"), axis=1), None, {}),
    "FX-DATA-012": (expression(), None, {"orientation": "genes-by-samples"}),
    "FX-DATA-020": (expression(), clinical().drop(columns="patient"), {}),
    "FX-DATA-021": (
        expression(),
        pd.concat([clinical(), clinical()["age"]], axis=1),
        {},
    ),
    "FX-DATA-022": cell(4, "patient", "", table=True),
    "FX-DATA-023": (pd.concat([expression(), expression()[:1]]), clinical(), {}),
    "FX-DATA-024": (expression(), pd.concat([clinical(), clinical()[:1]]), {}),
    "FX-DATA-025": (expression(), clinical().assign(patient=range(20)), {}),
    "FX-DATA-026": (expression(), clinical()[1:], {}),
    "FX-DATA-027": (expression()[1:], clinical(), {}),
    "FX-DATA-030": cell(2, 1, "low"),
    "FX-DATA-031": cell(2, 1, "inf"),
    "FX-DATA-032": cell(2, 1, -0.5),
    "FX-DATA-033": spread(10.0),
    "FX-DATA-034": wide(3.0),
    "FX-DATA-035": spread(1.0, scale=S.LOG2P1, target=S.RELATIVE),
    "FX-DATA-041": (expression().rename(columns={"VIM": "8675309"}), None, {}),
    "FX-DATA-015": (expression().rename(columns={"VIM": "2-Sep"}), None, {}),
    "FX-DATA-049": (expression().add_prefix("X"), clinical(), {}),
    "FX-DATA-042": with_hgnc,
    "FX-DATA-043": with_hgnc,
    "FX-DATA-044": twice("TP53", 0.0),
    "FX-DATA-045": twice("TP53", 0.5),
    "FX-DATA-046": (expression().assign(VIM=""), clinical(), {}),
    "FX-DATA-047": (expression().assign(VIM=0), clinical(), {}),
    "FX-DATA-048": (
        expression().assign(VIM=[""] * 11 + [*range(9)]),
        clinical(),
        {},
    ),
    "FX-DATA-060": cell(2, "event", 2, table=True),
    "FX-DATA-061": cell(2, "duration", -3, table=True),
    "FX-DATA-062": (expression(), clinical(), {"time_unit": "years"}),
    "FX-DATA-063": cell(2, "duration", 0, table=True),
    "FX-DATA-064": cell(2, "event", "", table=True),
    "FX-DATA-067": cell(2, "event", "1:DECEASED", table=True),
    "FX-DATA-068": (expression(), clinical().assign(event=1), {}),
    "FX-DATA-077": (
        expression(),
        clinical().rename(columns={"event": "censor"}),
        {"columns": {"event": "censor"}},
    ),
    "FX-DATA-078": (
        expression(),
        clinical().drop(columns="age"),
        {"tasks": ("survival",)},
    ),
    "FX-DATA-079": (
        expression(),
        clinical().drop(columns="duration").assign(a="2015-01-01", b="1/2/16"),
        {"columns": {"diagnosis_date": "a", "last_contact_date": "b"}},
    ),
    "FX-DATA-069": (expression(), clinical().assign(duration=range(1, 21)), {}),
    "FX-DATA-080": (expression(), clinical().assign(duration=range(41000, 41020)), {}),
    "FX-DATA-081": cell(2, "age", "90+", table=True),
    "FX-DATA-082": barcodes("11A"),
    "FX-DATA-083": (expression().set_axis(PERSONS), None, {}),
    "FX-DATA-084": (expression().T.assign(Entrez_Gene_Id=7157), None, {}),
    "FX-DATA-085": (
        expression().T.iloc[:, :3].set_axis(["length", "TPM", "FPKM"], axis=1),
        None,
        {},
    ),
    "FX-DATA-008": cell(2, "duration", "1,234", table=True),
    "FX-DATA-065": cell(2, "age", 1961, table=True),
    "FX-DATA-066": cell(2, "sex", "woman", table=True),
    "FX-DATA-070": (expression()[:9], clinical()[:9], {}),
    "FX-DATA-071": (
        expression(),
        clinical().assign(event=[1] * 9 + [0] * 11),
        {"tasks": ("survival",)},
    ),
    "FX-DATA-072": (
        expression(),
        clinical().drop(columns="event"),
        {"tasks": ("survival",)},
    ),
    "FX-DATA-073": lambda folder: (
        expression(),
        clinical(),
        {"opt_outs": opt_outs(folder, "PAT-003")},
    ),
    "FX-DATA-075": (expression().rename({"PAT-003": "pat-002"}), None, {}),
    "FX-DATA-076": lambda folder: (
        expression(),
        clinical(),
        {"opt_outs": opt_outs(folder, "nobody")},
    ),
}
ELSEWHERE = {f"FX-DATA-0{i}" for i in (28, 29, 36, 37, 40, 50, 51, 74)}
FROM_FILES = (*range(1, 6), 7, 9, 13, 14, 16, 17, 18, 19, 52, 53, 54, 86)
IN_SOURCES = {f"FX-DATA-{i:03d}" for i in FROM_FILES}


def reported_at_all(*args: Any, **kwargs: Any) -> tuple[Finding, ...]:
    try:
        return load(*args, **kwargs)[1]
    except DataError as error:
        return error.findings
