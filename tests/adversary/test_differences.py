"""Sums that differ by a few patients: opt-outs, additions, runs and contracts.

A coordinator, or another hospital, subtracts one sum that left from another.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fedgex.common import federation
from fedgex.common.data.moments import GeneMoments, Standardisation
from fedgex.common.study import Study

from ..federation.conftest import Consortium, write_hospitals
from ..support import alliance as alliances
from ..support.alliance import GENES, STUDY, Alliance
from ..support.coordinator import Coordinator, Refused

SITE, FLOOR = "hospital-01", 10
RARE = 3


def read(**changes: object) -> Study:
    return Study.read(STUDY | changes, "a test's study")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    """Write hospitals of which the first has three patients of a rare type."""
    data = write_hospitals(tmp_path_factory.mktemp("consortium") / "data", n_sites=3)
    path = data.sites / SITE / "clinical.csv"
    clinical = pd.read_csv(path)
    n = len(clinical)
    clinical["cancer_type"] = ["rare"] * RARE + ["type-1"] * 12 + ["type-2"] * (n - 15)
    clinical.to_csv(path, index=False)
    return data


@pytest.fixture(scope="module")
def founded(data: Consortium, tmp_path_factory: pytest.TempPathFactory) -> Alliance:
    folder = tmp_path_factory.mktemp("founded") / "alliance"
    alliance = alliances.found(folder, data.sites, data.names)
    toml = alliance.site_toml(SITE)
    text = toml.read_text().replace("[data]\n", '[data]\nopt_outs = "opt-outs.txt"\n')
    toml.write_text(text)
    opt_out(alliance)
    alliance.permit(SITE, share_cross_products=True)
    return alliance


@pytest.fixture
def alliance(founded: Alliance, tmp_path: Path) -> Alliance:
    shutil.copytree(founded.folder, tmp_path / "alliance")
    return Alliance(tmp_path / "alliance", founded.names)


def opt_out(alliance: Alliance, *patients: str) -> None:
    path = alliance.sites / SITE / "opt-outs.txt"
    path.write_text("\n".join(["# those who opted out", *patients, ""]))


def patients(alliance: Alliance) -> list[str]:
    table = pd.read_csv(alliance.sites / SITE / "clinical.csv")
    return [str(patient) for patient in table["patient"]]


def correct_a_profile(alliance: Alliance) -> None:
    path = alliance.sites / SITE / "expression.parquet"
    table = pd.read_parquet(path)
    values = table.select_dtypes("number").columns
    table.loc[table.index[5], values] += 1
    table.to_parquet(path)


def same(one: GeneMoments, other: GeneMoments) -> bool:
    return (
        np.array_equal(one.count, other.count)
        and np.array_equal(one.total, other.total)
        and np.array_equal(one.square_total, other.square_total)
    )


def unit(n_genes: int = len(GENES)) -> Standardisation:
    return Standardisation.identity(n_genes)


def smallest_difference(*sums: GeneMoments) -> int:
    """Return the fewest patients, above none, by which two counts of a gene differ."""
    counts = np.array([each.count for each in sums])
    differences = np.abs(counts[:, None] - counts[None, :])
    return int(min(differences[differences > 0], default=0))


CHANGES: dict[str, Callable[[Alliance], None]] = {
    "an opt-out": lambda alliance: opt_out(alliance, patients(alliance)[7]),
    "one less than the floor": lambda alliance: opt_out(
        alliance, *patients(alliance)[: FLOOR - 1]
    ),
    "a corrected profile": correct_a_profile,
}


@pytest.mark.parametrize("change", CHANGES)
def test_two_runs_of_a_contract_send_the_same_sums_though_few_patients_changed(
    alliance: Alliance, change: str
) -> None:
    coordinator = Coordinator(alliance, alliance.agree(read()))
    before = coordinator.moments(SITE, "run-1")
    products = coordinator.products(SITE, "run-1", unit())

    CHANGES[change](alliance)
    after = coordinator.moments(SITE, "run-2")
    again = coordinator.products(SITE, "run-2", unit())

    assert same(before, after)
    assert before.count.max() == len(patients(alliance))
    for group, sums in products.items():
        np.testing.assert_array_equal(again[group].products, sums.products)
        np.testing.assert_array_equal(again[group].totals, sums.totals)


@pytest.mark.parametrize("change", CHANGES)
def test_an_addition_does_not_show_who_was_added(
    alliance: Alliance, change: str
) -> None:
    CHANGES[change](alliance)
    coordinator = Coordinator(alliance, alliance.agree(read()))
    before = coordinator.moments(SITE, "run-1")

    opt_out(alliance)
    correct_a_profile(alliance)

    assert same(before, coordinator.moments(SITE, "run-2"))


def test_another_contract_on_other_genes_sends_the_same_sums_of_the_common_ones(
    alliance: Alliance,
) -> None:
    coordinator = Coordinator(alliance, alliance.agree(read()))
    before = coordinator.moments(SITE, "run-1")
    coordinator.products(SITE, "run-1", unit())
    opt_out(alliance, patients(alliance)[7])
    fewer = read(vocabulary={"genes": GENES[1:]}, seed=2)

    other = Coordinator(alliance, alliance.agree(fewer))
    after = other.moments(SITE, "run-2")
    products = other.products(SITE, "run-2", unit(len(GENES) - 1))

    np.testing.assert_array_equal(before.count[1:], after.count)
    np.testing.assert_array_equal(before.total[1:], after.total)
    np.testing.assert_array_equal(products["others"].totals, before.total[1:])


def test_a_contract_on_another_scale_gets_no_sums_after_an_opt_out(
    alliance: Alliance,
) -> None:
    """In natural logarithms they are .69 times what they were, of one patient less."""
    Coordinator(alliance, alliance.agree(read())).moments(SITE, "run-1")
    opt_out(alliance, patients(alliance)[7])

    other = Coordinator(alliance, alliance.agree(read(scale="ln1p")))

    with pytest.raises(Refused, match="FX-RUN-006"):
        other.moments(SITE, "run-2")


def test_an_opt_out_between_statistics_and_cross_products_of_one_run_does_not_show(
    alliance: Alliance,
) -> None:
    coordinator = Coordinator(alliance, alliance.agree(read()))
    coordinator.moments(SITE, "run-1")
    opt_out(alliance, patients(alliance)[7])

    with pytest.raises(Refused, match="FX-RUN-006"):
        coordinator.products(SITE, "run-1", unit())


@pytest.mark.parametrize("linear_types", [["type-1"], ["type-2"]])
def test_groups_of_two_contracts_do_not_give_those_of_a_rare_type(
    alliance: Alliance, linear_types: list[str]
) -> None:
    """Others of the one contract are the other type and three rare patients."""
    other_types = [{"type-1": "type-2", "type-2": "type-1"}[t] for t in linear_types]
    first, second = (
        Coordinator(alliance, alliance.agree(read(linear_rank=2, linear_types=types)))
        for types in (linear_types, other_types)
    )

    one = first.products(SITE, "run-1", unit())
    other = second.products(SITE, "run-2", unit())

    sizes = {name: int(sums.counts.max()) for name, sums in one.items()}
    assert sizes == {linear_types[0]: 12, "others": 12 + RARE}
    everyone = int(sum(sizes.values()))
    assert {n: int(s.counts.max()) for n, s in other.items()} == {"others": everyone}


def test_an_opt_out_from_one_group_does_not_show_by_the_sums_of_all(
    alliance: Alliance,
) -> None:
    """The groups of the second contract add up to all patients but one."""
    coordinator = Coordinator(alliance, alliance.agree(read()))
    everyone = coordinator.moments(SITE, "run-1")
    opt_out(alliance, patients(alliance)[20])
    grouped = read(linear_rank=2, linear_types=["type-1"])
    by_type = Coordinator(alliance, alliance.agree(grouped))

    with pytest.raises(Refused, match="FX-RUN-006"):
        by_type.products(SITE, "run-2", unit())

    assert same(everyone, by_type.moments(SITE, "run-3"))


def test_once_the_floor_of_patients_went_the_sums_are_those_of_who_is_left(
    alliance: Alliance,
) -> None:
    coordinator = Coordinator(alliance, alliance.agree(read()))
    before = coordinator.moments(SITE, "run-1")
    coordinator.products(SITE, "run-1", unit())

    opt_out(alliance, *patients(alliance)[:FLOOR])
    after = coordinator.moments(SITE, "run-2")
    products = coordinator.products(SITE, "run-2", unit())

    assert after.count.max() == before.count.max() - FLOOR
    np.testing.assert_allclose(products["others"].totals, after.total)
    opt_out(alliance, *patients(alliance)[: FLOOR + 1])
    assert same(after, coordinator.moments(SITE, "run-3"))
    assert smallest_difference(before, after) == FLOOR


def test_a_record_that_was_lost_or_changed_lets_no_sum_leave(
    alliance: Alliance,
) -> None:
    coordinator = Coordinator(alliance, alliance.agree(read()))
    coordinator.moments(SITE, "run-1")
    opt_out(alliance, patients(alliance)[7])
    (record,) = (alliance.state(SITE) / "sums").glob("*.safetensors")
    content = record.read_bytes()

    for left in (None, content[:-9], content[:-1000] + b"\1" * 1000):
        record.unlink() if left is None else record.write_bytes(left)
        with pytest.raises(Refused, match="FX-RUN-006"):
            coordinator.moments(SITE, "run-2")
    shutil.rmtree(record.parent)
    with pytest.raises(Refused, match="FX-RUN-006"):
        coordinator.moments(SITE, "run-2")


def test_the_record_is_the_owners_and_names_nobody(alliance: Alliance) -> None:
    coordinator = Coordinator(alliance, alliance.agree(read()))
    coordinator.moments(SITE, "run-1")

    folder = alliance.state(SITE) / "sums"

    assert folder.stat().st_mode & 0o777 == 0o700
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o077 == 0 or not path.stat().st_size
        content = path.read_bytes()
        assert not [p for p in patients(alliance) if p.encode() in content]


# ---- what every hospital, and everybody with a model, reads ----


def test_an_opt_out_elsewhere_does_not_move_the_published_standardisation(
    alliance: Alliance,
) -> None:
    coordinator = Coordinator(alliance, alliance.agree(read()))
    published = []
    for run in ("run-1", "run-2"):
        moments = {site: coordinator.moments(site, run) for site in alliance.names}
        published.append(federation.standardisation(moments))
        opt_out(alliance, patients(alliance)[7])

    np.testing.assert_array_equal(published[0].mean, published[1].mean)
    np.testing.assert_array_equal(published[0].sd, published[1].sd)


@pytest.mark.parametrize("n", [30, 100, 1000, 20_000])
def test_two_published_means_give_no_profile(n: int) -> None:
    """N mean - (N - 1) mean', as if a hospital had sent both sums."""
    rng = np.random.default_rng(n)
    values = rng.normal(6, rng.uniform(0.3, 3, size=400), size=(n, 400))
    values = values.astype(np.float32)
    everyone = GeneMoments.of(values)
    before = federation.standardisation({"a": everyone})
    after = federation.standardisation({"a": GeneMoments.of(values[1:])})

    profile = n * before.mean - (n - 1) * after.mean

    error = np.sqrt(np.mean(((profile - values[0]) / everyone.sd) ** 2))
    assert error > 0.5
    assert np.abs((before.mean - everyone.mean) / everyone.sd).max() < 1 / np.sqrt(n)
    assert np.abs(before.sd / everyone.sd - 1).max() < 1 / np.sqrt(n)
