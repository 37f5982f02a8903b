import copy
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedgex.common.errors import ConfigError
from fedgex.simulations.reporting.charts import LABELS
from fedgex.simulations.reporting.report import summary, write_report

from .reports import (
    CLASSIFIERS,
    COHORTS,
    IMPUTERS,
    SURVIVAL,
    bare,
    make_report,
    unusual,
)


@pytest.fixture
def report() -> dict[str, Any]:
    return make_report()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    write_report(make_report(), folder)
    return (folder / "report.html").read_text("utf-8")


def render(report: dict[str, Any], folder: Path) -> str:
    write_report(report, folder)
    return (folder / "report.html").read_text("utf-8")


class Reader(HTMLParser):
    """Collects what the tests ask about, and refuses tags that do not match."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "link", "br", "img", "hr", "input"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def attributes(self, name: str) -> list[str]:
        return [value for _, attrs in self.tags if (value := attrs.get(name))]


def test_every_tag_that_is_opened_is_closed(page: str) -> None:
    tags = {tag for tag, _ in Reader(page).tags}

    assert {"html", "title", "section", "figure", "svg", "table"} <= tags


def test_the_page_needs_no_other_file_and_no_network(page: str) -> None:
    reader = Reader(page)

    targets = reader.attributes("src") + reader.attributes("href")
    assert all(target.startswith("#") for target in targets)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in reader.tags}
    assert not re.search(r"https?://|@import|url\((?!#)", page)


def test_no_two_elements_share_an_id_and_every_reference_has_its_target(
    page: str,
) -> None:
    reader = Reader(page)
    ids = reader.attributes("id")

    references = [href[1:] for href in reader.attributes("href")]
    references += re.findall(r"url\(#([^)]*)\)", page)

    assert len(ids) == len(set(ids))
    assert set(references) <= set(ids)


def test_every_method_and_cohort_is_named_in_a_chart_and_in_a_table(page: str) -> None:
    charts = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    tables = "".join(re.findall(r"<table.*?</table>", page, re.DOTALL))
    methods = {LABELS[m] for m in (*IMPUTERS, *SURVIVAL, *CLASSIFIERS)}

    for name in (*methods, *COHORTS):
        assert f">{name}<" in charts, name
        assert f">{name}<" in tables, name


def test_every_chart_has_a_caption_a_text_alternative_and_units_on_its_axes(
    page: str,
) -> None:
    figures = re.findall(r"<figure.*?</figure>", page, re.DOTALL)

    assert len(figures) == 6
    for figure in figures:
        alternative = re.search(r'role="img" aria-label="([^"]+)"', figure)
        assert alternative
        assert len(alternative[1]) > 60
        assert re.search(r"<figcaption><b>[^<]+</b>", figure)
    for label in (
        "MSE (gene variances)",
        "values missing (%)",
        "genes measured",
        "loss (nats)",
        "time (years)",
        "C-index (0.5 is chance, 1 is a perfect order)",
    ):
        assert f">{label}<" in page


def test_charts_take_their_colours_and_fonts_from_the_page(page: str) -> None:
    charts = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))

    assert not re.search(r"(fill|stroke): #", charts)
    assert "var(--vermillion, #d55e00)" in charts
    assert set(re.findall(r"font-family: ([^;\"]*)", charts)) == {"inherit"}
    assert "<style" not in charts


def test_names_from_outside_are_escaped_everywhere(
    report: dict[str, Any], tmp_path: Path
) -> None:
    evil = "<script>alert('x')</script>&$name\"$"
    report["study"] |= {"name": evil, "command": evil, "notes": [evil]}
    report["study"]["sites"][0]["name"] = evil
    report["study"]["holdout"]["institutions"] = [evil]
    report["survival"][evil] = report["survival"]["BRCA"]
    report["survival"][evil]["alone"] |= {"c_index": None, "reason": evil}
    report["kaplan_meier"][evil] = report["kaplan_meier"]["BRCA"]
    report["rounds"][0]["phase"] = evil

    reader = Reader(render(report, tmp_path))

    assert "script" not in {tag for tag, _ in reader.tags}
    assert sum(evil in text for text in reader.text) >= 9


def test_a_run_that_measured_nothing_says_so_in_every_section(
    report: dict[str, Any], tmp_path: Path
) -> None:
    page = render(bare(report), tmp_path)

    reader = Reader(page)
    assert "figure" not in {tag for tag, _ in reader.tags}
    absent = re.findall(r'<p class="absent">(Left out: [^<]+\.)</p>', page)
    assert len(absent) == 7
    assert "What the run cost" not in page
    assert any("no rounds" in sentence for sentence in absent)
    assert any("survival rounds" in sentence for sentence in absent)
    assert any("cost was not measured" in sentence for sentence in absent)


def test_a_report_with_hardly_a_number_is_written_without_a_warning(
    report: dict[str, Any], tmp_path: Path
) -> None:
    page = render(unusual(report), tmp_path)

    text = "".join(Reader(page).text)
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)
    assert "p not estimable" in text
    assert "BRCA, federated model: no deaths" in text
    assert "no C-index by every method in any of 2 cohorts" in text


def test_a_c_index_that_cannot_be_estimated_is_named_with_its_reason(
    page: str,
) -> None:
    row = re.search(r'<tr><th scope="row">GBM</th>(.*?)</tr>', page)

    assert row
    assert row[1].count("<td>not estimable</td>") == 1
    assert "GBM, local model: no hospital has 5 deaths" in page


def test_the_best_baseline_is_marked_and_the_ratio_to_it_is_stated(
    report: dict[str, Any], tmp_path: Path
) -> None:
    report = bare(report)
    report["imputation"] = {
        method: {"mcar": {"0.5": {"mse": error}, "0.9": {"mse": 0.8}}}
        for method, error in (("model", 0.3), ("mean", 1.0), ("gaussian", 0.4))
    }

    page = render(report, tmp_path)

    gaussian = re.search(r'<th scope="row">Gaussian</th>(.*?)</tr>', page)
    ratio = re.search(r'<th scope="row">model / best baseline</th>(.*?)</tr>', page)
    assert gaussian
    assert gaussian[1] == "<td>† 0.400</td><td>† 0.800</td>"
    assert ratio
    assert ratio[1] == "<td>0.750</td><td>1.000</td>"
    assert "so in 1 of 2 columns" in page


@pytest.mark.parametrize(
    ("model", "gaussian", "verdict"),
    [
        (0.3, 0.4, "ratio 0.750, the model is 25.0% better"),
        (0.5, 0.4, "ratio 1.250, the model is 25.0% worse"),
        (0.4, 0.4, "ratio 1.000, level"),
    ],
)
def test_the_summary_says_who_restores_better(
    report: dict[str, Any], model: float, gaussian: float, verdict: str
) -> None:
    report["imputation"] = {
        "model": {"mcar": {"0.5": {"mse": model}}},
        "mean": {"mcar": {"0.5": {"mse": 1.0}}},
        "gaussian": {"mcar": {"0.5": {"mse": gaussian}}},
    }

    lines = summary(report)

    assert (
        f"Restoration, 50% missing at random: MSE {model:.3f}, best baseline "
        f"{gaussian:.3f} (Gaussian); {verdict}" in lines
    )


def test_the_summary_counts_genes_below_the_diagonal(report: dict[str, Any]) -> None:
    report["imputation_per_gene"] = {
        "rate": "0.5",
        "genes": ["A", "B", "C", "D"],
        "model_mse": [0.1, 0.2, 0.3, None],
        "gaussian_mse": [0.2, 0.1, 0.3, 0.9],
        "model_r": [0.9, 0.8, 0.7, math.nan],
    }

    expected = "Genes: the model beats the Gaussian on 1 of 3 genes (33%), 50% missing"
    assert expected in summary(report)


def test_the_summary_averages_concordance_over_cohorts_where_all_methods_have_one(
    report: dict[str, Any],
) -> None:
    def cohort(alone: float | None, federated: float) -> dict[str, Any]:
        numbers = {"sd": None, "patients": 9, "events": 5, "reason": "few deaths"}
        return {
            "alone": {"c_index": alone} | numbers,
            "federated": {"c_index": federated} | numbers,
        }

    report["survival"] = {
        "A": cohort(0.5, 0.6),
        "B": cohort(0.6, 0.5),
        "C": cohort(0.4, 0.7),
        "D": cohort(None, 0.99),
    }

    survival = next(line for line in summary(report) if line.startswith("Survival"))
    assert survival == (
        "Survival: mean C-index over 3 of 4 cohorts: federated model 0.600, local "
        "model 0.500; federated above local in 2 of 3"
    )


def test_the_summary_tells_of_rounds_without_all_hospitals(
    report: dict[str, Any],
) -> None:
    assert (
        "Updates: some hospital was missing in 1 of 65 rounds; at worst 22 of 25 "
        "contributed (survival, round 4)" in summary(report)
    )


def test_the_summary_is_about_ten_plain_lines(report: dict[str, Any]) -> None:
    full, least = summary(report), summary(bare(report))

    assert 8 <= len(full) <= 12
    assert not any("\n" in line or "<" in line for line in full)
    assert "Survival: not judged in this run" in least


def test_the_summary_stands_at_the_top_of_the_page(
    report: dict[str, Any], page: str
) -> None:
    text = "".join(Reader(page).text)

    for line in summary(report):
        topic, _, sentence = line.partition(": ")
        assert topic in text
        assert sentence in text


def test_json_has_sorted_keys_six_digits_and_null_for_nan(
    report: dict[str, Any], tmp_path: Path
) -> None:
    report = bare(report)
    report["cost"] = {
        "samples_per_s": np.float32(math.nan),
        "bytes_up": np.int64(12_345_678),
        "round_overhead_s": 1.23456789,
        "peak_rss_mb": math.inf,
    }

    write_report(report, tmp_path)

    text = (tmp_path / "report.json").read_text("utf-8")
    values = json.loads(text, parse_constant=pytest.fail)
    assert values["cost"] == {
        "bytes_up": 12_345_678,
        "peak_rss_mb": None,
        "round_overhead_s": 1.23457,
        "samples_per_s": None,
    }
    assert list(values) == sorted(report)
    assert list(values["cost"]) == sorted(values["cost"])


def test_the_same_report_gives_the_same_bytes(
    report: dict[str, Any], page: str, tmp_path: Path
) -> None:
    assert render(report, tmp_path) == page


def test_the_report_handed_in_is_left_as_it_was(
    report: dict[str, Any], tmp_path: Path
) -> None:
    report = bare(report) | {"cost": {"samples_per_s": math.inf}}
    before = copy.deepcopy(report)

    write_report(report, tmp_path)

    assert report == before


def test_everything_wrong_with_a_report_is_named_at_once_and_nothing_is_written(
    report: dict[str, Any], tmp_path: Path
) -> None:
    del report["survival"]
    report["surival"] = {}
    report["schema"] = 2
    report["imputation"]["guess"] = {}
    report["imputation_per_gene"]["genes"].pop()

    with pytest.raises(ConfigError) as refusal:
        write_report(report, tmp_path / "new")

    message = str(refusal.value)
    assert "report: survival: Field required" in message
    assert "report: surival: Extra inputs are not permitted" in message
    assert "report: schema: Input should be 1" in message
    assert "report: imputation.guess" in message
    assert "hold 1499, 1500, 1500, 1500 values" in message
    assert not (tmp_path / "new").exists()


def test_a_further_measure_is_kept_in_the_json(
    report: dict[str, Any], tmp_path: Path
) -> None:
    write_report(bare(report) | {"cost": {"joules": 3.5}}, tmp_path)

    values = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert values["cost"]["joules"] == 3.5
