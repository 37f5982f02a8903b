"""`fedgex-site predict`: files in, files out, of every command."""

import gzip
import re
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

from fedgex.client.prediction import inference
from fedgex.common.data.scales import Scale
from fedgex.common.models import tasks
from fedgex.common.models.uncertainty import restore_with_uncertainty

from .predicting import (
    GENES,
    NOTICE,
    SHEET,
    TYPES,
    as_frame,
    card,
    model,
    predict,
    sheet,
    table,
)

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


# ---- uncertainty ----


def test_each_restored_value_has_an_uncertainty_and_no_other(tmp_path: Path) -> None:
    linear = {"cross_products": True, "linear_rank": 2}
    trained = model(tmp_path / "model", study=linear)
    sheet(tmp_path)

    assert predict("impute", tmp_path).exit_code == 0
    result = predict("uncertainty", tmp_path, output=tmp_path / "sd.csv")

    assert result.exit_code == 0, result.output
    assert card(tmp_path, "sd.csv")["prediction"]["samples"] == 3
    out = table(tmp_path / "sd.csv")
    assert list(out.columns) == list(GENES)
    given = as_frame().reindex(columns=GENES)
    assert ((out == "").to_numpy() == given.notna().to_numpy()).all()
    standardised = torch.tensor((given.to_numpy() - 4.0) / 1.5, dtype=torch.float32)
    backbone = tasks.load_backbone(trained.study, 6, trained.parameters)
    _, sd = restore_with_uncertainty(backbone, standardised)
    for gene in ("DDD4", "EEE5"):
        expected = 1.5 * sd[:, GENES.index(gene)].numpy()
        assert out[gene].astype(float).to_numpy() == pytest.approx(expected, rel=1e-4)


def test_the_uncertainty_of_genes_asked_for_is_told_alone(tmp_path: Path) -> None:
    model(tmp_path / "model", study={"cross_products": True, "linear_rank": 2})
    sheet(tmp_path)

    assert predict("uncertainty", tmp_path, "--genes", "EEE5,BBB2").exit_code == 0

    assert list(table(tmp_path / "out.csv").columns) == ["BBB2", "EEE5"]


def test_the_commands_name_of_before_warns_and_writes_the_same(tmp_path: Path) -> None:
    model(tmp_path / "model", study={"cross_products": True, "linear_rank": 2})
    sheet(tmp_path)
    predict("uncertainty", tmp_path)

    before = predict("spread", tmp_path, output=tmp_path / "before.csv")

    assert before.exit_code == 0
    assert "called uncertainty now" in before.stderr
    assert table(tmp_path / "before.csv").equals(table(tmp_path / "out.csv"))


def test_a_model_that_cannot_tell_how_sure_it_is_says_so(tmp_path: Path) -> None:
    model(tmp_path / "model")
    sheet(tmp_path)

    result = predict("uncertainty", tmp_path)

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
    numbers = out.filter(like="probability_").astype(float).to_numpy()
    assert numbers.sum(axis=1) == pytest.approx(1)


def test_types_that_are_not_possible_have_no_probability(tmp_path: Path) -> None:
    three = {"rounds": 1, "classes": ("BRCA", "KIRC", "LUAD")}
    model(tmp_path / "model", study={"classification": three})
    sheet(tmp_path)
    assert predict("classify", tmp_path).exit_code == 0
    whole = table(tmp_path / "out.csv").filter(like="probability_").astype(float)

    result = predict("classify", tmp_path, "--force", "--among", "BRCA, LUAD")

    assert result.exit_code == 0, result.output
    out = table(tmp_path / "out.csv")
    numbers = out.filter(like="probability_").astype(float)
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


def counts(folder: Path) -> pd.DataFrame:
    """Write counts of three samples, two with their reads; return their CPM."""
    sheet(folder, "sample,AAA1,BBB2\nS1,10,\nS2,300,40\nS3,5,\n")
    (folder / "c.csv").write_text("sample,library_size\nS1,1000000\nS2,2000000\n")
    return pd.DataFrame({"AAA1": [10.0, 150.0], "BBB2": [np.nan, 20.0]})


def test_restored_counts_are_those_expected_of_the_samples_reads(
    tmp_path: Path,
) -> None:
    trained, per_million = model(tmp_path / "model"), counts(tmp_path)

    result = predict("impute", tmp_path, scale="counts", clinical=tmp_path / "c.csv")

    assert result.exit_code == 0, result.output
    out = table(tmp_path / "out.csv")
    assert list(out["AAA1"].astype(float)) == [10, 300, 5]
    assert (out.loc["S3"] == "").sum() == 5  # its reads are not known
    truth = inference.impute(trained, per_million, scale=Scale.LINEAR)
    assert float(out.loc["S1", "BBB2"]) == pytest.approx(truth.loc[0, "BBB2"], rel=1e-4)
    expected = 2 * truth.loc[1, "CCC3"]  # of two million reads
    assert float(out.loc["S2", "CCC3"]) == pytest.approx(expected, rel=1e-4)
    assert card(tmp_path)["prediction"]["cells_restored"] == 9


def test_counts_that_were_all_measured_come_back_as_integers(tmp_path: Path) -> None:
    model(tmp_path / "model")
    counts(tmp_path)

    result = predict("impute", tmp_path, scale="counts", clinical=tmp_path / "c.csv")

    assert result.exit_code == 0, result.output
    assert list(table(tmp_path / "out.csv")["AAA1"]) == ["10", "300", "5"]


def test_the_uncertainty_of_counts_is_on_the_studys_scale(tmp_path: Path) -> None:
    linear = {"cross_products": True, "linear_rank": 2}
    trained = model(tmp_path / "model", study=linear)
    per_million = counts(tmp_path)

    result = predict(
        "uncertainty", tmp_path, scale="counts", clinical=tmp_path / "c.csv"
    )

    assert result.exit_code == 0, result.output
    out = table(tmp_path / "out.csv").replace("", "nan").astype(float)
    truth = inference.uncertainty(trained, per_million, scale=Scale.LINEAR)
    assert out.to_numpy()[:2] == pytest.approx(truth.to_numpy(), rel=1e-4, nan_ok=True)
    assert out.loc["S3"].isna().all()
