"""`fedgex-site check-data`: exit codes, and exactly what goes where."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fedgex.client.cli import app
from fedgex.client.policy import TEMPLATE

GENES = ("TP53", "MYC", "EGFR")


def write_site(folder: Path, n_patients: int = 12, **cells: str) -> Path:
    """Write a small hospital; `cells` replaces values of the first patient."""
    header = ["patient", *GENES]
    rows = [
        [f"MRN-{i:03d}", f"{5 + i / 10:.1f}", f"{7 - i / 10:.1f}", f"{3 + i % 5}"]
        for i in range(n_patients)
    ]
    rows[0] = [cells.get(name, old) for name, old in zip(header, rows[0], strict=True)]
    lines = [",".join(row) for row in [header, *rows]]
    (folder / "expression.csv").write_text("\n".join(lines) + "\n")
    path = folder / "site.toml"
    path.write_text(
        'name = "north"\n[data]\nexpression = "expression.csv"\nscale = "log2p1"\n'
    )
    path.with_name("policy.toml").write_text(
        TEMPLATE.replace(', "classification", "survival"]', "]")
    )
    return path


def check_data(*args: object) -> Result:
    return CliRunner().invoke(app, ["check-data", *map(str, args)])


ORIENTATION = (
    "FX-DATA-010 note: expression.csv: rows are samples and columns are genes, by the "
    "names of genes; expected either orientation. Set data.orientation if this is "
    "wrong.\n"
)


def test_fine_data_exit_with_zero(tmp_path: Path) -> None:
    result = check_data(write_site(tmp_path))

    assert result.exit_code == 0
    assert result.stdout == (
        ORIENTATION + "ok: 12 patients, 3 genes; 0 errors, 0 warnings, 1 note\n"
    )
    assert result.stderr == ""


def test_warnings_exit_with_zero_too(tmp_path: Path) -> None:
    path = write_site(tmp_path)
    text = (tmp_path / "expression.csv").read_text().replace("MYC", "TP53", 1)
    (tmp_path / "expression.csv").write_text(text)

    result = check_data(path)

    assert result.exit_code == 0
    assert "FX-DATA-045 warning" in result.stdout
    assert "1 gene; 0 errors, 1 warning, 1 note" in result.stdout


def test_bad_data_exit_with_one_and_every_finding_on_stdout(tmp_path: Path) -> None:
    result = check_data(write_site(tmp_path, TP53="-31415", MYC="31415x"))

    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "FX-DATA-010 note",
        "FX-DATA-030 error",
        "FX-DATA-032 error",
        "refused",
    ]
    assert lines[1] == (
        "FX-DATA-030 error: expression.csv: fewer than 10 cells that are no numbers, "
        "in 1 gene (MYC); expected numbers, or empty cells or NA where nothing was "
        "measured. Correct the cells, or remove rows and columns that hold no "
        "expression."
    )
    assert lines[3] == "refused: 2 errors, 0 warnings, 1 note"
    assert result.stderr == (
        "Error: the data cannot be used; correct every error and run check-data again\n"
    )


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_identifier_or_value_is_printed(tmp_path: Path, form: str) -> None:
    path = write_site(tmp_path, patient="MRN4711X", TP53="-31415", MYC="31415x")

    result = check_data(path, "--format", form)

    for hidden in ("MRN", "31415"):
        assert hidden not in result.output


def test_json_holds_the_findings_and_the_sizes(tmp_path: Path) -> None:
    result = check_data(write_site(tmp_path), "--format", "json")

    report = json.loads(result.stdout)
    assert result.exit_code == 0
    assert report["ok"] is True
    assert (report["patients"], report["genes"]) == (12, 3)
    assert report["findings"] == [
        {
            "code": "FX-DATA-010",
            "severity": "note",
            "where": "expression.csv",
            "found": "rows are samples and columns are genes, by the names of genes",
            "expected": "either orientation",
            "action": "Set data.orientation if this is wrong.",
        }
    ]


def test_json_of_a_small_cohort_does_not_tell_its_size(tmp_path: Path) -> None:
    result = check_data(write_site(tmp_path, n_patients=9), "--format", "json")

    report = json.loads(result.stdout)
    assert result.exit_code == 1
    assert report["ok"] is False
    assert report["patients"] == "fewer than 10"
    assert report["genes"] is None


def test_unusable_settings_exit_with_one_and_one_error(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text('name = "north"\n')

    result = check_data(path)

    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: site.toml: data: Field required")
    assert "policy.toml: is not there" in result.stderr


def test_an_absent_file_exits_with_one(tmp_path: Path) -> None:
    path = write_site(tmp_path)
    (tmp_path / "expression.csv").unlink()

    result = check_data(path)

    assert result.exit_code == 1
    assert "FX-DATA-001 error" in result.stdout


@pytest.mark.parametrize("args", [(), ("site.toml", "--format", "xml")])
def test_wrong_usage_exits_with_two(args: tuple[str, ...]) -> None:
    assert check_data(*args).exit_code == 2
