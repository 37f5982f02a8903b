"""`fedgex-site predict`: refusals, cards, and released models."""

from collections.abc import Callable
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from cryptography import x509
from typer.testing import CliRunner

from fedgex.client.cli import app
from fedgex.client.prediction import inference
from fedgex.common.data.scales import Scale
from fedgex.common.trust import pki

from .predicting import (
    NOTICE,
    SHEET,
    as_frame,
    card,
    model,
    predict,
    sheet,
    table,
    write_site,
)

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
    assert "could not be written: No such file or directory" in result.stderr


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
    about = [w for w in how["warnings"] if "FX-PREDICT" in w]
    assert [w.split()[0] for w in about] == ["FX-PREDICT-009"]  # no factor model


def test_a_handful_of_genes_is_a_warning_on_stderr_and_card(tmp_path: Path) -> None:
    model(tmp_path / "model", genes=tuple(f"GENE{i:02d}" for i in range(40)))
    sheet(tmp_path, "sample,GENE00,GENE01,GENE02\nS1,1.5,2.5,3\nS2,2,3,4\n")

    result = predict("embed", tmp_path)

    assert result.exit_code == 0, result.output
    warning = "FX-PREDICT-002 warning: genes: 3 of the vocabulary's 40 genes"
    assert warning in result.stderr
    assert card(tmp_path)["prediction"]["warnings"][-2].startswith(warning)


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
