"""No two sums that leave a hospital differ by fewer patients than the floor.

Each patient's value is a power of two, so that a sum shows who is in it, as it would
to nobody else.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedgex.client.ledger import released_sums
from fedgex.client.ledger.released_sums import People, SumsError
from fedgex.common.data.cross_products import CrossProducts
from fedgex.common.data.moments import GeneMoments, Standardisation

N, GENES, FLOOR = 12, ("A", "B", "C"), 3
TYPES = (*"aaaabbbbcc", None, None)
Members = frozenset[tuple[int, bool]]
"""Patients, and whether each one's values were corrected."""
Released = dict[tuple[str, ...], set[Members]]
"""Cohorts behind the sums of a gene, or of the product of two, that left."""


@dataclass(frozen=True)
class Question:
    """What a coordinator asks, and what the hospital has then."""

    products: bool
    genes: tuple[str, ...]
    types: tuple[str, ...]
    scale: str
    gone: frozenset[int]
    corrected: frozenset[int]
    missing: frozenset[tuple[int, int]]


def few(most: int) -> st.SearchStrategy[frozenset[int]]:
    return st.frozensets(st.integers(0, N - 1), max_size=most)


questions = st.builds(
    Question,
    products=st.booleans(),
    genes=st.sampled_from([GENES, ("A", "B"), ("C",)]),
    types=st.sampled_from([(), ("a",), ("b",), ("a", "b"), ("a", "b", "c")]),
    scale=st.sampled_from(["log2p1", "log2p1", "ln1p"]),
    gone=st.one_of(few(2), few(N - FLOOR)),
    corrected=st.one_of(st.just(frozenset()), few(5)),
    missing=st.frozensets(
        st.tuples(st.integers(0, N - 1), st.integers(0, 2)), max_size=3
    ),
)


def people(asked: Question) -> People:
    rows = [i for i in range(N) if i not in asked.gone]
    values = np.array([[2.0 ** (i + N * (i in asked.corrected))] * 3 for i in rows])
    for row, i in enumerate(rows):
        for gene in range(3):
            if (i, gene) in asked.missing:
                values[row, gene] = np.nan
    at = [GENES.index(gene) for gene in asked.genes]
    return People(
        patients=[f"patient {i}" for i in rows],
        values=values[:, at].astype(np.float32),
        as_filed=values[:, at].astype(np.float32),
        genes=asked.genes,
        scale=asked.scale,
        cancer_type=[TYPES[i] for i in rows],
    )


def members(total: float, base: int) -> Members:
    """Return who is in a sum of powers of the base."""
    found, number = set(), int(total)
    assert number == total
    for exponent in range(2 * N):
        if (number // base**exponent) % base:
            found.add((exponent % N, exponent >= N))
    return frozenset(found)


def left_moments(genes: Sequence[str], sums: GeneMoments) -> Released:
    assert (sums.count[sums.count != -1] >= FLOOR).all()
    return {
        (gene,): {members(sums.total[i], 2)}
        for i, gene in enumerate(genes)
        if sums.count[i] > 0
    }


def left_products(
    genes: Sequence[str], groups: Mapping[str, CrossProducts]
) -> Released:
    found: Released = {}

    def add(about: tuple[str, ...], totals: list[float], base: int) -> None:
        cohorts = [members(total, base) for total in totals]
        found.setdefault(about, set()).update(cohorts)
        found[about].add(frozenset().union(*cohorts))  # all groups together

    for i, gene in enumerate(genes):
        known = [s for s in groups.values() if s.counts[i] > 0]
        if known:
            add((gene,), [s.totals[i] for s in known], 2)
        for j in range(i):
            sums = [s for s in groups.values() if s.pair_counts[i, j] > 0]
            if sums:
                add((genes[j], gene), [s.products[i, j] for s in sums], 4)
    return found


def differing(one: Members, other: Members) -> int:
    """Return how many patients came or went; if none, whose values are others."""
    patients = {i for i, _ in one} ^ {i for i, _ in other}
    return len(patients or {i for i, _ in one ^ other})


@settings(max_examples=150)
@given(st.lists(questions, min_size=2, max_size=6))
def test_whatever_is_asked_no_two_sums_differ_by_fewer_patients_than_the_floor(
    asked: list[Question],
) -> None:
    released: Released = {}
    with tempfile.TemporaryDirectory() as folder:
        for each in asked:
            for about, cohorts in answers(Path(folder), each).items():
                released.setdefault(about, set()).update(cohorts)

    for cohorts in released.values():
        for one, other in combinations(cohorts, 2):
            if {i for i, _ in one} & {i for i, _ in other}:
                assert differing(one, other) >= FLOOR


def answers(state_dir: Path, asked: Question) -> Released:
    """Return what leaves, nothing if the question is refused."""
    today = people(asked)
    unit = Standardisation.identity(len(asked.genes))
    try:
        if not asked.products:
            sums = released_sums.moments(today, state_dir, FLOOR)
            return left_moments(asked.genes, sums)
        groups = released_sums.products(today, state_dir, FLOOR, asked.types, unit)
        return left_products(asked.genes, groups)
    except SumsError:
        return {}


def question(**changes: object) -> Question:
    values = {
        "products": True,
        "genes": GENES,
        "types": (),
        "scale": "log2p1",
        "gone": frozenset(),
        "corrected": frozenset(),
        "missing": frozenset(),
    }
    return Question(**(values | changes))  # type: ignore[arg-type]


def test_the_order_of_the_file_and_the_number_of_runs_add_nothing_to_the_record(
    tmp_path: Path,
) -> None:
    for _ in range(3):
        answers(tmp_path, question())
    turned = people(question())
    backwards = People(
        patients=turned.patients[::-1],
        values=turned.values[::-1],
        as_filed=turned.as_filed[::-1],
        genes=turned.genes,
        scale=turned.scale,
        cancer_type=turned.cancer_type[::-1],
    )
    unit = Standardisation.identity(3)

    released_sums.products(backwards, tmp_path, FLOOR, (), unit)

    assert len(list(tmp_path.glob("sums/*.safetensors"))) == 1


def test_old_sums_leave_again_under_any_standardisation_of_any_of_their_genes(
    tmp_path: Path,
) -> None:
    rng, everyone = np.random.default_rng(3), people(question())
    scale = Standardisation(mean=rng.normal(size=3), sd=rng.uniform(1, 2, 3))
    unit, some = Standardisation.identity(3), slice(1, 3)
    before = released_sums.products(everyone, tmp_path, FLOOR, ("a",), unit)
    one_less = people(question(gone=frozenset({5}), genes=("B", "C")))
    part = Standardisation(mean=scale.mean[some], sd=scale.sd[some])

    after = released_sums.products(one_less, tmp_path, FLOOR, ("a",), part)

    assert set(after) == set(before) == {"a", "others"}
    for name, sums in after.items():
        rows = [name == ("a" if t == "a" else "others") for t in TYPES]
        x: NDArray[np.float64] = (
            everyone.values[rows].astype(float) - scale.mean
        ) / scale.sd
        np.testing.assert_allclose(sums.products, (x.T @ x)[some, some], rtol=1e-9)
        np.testing.assert_allclose(sums.totals, x.sum(axis=0)[some], rtol=1e-9)


@pytest.mark.parametrize("newcomers", [FLOOR - 1, FLOOR])
def test_the_floor_of_patients_is_enough_to_be_sent_anew(
    tmp_path: Path, newcomers: int
) -> None:
    away = frozenset(range(newcomers))
    answers(tmp_path, question(products=False, gone=away))

    after = answers(tmp_path, question(products=False))

    (cohort,) = after[("A",)]
    assert len(cohort) == (N if newcomers == FLOOR else N - newcomers)
