"""`fedgex-site predict`: files in, files out, exit codes, and what goes where."""

import gzip
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from cryptography import x509
from typer.testing import CliRunner, Result

from fedgex.client import inference
from fedgex.client.cli import app
from fedgex.client.policy import TEMPLATE
from fedgex.common import checkpoint, pki, tasks
from fedgex.common.checkpoint import Checkpoint
from fedgex.common.scale import Scale
from fedgex.common.statistics import Standardisation
from fedgex.common.study import Study
from fedgex.common.uncertainty import restore_with_spread
from fedgex.common.vocabulary import Vocabulary

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


# ---- impute ----


def test_measured_cells_stay_the_same_number_and_all_others_are_filled(
    tmp_path: Path,
) -> None:
    trained = model(tmp_path / "model")
    sheet(tmp_path)

    result = predict("impute", tmp_path)

    assert result.exit_code == 0, result.output
    out = table(tmp_path / "out.csv")
    assert list(out.index) == ["007", "S2", "S1"]
    assert list(out.columns) == [
        *("CCC3", "ALIEN", "AAA1", "FFF6", "BBB2"),
        *("DDD4", "EEE5"),
    ]
    given = as_frame()
    for sample, row in given.iterrows():
        for gene, value in row.dropna().items():
            assert float(out.loc[str(sample), str(gene)]) == value
    truth = inference.impute(trained, given)
    for sample, gene in (("007", "BBB2"), ("S2", "CCC3"), ("S1", "EEE5")):
        assert float(out.loc[sample, gene]) == pytest.approx(truth.loc[sample, gene])
    assert out.loc["S1", "ALIEN"] == ""  # no gene of the model, so not restored
    assert (out == "").sum().sum() == 1


def test_the_notice_goes_to_stderr_and_nothing_to_stdout(tmp_path: Path) -> None:
    model(tmp_path / "model")
    sheet(tmp_path)

    result = predict("impute", tmp_path)

    assert result.stdout == ""
    assert result.stderr.splitlines()[-1] == NOTICE


def test_genes_by_samples_give_the_same_table(tmp_path: Path) -> None:
    model(tmp_path / "model")
    sheet(tmp_path)
    predict("impute", tmp_path)
    turned = pd.read_csv(sheet(tmp_path), dtype=str, keep_default_na=False).T
    turned.to_csv(tmp_path / "turned.csv", header=False)

    result = predict(
        "impute", tmp_path, input=tmp_path / "turned.csv", output=tmp_path / "t.csv"
    )

    assert result.exit_code == 0, result.output
    assert (tmp_path / "t.csv").read_text() == (tmp_path / "out.csv").read_text()


def test_an_axis_declared_against_the_genes_is_refused(tmp_path: Path) -> None:
    model(tmp_path / "model")
    sheet(tmp_path)

    result = predict("impute", tmp_path, "--orientation", "genes-by-samples")

    assert result.exit_code == 1
    assert "FX-PREDICT-001 error" in result.stderr


@pytest.mark.parametrize("as_file", [False, True])
def test_genes_asked_for_are_restored_and_no_others(
    tmp_path: Path, as_file: bool
) -> None:
    model(tmp_path / "model")
    sheet(tmp_path)
    asked = "BBB2,DDD4"
    if as_file:
        (tmp_path / "genes.txt").write_text("BBB2\nDDD4\n")
        asked = str(tmp_path / "genes.txt")

    result = predict("impute", tmp_path, genes=asked)

    assert result.exit_code == 0, result.output
    out = table(tmp_path / "out.csv")
    assert list(out.columns[5:]) == ["DDD4"]
    assert out.loc["007", "BBB2"] != ""
    assert out.loc["S2", "CCC3"] == ""
    assert card(tmp_path)["prediction"]["cells_restored"] == 4


def test_a_long_list_of_genes_is_no_file_name(tmp_path: Path) -> None:
    genes = tuple(f"GENE{i:04d}" for i in range(200))
    model(tmp_path / "model", genes=genes)
    sheet(tmp_path, "sample,GENE0000\nS1,1.5\n")

    result = predict("impute", tmp_path, genes=",".join(genes))

    assert result.exit_code == 0, result.output


def test_natural_logarithms_are_written_back_as_such(tmp_path: Path) -> None:
    trained = model(tmp_path / "model")
    sheet(tmp_path)

    result = predict("impute", tmp_path, scale="ln1p")

    assert result.exit_code == 0, result.output
    out = table(tmp_path / "out.csv")
    log2 = inference.impute(trained, as_frame() / np.log(2))
    assert float(out.loc["007", "CCC3"]) == 3.1
    for sample, gene in (("007", "BBB2"), ("S2", "CCC3"), ("S1", "EEE5")):
        by_hand = log2.loc[sample, gene] * np.log(2)
        assert float(out.loc[sample, gene]) == pytest.approx(by_hand, rel=1e-4)
    assert card(tmp_path)["prediction"]["scale_of_input"] == "ln1p"
    assert card(tmp_path)["prediction"]["scale_converted"] is True


def test_what_was_restored_once_is_complete(tmp_path: Path) -> None:
    model(tmp_path / "model")
    sheet(tmp_path, SHEET.replace(",ALIEN", ",BAK1"))
    predict("impute", tmp_path)

    result = predict(
        "impute",
        tmp_path,
        input=tmp_path / "out.csv",
        output=tmp_path / "again.csv",
    )

    assert result.exit_code == 0, result.output
    assert (tmp_path / "again.csv").read_text() == (tmp_path / "out.csv").read_text()
    assert card(tmp_path, "again.csv")["prediction"]["cells_restored"] == 0


def test_ensembl_ids_become_the_models_symbols_with_a_table(tmp_path: Path) -> None:
    model(tmp_path / "model")
    (tmp_path / "hgnc.tsv").write_text(
        "symbol\tstatus\talias_symbol\tprev_symbol\tensembl_gene_id\n"
        "AAA1\tApproved\t\t\tENSG00000000001\n"
        "BBB2\tApproved\t\tOLDB\tENSG00000000002\n"
        "OUT9\tApproved\t\t\tENSG00000000009\n"
    )
    sheet(
        tmp_path,
        "sample,ENSG00000000001.4,OLDB,ENSG00000000009\nS1,1.5,,2.5\nS2,3.5,4.5,5.5\n",
    )

    result = predict("impute", tmp_path, "--hgnc-table", tmp_path / "hgnc.tsv")

    assert result.exit_code == 0, result.output
    out = table(tmp_path / "out.csv")
    assert list(out.columns[:3]) == ["AAA1", "BBB2", "ENSG00000000009"]
    assert sorted([*out.columns[:2], *out.columns[3:]]) == list(GENES)
    assert list(card(tmp_path)["prediction"]["inputs"]) == ["expression", "hgnc_table"]


def test_equal_columns_are_kept_once_and_contradictory_ones_refused(
    tmp_path: Path,
) -> None:
    model(tmp_path / "model")
    sheet(tmp_path, "sample,AAA1,AAA1,BBB2\nS1,1.5,1.5,2.5\nS2,3.5,3.5,4.5\n")

    equal = predict("impute", tmp_path)
    sheet(tmp_path, "sample,AAA1,AAA1,BBB2\nS1,1.5,1.6,2.5\nS2,3.5,3.5,4.5\n")
    differing = predict("impute", tmp_path, "--force")

    assert equal.exit_code == 0, equal.output
    assert list(table(tmp_path / "out.csv").columns[:2]) == ["AAA1", "BBB2"]
    assert differing.exit_code == 1
    assert "FX-PREDICT-004 error: in.csv: 1 columns repeat" in differing.stderr


@pytest.mark.parametrize("name", ["o.csv", "o.tsv", "o.csv.gz", "o.tsv.gz"])
def test_text_is_written_as_its_ending_says(tmp_path: Path, name: str) -> None:
    model(tmp_path / "model")
    sheet(tmp_path)

    result = predict("impute", tmp_path, output=tmp_path / name)

    assert result.exit_code == 0, result.output
    raw = (tmp_path / name).read_bytes()
    text = (gzip.decompress(raw) if name.endswith(".gz") else raw).decode()
    delimiter = "\t" if ".tsv" in name else ","
    assert text.startswith(delimiter.join(["sample", "CCC3", "ALIEN"]))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("in.csv", "model", name, f"{name}.card.json")
    ]


def test_float32_goes_through_parquet_bit_for_bit(tmp_path: Path) -> None:
    model(tmp_path / "model")
    frame = as_frame().astype(np.float32)
    frame.to_parquet(tmp_path / "in.parquet")

    result = predict(
        "impute", tmp_path, input=tmp_path / "in.parquet", output=tmp_path / "o.parquet"
    )

    assert result.exit_code == 0, result.output
    out = pd.read_parquet(tmp_path / "o.parquet").set_index("sample")
    assert (out.dtypes == np.float32).all()
    known = frame.notna().to_numpy()
    assert (out[frame.columns].to_numpy()[known] == frame.to_numpy()[known]).all()


def test_anndata_is_read(tmp_path: Path) -> None:
    trained = model(tmp_path / "model")
    frame = as_frame()
    data = anndata.AnnData(
        frame.to_numpy(np.float32),
        obs=pd.DataFrame({"cancer_type": TYPES[0]}, index=frame.index),
        var=pd.DataFrame(index=frame.columns),
    )
    data.write_h5ad(tmp_path / "in.h5ad")

    result = predict("risk", tmp_path, input=tmp_path / "in.h5ad")

    assert result.exit_code == 0, result.output
    truth = inference.risk(trained, frame, frame.assign(cancer_type=TYPES[0]))
    out = table(tmp_path / "out.csv").astype(float)
    assert out.to_numpy() == pytest.approx(truth.to_numpy(), abs=1e-4)


# ---- spread ----


def test_each_restored_value_has_a_spread_and_no_other(tmp_path: Path) -> None:
    linear = {"cross_products": True, "linear_rank": 2}
    trained = model(tmp_path / "model", study=linear)
    sheet(tmp_path)

    assert predict("impute", tmp_path).exit_code == 0
    result = predict("spread", tmp_path, output=tmp_path / "spread.csv")

    assert result.exit_code == 0, result.output
    assert card(tmp_path, "spread.csv")["prediction"]["samples"] == 3
    out = table(tmp_path / "spread.csv")
    assert list(out.columns) == list(GENES)
    given = as_frame().reindex(columns=GENES)
    assert ((out == "").to_numpy() == given.notna().to_numpy()).all()
    standardised = torch.tensor((given.to_numpy() - 4.0) / 1.5, dtype=torch.float32)
    backbone = tasks.load_backbone(trained.study, 6, trained.parameters)
    _, sd = restore_with_spread(backbone, standardised)
    for gene in ("DDD4", "EEE5"):
        expected = 1.5 * sd[:, GENES.index(gene)].numpy()
        assert out[gene].astype(float).to_numpy() == pytest.approx(expected, rel=1e-4)


def test_the_spread_of_genes_asked_for_is_told_alone(tmp_path: Path) -> None:
    model(tmp_path / "model", study={"cross_products": True, "linear_rank": 2})
    sheet(tmp_path)

    assert predict("spread", tmp_path, "--genes", "EEE5,BBB2").exit_code == 0

    assert list(table(tmp_path / "out.csv").columns) == ["BBB2", "EEE5"]


def test_a_model_that_cannot_tell_how_sure_it_is_says_so(tmp_path: Path) -> None:
    model(tmp_path / "model")
    sheet(tmp_path)

    result = predict("spread", tmp_path)

    assert result.exit_code == 1
    assert "linear_rank" in result.stderr
    assert not (tmp_path / "out.csv").exists()


# ---- embed, risk, classify ----


def test_embed_writes_one_vector_a_sample(tmp_path: Path) -> None:
    trained = model(tmp_path / "model")
    sheet(tmp_path)

    result = predict("embed", tmp_path, scale="ln1p")

    assert result.exit_code == 0, result.output
    out = table(tmp_path / "out.csv").astype(float)
    assert list(out.index) == ["007", "S2", "S1"]
    truth = inference.embed(trained, as_frame(), scale=Scale.LN1P)
    assert out.to_numpy() == pytest.approx(truth.to_numpy(), abs=1e-5)


def test_risk_takes_the_cancer_type_of_each_sample(tmp_path: Path) -> None:
    trained = model(tmp_path / "model")
    sheet(tmp_path)
    (tmp_path / "c.csv").write_text("patient,cancer_type\nS1,KIRC\nS2,BRCA\n007,KIRC\n")

    result = predict("risk", tmp_path, clinical=tmp_path / "c.csv")

    assert result.exit_code == 0, result.output
    covariates = pd.DataFrame({"cancer_type": ["KIRC", "BRCA", "KIRC"]})
    truth = inference.risk(trained, as_frame(), covariates.set_axis(as_frame().index))
    out = table(tmp_path / "out.csv").astype(float)
    assert list(out.columns) == list(truth.columns)
    assert out.to_numpy() == pytest.approx(truth.to_numpy(), abs=1e-5)


def test_two_samples_of_a_patient_are_two_rows(tmp_path: Path) -> None:
    model(tmp_path / "model")
    sheet(tmp_path)
    (tmp_path / "c.csv").write_text(
        "patient,sample,cancer_type,duration,event\n"
        "A,S1,KIRC,-4,7\nA,S2,KIRC,-4,7\nB,007,KIRC,-4,7\n"
    )  # follow-up is of no concern here

    result = predict("risk", tmp_path, clinical=tmp_path / "c.csv")

    assert result.exit_code == 0, result.output
    assert (table(tmp_path / "out.csv") != "").all(axis=None)


def test_a_sample_without_a_clinical_row_keeps_an_empty_row(tmp_path: Path) -> None:
    model(tmp_path / "model")
    sheet(tmp_path)
    (tmp_path / "c.csv").write_text("patient,cancer_type\n007,KIRC\nS1,KIRC\n")

    result = predict("risk", tmp_path, clinical=tmp_path / "c.csv")

    assert result.exit_code == 0, result.output
    out = table(tmp_path / "out.csv")
    assert list(out.index) == ["007", "S2", "S1"]
    assert list((out == "").all(axis=1)) == [False, True, False]
    assert "FX-DATA-026 warning" in result.stderr
    assert "S2" not in result.stderr
    warnings = card(tmp_path)["prediction"]["warnings"]
    assert [w for w in warnings if w.startswith("FX-DATA-026 warning")]


def test_one_cancer_type_can_be_named_for_all(tmp_path: Path) -> None:
    model(tmp_path / "model")
    sheet(tmp_path)

    result = predict("risk", tmp_path, "--cancer-type", "KIRC")

    assert result.exit_code == 0, result.output
    assert (table(tmp_path / "out.csv") != "").all(axis=None)


@pytest.mark.parametrize("more", [(), ("--cancer-type", "GBM")])
def test_risk_without_a_cancer_type_of_the_study_is_refused(
    tmp_path: Path, more: tuple[str, ...]
) -> None:
    model(tmp_path / "model")
    sheet(tmp_path)

    result = predict("risk", tmp_path, *more)

    assert result.exit_code == 1
    assert "FX-PREDICT-010 error: cancer_type: 3 of 3 samples" in result.stderr
    assert "expected one of BRCA, KIRC" in result.stderr
    assert not (tmp_path / "out.csv").exists()


def test_classify_writes_probabilities_and_the_most_probable(tmp_path: Path) -> None:
    trained = model(tmp_path / "model")
    sheet(tmp_path)

    result = predict("classify", tmp_path)

    assert result.exit_code == 0, result.output
    out = table(tmp_path / "out.csv")
    truth = inference.classify(trained, as_frame())
    assert list(out["most_probable"]) == list(truth["most_probable"])
    numbers = out.drop(columns="most_probable").astype(float).to_numpy()
    assert numbers.sum(axis=1) == pytest.approx(1)


def test_types_that_are_not_possible_have_no_probability(tmp_path: Path) -> None:
    three = {"rounds": 1, "classes": ("BRCA", "KIRC", "LUAD")}
    model(tmp_path / "model", study={"classification": three})
    sheet(tmp_path)
    assert predict("classify", tmp_path).exit_code == 0
    whole = table(tmp_path / "out.csv").drop(columns="most_probable").astype(float)

    result = predict("classify", tmp_path, "--force", "--among", "BRCA, LUAD")

    assert result.exit_code == 0, result.output
    out = table(tmp_path / "out.csv")
    numbers = out.drop(columns="most_probable").astype(float)
    assert (numbers["probability_KIRC"] == 0).all()
    assert set(out["most_probable"]) <= {"BRCA", "LUAD"}
    two = ["probability_BRCA", "probability_LUAD"]
    expected = whole[two].div(whole[two].sum(axis=1), axis=0)
    assert numbers[two].to_numpy() == pytest.approx(expected.to_numpy(), abs=1e-5)


@pytest.mark.parametrize(
    ("among", "said"),
    [("BRCA,XYZ", "2 .*not known: XYZ"), ("BRCA", "1 cancer types are named")],
)
def test_possible_types_are_two_or_more_of_the_studys(
    tmp_path: Path, among: str, said: str
) -> None:
    model(tmp_path / "model")
    sheet(tmp_path)

    result = predict("classify", tmp_path, "--among", among)

    assert result.exit_code == 1
    assert re.search(said, result.stderr)
    assert "expected two or more of BRCA, KIRC" in result.stderr
    assert not (tmp_path / "out.csv").exists()


def test_counts_are_taken_with_library_sizes(tmp_path: Path) -> None:
    trained = model(tmp_path / "model")
    sheet(tmp_path, "sample,AAA1,BBB2\nS1,10,20\nS2,300,40\n")
    (tmp_path / "c.csv").write_text("patient,library_size\nS1,1000000\nS2,2000000\n")

    result = predict("embed", tmp_path, scale="counts", clinical=tmp_path / "c.csv")

    assert result.exit_code == 0, result.output
    per_million = pd.DataFrame({"AAA1": [10.0, 150.0], "BBB2": [20.0, 20.0]})
    truth = inference.embed(trained, per_million, scale=Scale.LINEAR)
    out = table(tmp_path / "out.csv").astype(float)
    assert out.to_numpy() == pytest.approx(truth.to_numpy(), abs=1e-4)


# ---- refusals ----


@pytest.mark.parametrize("scale", ["counts", "relative"])
@pytest.mark.parametrize("task", ["impute", "embed", "classify"])
def test_scales_that_lead_nowhere_are_refused(
    tmp_path: Path, task: str, scale: str
) -> None:
    model(tmp_path / "model")
    numbers = "10,20\nS2,300,40\n" if scale == "counts" else "-1,0.5\nS2,0.1,-2\n"
    sheet(tmp_path, f"sample,AAA1,BBB2\nS1,{numbers}")

    result = predict(task, tmp_path, scale=scale)

    assert result.exit_code == 1
    assert f"FX-DATA-035 error: in.csv: expression on the {scale} scale" in (
        result.stderr
    )
    assert "--clinical" in result.stderr or scale == "relative"


def test_a_model_not_trained_for_the_task_says_for_what_it_is(tmp_path: Path) -> None:
    model(tmp_path / "model", n_done=2)
    sheet(tmp_path)

    result = predict("risk", tmp_path, "--cancer-type", "KIRC")

    assert result.exit_code == 1
    assert result.stderr == (
        "Error: the model has not been trained for survival, which this prediction "
        "needs. This model has been trained for: pretraining, classification. Choose a "
        "later checkpoint, or a model of another study.\n"
    )


def write_site(folder: Path) -> Path:
    path = folder / "site.toml"
    path.write_text(
        'name = "north"\n'
        '[data]\nexpression = "none.csv"\nscale = "log10p1"\n'
        '[data.columns]\npatient = "case"\ncancer_type = "tumour"\nevent = "dead"\n'
    )
    path.with_name("policy.toml").write_text(TEMPLATE)
    return path


def test_a_hospital_names_its_settings_for_the_names_of_its_columns(
    tmp_path: Path,
) -> None:
    trained = model(tmp_path / "model")
    sheet(tmp_path)
    (tmp_path / "c.csv").write_text("case,tumour\nS1,KIRC\nS2,BRCA\n007,KIRC\n")

    result = predict(
        "risk", tmp_path, clinical=tmp_path / "c.csv", site=write_site(tmp_path)
    )

    assert result.exit_code == 0, result.output
    covariates = pd.DataFrame({"cancer_type": ["KIRC", "BRCA", "KIRC"]})
    truth = inference.risk(
        trained,
        as_frame(),
        covariates.set_axis(as_frame().index),
        scale=Scale.LOG10P1,  # as site.toml declares
    )
    out = table(tmp_path / "out.csv").astype(float)
    assert out.to_numpy() == pytest.approx(truth.to_numpy(), abs=1e-4)


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    model(tmp_path / "model")
    sheet(tmp_path)
    (tmp_path / "out.csv").write_text("mine")

    refused = predict("embed", tmp_path)
    kept = (tmp_path / "out.csv").read_text()
    forced = predict("embed", tmp_path, "--force")

    assert refused.exit_code == 1
    assert "out.csv exist" in refused.stderr
    assert "--force" in refused.stderr
    assert kept == "mine"
    assert forced.exit_code == 0, forced.output
    assert (tmp_path / "out.csv").read_text() != "mine"


def test_not_even_force_writes_over_the_input(tmp_path: Path) -> None:
    model(tmp_path / "model")
    sheet(tmp_path)

    result = predict("impute", tmp_path, "--force", output=tmp_path / "in.csv")

    assert result.exit_code == 1
    assert "is the input too" in result.stderr
    assert (tmp_path / "in.csv").read_text() == SHEET


def test_everything_wrong_is_told_at_once_and_names_no_patient(tmp_path: Path) -> None:
    model(tmp_path / "model", n_done=2)
    sheet(tmp_path, "sample,AAA1,BBB2\nMRN-17,word,12345.678\nMRN-17,3,4\n")
    (tmp_path / "out.csv").touch()

    result = predict("risk", tmp_path, "--cancer-type", "KIRC")

    assert result.exit_code == 1
    assert "exist already" in result.stderr
    assert "not been trained for survival" in result.stderr
    for code in ("FX-DATA-023", "FX-DATA-030", "FX-DATA-033"):
        assert f"{code} error: in.csv" in result.stderr
    for secret in ("MRN", "word", "12345"):
        assert secret not in result.stderr
    assert isinstance(result.exception, SystemExit)  # so no traceback


def test_a_missing_input_and_a_missing_model_are_refused(tmp_path: Path) -> None:
    without_model = predict("embed", tmp_path)
    model(tmp_path / "model")
    without_input = predict("embed", tmp_path)

    assert without_model.exit_code == without_input.exit_code == 1
    assert "neither a checkpoint" in without_model.stderr
    assert "FX-DATA-001 error" in without_input.stderr
    assert "Correct the path." in without_input.stderr


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    model(tmp_path / "model")
    sheet(tmp_path)

    result = predict("embed", tmp_path, output=tmp_path / "absent" / "out.csv")

    assert result.exit_code == 1
    assert "cannot be written (No such file or directory)" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("embed",),
        ("embed", "--model", "m", "--input", "i.csv", "--output", "o.xlsx"),
        ("embed", "--model", "m", "--input", "i", "--output", "o.csv", "--scale", "x"),
        ("guess",),
    ],
)
def test_a_wrong_call_exits_with_two(arguments: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, ["predict", *arguments])

    assert result.exit_code == 2


# ---- model and card ----


@pytest.mark.parametrize("place", ["checkpoints/00001-a", "run/checkpoints/00001-a"])
def test_a_runs_folder_stands_for_its_last_checkpoint(
    tmp_path: Path, place: str
) -> None:
    model(tmp_path / "out" / Path(place).parent / "00000-a", n_done=1)
    model(tmp_path / "out" / place)
    sheet(tmp_path)

    result = predict("classify", tmp_path, model=tmp_path / "out")

    assert result.exit_code == 0, result.output
    assert card(tmp_path)["prediction"]["checkpoint"] == "00001-a"


def test_the_card_says_where_a_prediction_comes_from(tmp_path: Path) -> None:
    trained = model(tmp_path / "model")
    sheet(tmp_path)

    predict("impute", tmp_path)

    written = card(tmp_path)
    how = written.pop("prediction")
    assert written == trained.card
    assert written["use"].startswith(NOTICE)
    digest = sha256((tmp_path / "in.csv").read_bytes()).hexdigest()
    assert how["inputs"] == {"expression": {"file": "in.csv", "sha256": digest}}
    assert how["fedgex"] == version("fedgex")
    age = datetime.now(UTC) - datetime.fromisoformat(how["date"])
    assert 0 <= age.total_seconds() < 60
    assert isinstance(how["command"], str)
    sizes = ("samples", "genes_in_vocabulary", "genes_measured", "genes_restored")
    assert [how[name] for name in sizes] == [3, 6, 4, 4]  # BBB2, CCC3, DDD4, EEE5
    assert (how["genes_added"], how["cells_restored"]) == (2, 8)
    assert how["scale_of_input"] == "log2p1"
    assert how["scale_converted"] is False
    assert not any("FX-PREDICT" in warning for warning in how["warnings"])


def test_a_handful_of_genes_is_a_warning_on_stderr_and_card(tmp_path: Path) -> None:
    model(tmp_path / "model", genes=tuple(f"GENE{i:02d}" for i in range(40)))
    sheet(tmp_path, "sample,GENE00,GENE01,GENE02\nS1,1.5,2.5,3\nS2,2,3,4\n")

    result = predict("embed", tmp_path)

    assert result.exit_code == 0, result.output
    warning = "FX-PREDICT-002 warning: genes: 3 of the vocabulary's 40 genes"
    assert warning in result.stderr
    assert card(tmp_path)["prediction"]["warnings"][-1].startswith(warning)


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    model(tmp_path / "model")
    sheet(tmp_path)

    for name in ("a.csv.gz", "b.csv.gz"):
        predict("impute", tmp_path, output=tmp_path / name)

    one, other = (tmp_path / name for name in ("a.csv.gz", "b.csv.gz"))
    assert one.read_bytes() == other.read_bytes()


# ---- released models ----


def crt(path: Path, certificate: x509.Certificate) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(pki.to_pem(certificate))
    return path


def test_a_released_model_predicts_as_its_checkpoint_does(
    tmp_path: Path, release: Callable[..., Any]
) -> None:
    made = release()
    sheet(tmp_path)
    authority = crt(tmp_path / "a.crt", made.authority)

    result = predict("impute", tmp_path, model=made.write(), authority=authority)
    predict(
        "impute",
        tmp_path,
        model=made.evidence.checkpoint,
        output=tmp_path / "plain.csv",
    )

    assert result.exit_code == 0, result.output
    assert (tmp_path / "out.csv").read_text() == (tmp_path / "plain.csv").read_text()
    told = card(tmp_path)["prediction"]["release"]
    assert (told["file"], told["run"]) == ("run-1.fedgex", "run-1")
    assert told["administrators"] == ["ada", "bo"]
    assert card(tmp_path, "plain.csv")["prediction"]["release"] is None


def test_a_released_model_is_verified_against_the_hospitals_own_authority(
    tmp_path: Path, release: Callable[..., Any]
) -> None:
    made = release()
    sheet(tmp_path)
    site = write_site(tmp_path)
    own = tmp_path / "state" / "identity" / "authority.crt"
    arguments = {"model": made.write(), "site": site}

    before_joining = predict("embed", tmp_path, **arguments)
    crt(own, pki.new_authority("alliance")[1])
    of_another = predict("embed", tmp_path, **arguments)
    crt(own, made.authority)
    joined = predict("embed", tmp_path, **arguments)

    assert before_joining.exit_code == 1
    assert "authority.crt: holds no readable certificate" in before_joining.stderr
    assert of_another.exit_code == 1
    assert "run-1.fedgex is not used: it is of another consortium" in of_another.stderr
    assert joined.exit_code == 0, joined.output


def test_a_released_model_is_refused_where_nothing_says_whom_to_trust(
    tmp_path: Path, release: Callable[..., Any]
) -> None:
    sheet(tmp_path)

    result = predict("embed", tmp_path, model=release().write())

    assert result.exit_code == 1
    assert "nothing says whose releases are trusted here" in result.stderr


def test_a_changed_release_predicts_nothing(
    tmp_path: Path, release: Callable[..., Any]
) -> None:
    made = release()
    sheet(tmp_path)
    path = made.write()
    whole = bytearray(path.read_bytes())
    whole[whole.index(b"model.safetensors") + 5000] ^= 1
    path.write_bytes(whole)

    result = predict(
        "embed",
        tmp_path,
        model=path,
        authority=crt(tmp_path / "a.crt", made.authority),
    )

    assert result.exit_code == 1
    assert f"Error: {path} is not used: " in result.stderr
    assert not (tmp_path / "out.csv").exists()
