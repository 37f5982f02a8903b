"""A coordinator that chooses what hospitals standardise with, to read patients."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedgex.client.settings import SiteSettings
from fedgex.common import keys
from fedgex.common.data.cross_products import OTHERS, by_type
from fedgex.common.data.moments import LARGEST, LEAST_SD, Standardisation, pool
from fedgex.common.data.vocabulary import Vocabulary
from fedgex.common.ingestion.cohort import read_cohort
from fedgex.common.messages.fields import Round
from fedgex.common.study import Study
from fedgex.common.transport.records import to_record

from ..federation.conftest import Consortium, write_hospitals
from ..support import alliance as alliances
from ..support.alliance import STUDY, Alliance
from ..support.coordinator import Coordinator, Refused

SITE = "hospital-01"
HALF_OF_LEAST = 2.0**-150
"""Of float32's least number: what is above becomes that number, and the rest 0."""


def read(**changes: object) -> Study:
    return Study.read(STUDY | changes, "a test's study")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    return write_hospitals(tmp_path_factory.mktemp("consortium") / "data")


@pytest.fixture
def alliance(data: Consortium, tmp_path: Path) -> Alliance:
    alliance = alliances.found(tmp_path / "alliance", data.sites, data.names[:3])
    alliance.permit(SITE, share_cross_products=True)
    return alliance


def profiles(alliance: Alliance, study: Study) -> NDArray[np.float64]:
    """Return what the hospital has, on the study's genes, shape (N, V)."""
    settings = SiteSettings.load(alliance.site_toml(SITE))
    cohort = read_cohort(
        settings.data, settings.policy.minimum_cohort, study.scale, ()
    )[0]
    vocabulary = Vocabulary(tuple(sorted(study.vocabulary.genes)))
    return vocabulary.place(cohort.genes, cohort.expression).astype(np.float64)


def above(
    coordinator: Coordinator, run: str, gene: int, threshold: float
) -> tuple[int, NDArray[np.float64]]:
    """Return how many patients have more of a gene, and the sum of their profiles."""
    n_genes = len(coordinator.vocabulary)
    sd = np.ones(n_genes)
    sd[gene] = threshold / HALF_OF_LEAST
    scale = Standardisation(mean=np.zeros(n_genes), sd=sd)
    sums = coordinator.products(SITE, run, scale)[OTHERS]
    least = 2 * HALF_OF_LEAST
    return round(sums.products[gene, gene] / least**2), sums.products[gene] / least


def test_no_chosen_standardisation_singles_a_patient_out(alliance: Alliance) -> None:
    """Halve the interval in which the largest value of a gene is without its second."""
    coordinator = Coordinator(alliance, alliance.agree(read()))
    truth = profiles(alliance, coordinator.study)
    gene = int(np.isfinite(truth).all(axis=0).argmax())
    low, high, answers = 0.0, 32.0, []

    for question in range(40):
        threshold = (low + high) / 2
        try:
            n, total = above(coordinator, f"run-{question}", gene, threshold)
        except Refused as refused:
            answers.append(str(refused))
            break
        if n == 1:
            others = np.delete(np.abs(truth - total), gene, axis=1)
            answers.append(f"a profile, off by {np.nanmax(others, axis=1).min()}")
            break
        low, high = (threshold, high) if n else (low, threshold)

    assert answers == ["FX-STUDY-006"]


def moved(scale: Standardisation) -> Standardisation:
    mean = scale.mean.copy()
    mean[0] += 0.25
    return Standardisation(mean=mean, sd=scale.sd)


@pytest.mark.parametrize("first", [keys.CROSS_PRODUCTS, keys.TRAIN])
def test_a_run_has_one_standardisation_its_first(
    alliance: Alliance, first: str
) -> None:
    coordinator = Coordinator(alliance, alliance.agree(read()))
    unit = Standardisation.identity(len(coordinator.vocabulary))
    model = to_record({"weights": np.zeros(1, dtype=np.float32)})
    training: dict[str, Any] = {
        "model": model,
        "round": Round(phase="pretraining", number=1),
    }
    coordinator.prepare(SITE, "run-1")
    if first == keys.CROSS_PRODUCTS:
        coordinator.products(SITE, "run-1", unit)
    else:
        with pytest.raises(Refused, match="FX-SITE-001"):  # of the empty model
            coordinator.ask(SITE, first, "run-1", standardisation=unit, **training)

    with pytest.raises(Refused, match="FX-STUDY-009"):
        coordinator.ask(
            SITE, keys.TRAIN, "run-1", standardisation=moved(unit), **training
        )
    with pytest.raises(Refused, match="FX-SITE-001"):
        coordinator.ask(SITE, keys.TRAIN, "run-1", standardisation=unit, **training)
    coordinator.products(SITE, "run-2", moved(unit))


@pytest.mark.parametrize(
    ("mean", "sd"), [(0, 1e-7), (0, 1e10), (1e10, 1), (-1e300, 1), (0, 1e-300)]
)
def test_numbers_that_no_gene_has_are_refused(
    alliance: Alliance, mean: float, sd: float
) -> None:
    coordinator = Coordinator(alliance, alliance.agree(read()))
    n_genes = len(coordinator.vocabulary)
    scale = Standardisation(mean=np.full(n_genes, mean), sd=np.full(n_genes, sd))

    with pytest.raises(Refused, match="FX-STUDY-006"):
        coordinator.products(SITE, "run-1", scale)


@st.composite
def sums_of_some_patients(
    draw: st.DrawFn,
) -> tuple[NDArray[np.float32], list[str], Standardisation, int]:
    """Draw values of one or two cohorts on any scale, and what they are asked for."""
    n_genes, rng = draw(st.integers(1, 6)), np.random.default_rng(draw(st.integers(0)))
    values = rng.normal(size=(draw(st.integers(2, 30)), n_genes))
    values *= draw(st.sampled_from([1e-3, 1.0, 30.0, 1e6]))
    values[rng.random(values.shape) < draw(st.sampled_from([0, 0.1, 0.5]))] = np.nan
    sizes = st.floats(LEAST_SD, LARGEST, allow_subnormal=False)
    sd = draw(st.lists(sizes, min_size=n_genes, max_size=n_genes))
    means = st.floats(-LARGEST, LARGEST)
    mean = draw(st.lists(means, min_size=n_genes, max_size=n_genes))
    scale = Standardisation(mean=np.array(mean), sd=np.array(sd))
    types = draw(
        st.lists(st.sampled_from("ab"), min_size=len(values), max_size=len(values))
    )
    return values.astype(np.float32), types, scale, draw(st.integers(1, len(values)))


@given(sums_of_some_patients())
def test_what_leaves_is_linear_in_the_patients_for_any_accepted_standardisation(
    drawn: tuple[NDArray[np.float32], list[str], Standardisation, int],
) -> None:
    """It is what exact arithmetic makes of raw sums, and those of two parts add up."""
    values, types, scale, at = drawn
    assert scale.is_of_expression

    everyone = by_type(values, types, (), 1, scale)[OTHERS]
    halves = [half for half in (values[:at], values[at:]) if len(half)]
    both = pool(by_type(v, types[: len(v)], (), 1, scale)[OTHERS] for v in halves)

    # What float64 may lose of the terms that are added up, however they cancel.
    x, m = np.where(np.isnan(values), 0, np.abs(values)), np.abs(scale.mean)
    there = (~np.isnan(values)).astype(float)
    terms = (x + m * there).astype(np.float64)
    lost = 1e-13 * (terms.T @ terms) / np.outer(scale.sd, scale.sd)
    assert (np.abs(both.products - everyone.products) <= lost).all()
    exact = exact_products(values, scale)
    assert (np.abs(exact - everyone.products) <= lost).all()
    off = np.abs(both.totals - everyone.totals) * scale.sd
    assert (off <= 1e-13 * terms.sum(axis=0)).all()


def exact_products(
    values: NDArray[np.float32], scale: Standardisation
) -> NDArray[np.float64]:
    """Return sums of products in rational numbers."""
    n_genes = values.shape[1]
    found = np.zeros((n_genes, n_genes))
    for i in range(n_genes):
        for j in range(n_genes):
            both = ~np.isnan(values[:, i]) & ~np.isnan(values[:, j])
            sums = sum(
                (Fraction(float(x)) - Fraction(scale.mean[i]))
                * (Fraction(float(y)) - Fraction(scale.mean[j]))
                for x, y in values[both][:, [i, j]]
            )
            found[i, j] = float(sums / Fraction(scale.sd[i]) / Fraction(scale.sd[j]))
    return found
