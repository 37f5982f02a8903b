from pathlib import Path

from typer.testing import CliRunner

from fedgex.simulations.cli import app

SCENARIO = """
[study]
name = "small"
sed = 1
[data]
expression = "x.parquet"
scale = "log2p1"
clinical = "c.csv"
[sites]
column = "institution"
[holdout]
institutions = ["A"]
"""


def test_an_unknown_scenario_names_those_that_there_are(tmp_path: Path) -> None:
    out = str(tmp_path / "out")

    result = CliRunner().invoke(app, ["run", "dmeo", "--data", ".", "--out", out])

    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert 'Did you mean "demo"?' in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_unknown_key_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text(SCENARIO)

    result = CliRunner().invoke(
        app, ["run", str(path), "--data", ".", "--out", str(tmp_path / "out")]
    )

    assert result.exit_code == 1
    assert "study.sed" in result.stderr


def test_missing_options_are_a_usage_error() -> None:
    assert CliRunner().invoke(app, ["run", "demo"]).exit_code == 2


def test_new_data_writes_once_and_refuses_a_folder_of_something_else(
    tmp_path: Path,
) -> None:
    out = tmp_path / "data"
    arguments = ["new-data", str(out), "--sites", "2", "--patients", "10"]

    first = CliRunner().invoke(app, arguments)
    other = CliRunner().invoke(app, [*arguments, "--seed", "2"])

    assert (first.exit_code, first.stdout) == (0, f"wrote {out}\n")
    assert other.exit_code == 1
    assert "holds something else already" in other.stderr
