"""The fitted mixture of factor models against the one that patients were drawn from."""

from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import softmax
from scipy.stats import multivariate_normal

from fedgex.common.data.cross_products import OTHERS, CrossProducts, pool_types
from fedgex.common.models import factor_model
from fedgex.common.models.factor_model import MixtureOfFactorAnalyzers

V, R = 24, 2
TYPES = ("a", "b", "c")
SIZES = {"a": 4000, "b": 2000, "c": 2000}
RANK = R + len(TYPES) - 1
"""Of the covariance of all: factors, and the plane through the three means."""
NOISE = 0.3

Array = NDArray[np.float64]


@cache
def truth() -> tuple[Array, dict[str, Array], dict[str, Array]]:
    """Return loadings (V, R), and each type's mean (V,) and factor covariance."""
    rng = np.random.default_rng(1)
    means = {name: rng.normal(size=V) / 3 for name in TYPES}
    spreads = {"a": [1.5, 0.05], "b": [0.05, 1.5], "c": [0.4, 0.4]}
    factors = {name: np.diag(spread) for name, spread in spreads.items()}
    return rng.normal(size=(V, R)) / 1.5, means, factors


def draw(name: str, n: int, seed: int) -> Array:
    """Return n patients of a type, shape (n, V)."""
    loadings, means, factors = truth()
    rng = np.random.default_rng([seed, ord(name)])
    z = rng.multivariate_normal(np.zeros(R), factors[name], size=n)
    return means[name] + z @ loadings.T + np.sqrt(NOISE) * rng.normal(size=(n, V))


def within(name: str) -> Array:
    """Return a type's true covariance."""
    loadings, _, factors = truth()
    covariance: Array = loadings @ factors[name] @ loadings.T + NOISE * np.eye(V)
    return covariance


@cache
def groups() -> dict[str, CrossProducts]:
    sample = {name: draw(name, n, 0) for name, n in SIZES.items()}
    centre = np.concatenate(list(sample.values())).mean(axis=0)
    return {name: CrossProducts.of(x - centre) for name, x in sample.items()}


def centre() -> Array:
    """Return the true mean of all: patients are centred before sums are taken."""
    share = 1 / sum(SIZES.values())
    return sum(share * n * truth()[1][name] for name, n in SIZES.items())


def module(found: dict[str, NDArray[np.float32]]) -> MixtureOfFactorAnalyzers:
    n_components, n_genes = found["means"].shape
    made = MixtureOfFactorAnalyzers(n_genes, found["loadings"].shape[1], n_components)
    made.load_state_dict({k: torch.from_numpy(a) for k, a in found.items()})
    return made


def squared_error(restored: Array, patients: Array, hidden: list[int]) -> float:
    return float(np.mean((restored - patients[:, hidden]) ** 2))


def conditional(
    mean: Array, cov: Array, x: Array, seen: list[int], hidden: list[int]
) -> Array:
    """Return the mean of hidden genes given those seen, shape (N, hidden)."""
    off = np.linalg.solve(cov[np.ix_(seen, seen)], (x[:, seen] - mean[seen]).T)
    return mean[hidden] + (cov[np.ix_(hidden, seen)] @ off).T


def by_the_truth(x: Array, seen: list[int], hidden: list[int]) -> tuple[Array, Array]:
    """Return what the true mixture restores, and its responsibilities (N, K)."""
    means = {name: mean - centre() for name, mean in truth()[1].items()}
    joint = [
        np.log(SIZES[name])
        + multivariate_normal.logpdf(
            x[:, seen], means[name][seen], within(name)[np.ix_(seen, seen)]
        )
        for name in TYPES
    ]
    weights = softmax(np.stack(joint, axis=1), axis=1)
    each = [conditional(means[n], within(n), x, seen, hidden) for n in TYPES]
    return np.einsum("nk,knq->nq", weights, np.stack(each)), weights


@pytest.fixture
def model_holds(monkeypatch):
    """Take the noise as fitted: these patients are drawn from the very model."""
    monkeypatch.setattr(factor_model, "NOISE_FACTOR", 1.0)


def test_the_fit_recovers_means_shares_and_covariances_of_the_types():
    found = factor_model.fit(groups(), TYPES, RANK)

    for k, name in enumerate(TYPES):
        mean = truth()[1][name] - centre()
        np.testing.assert_allclose(found["means"][k], mean, atol=0.06)
        share = SIZES[name] / sum(SIZES.values())
        assert np.exp(found["log_shares"][k]) == pytest.approx(share)
        noise = np.diag(found["noise"] / factor_model.NOISE_FACTOR)
        factors = np.linalg.inv(found["precisions"][k])
        own = found["loadings"] @ factors @ found["loadings"].T + noise
        off = [np.linalg.norm(own - within(other)) for other in TYPES]
        assert off[k] < 0.15 * np.linalg.norm(within(name))
        assert min(off[:k] + off[k + 1 :]) > 0.6 * np.linalg.norm(within(name))


@pytest.mark.parametrize("n_seen", [3, 8, 16])
def test_the_fit_restores_nearly_as_well_as_the_truth_and_better_than_one_normal(
    n_seen, model_holds
):
    x = np.concatenate([draw(name, n // 4, 1) for name, n in SIZES.items()]) - centre()
    seen, hidden = list(range(n_seen)), list(range(n_seen, V))
    linear = module(factor_model.fit(groups(), TYPES, RANK))
    genes, asked = (torch.tensor([each] * len(x)) for each in (seen, hidden))

    known = linear(genes, torch.from_numpy(x[:, seen]).float(), None)
    found = squared_error(linear.restore(known, asked).numpy(), x, hidden)

    best, weights = by_the_truth(x, seen, hidden)
    total = np.cov(np.concatenate([draw(n, SIZES[n], 0) for n in TYPES]), rowvar=False)
    single = conditional(np.zeros(V), total, x, seen, hidden)
    assert found < 1.02 * squared_error(best, x, hidden)
    assert found < 0.97 * squared_error(single, x, hidden)
    np.testing.assert_allclose(
        known.log_weights.exp().mean(0), weights.mean(0), atol=0.05
    )


def test_the_types_of_new_patients_are_inferred_nearly_as_well_as_by_the_truth(
    model_holds,
):
    linear = module(factor_model.fit(groups(), TYPES, RANK))

    for k, name in enumerate(TYPES):
        x = draw(name, 500, 2) - centre()
        genes = torch.arange(V).expand(500, -1)
        known = linear(genes, torch.from_numpy(x).float(), None)
        right = np.mean(known.log_weights.argmax(1).numpy() == k)
        _, weights = by_the_truth(x, list(range(V)), [0])
        assert right > 0.8
        assert right > np.mean(weights.argmax(1) == k) - 0.04


def test_without_types_there_is_one_component_of_mean_nought_and_unit_factors():
    found = factor_model.fit(groups(), (), RANK)

    x = np.concatenate([draw(name, n, 0) for name, n in SIZES.items()])
    covariance = np.cov(x, rowvar=False, ddof=0)
    implied = found["loadings"] @ found["loadings"].T
    implied += np.diag(found["noise"]) / factor_model.NOISE_FACTOR
    np.testing.assert_allclose(implied, covariance, atol=0.05)
    assert not found["means"].any()
    np.testing.assert_array_equal(found["precisions"], np.eye(RANK)[None])
    assert found["log_shares"].tolist() == [0]


def test_a_type_of_few_patients_has_nearly_the_covariance_within_all_types():
    few = groups() | {"c": CrossProducts.of(draw("c", 3, 0) - centre())}

    found = factor_model.fit(few, TYPES, RANK)

    n = {"a": SIZES["a"], "b": SIZES["b"], "c": 3}
    shared = sum(n[name] * within(name) for name in TYPES) / sum(n.values())
    factors = np.linalg.inv(found["precisions"][2])
    own = found["loadings"] @ factors @ found["loadings"].T
    own += np.diag(found["noise"] / factor_model.NOISE_FACTOR)
    assert np.linalg.norm(own - shared) < 0.15 * np.linalg.norm(shared)


def test_a_type_that_nobody_tells_of_has_no_share_and_no_weight():
    nothing = CrossProducts.of(np.full((20, V), np.nan))
    more = groups() | {OTHERS: groups()["c"], "e": nothing}
    told = {name: sums for name, sums in more.items() if name != "c"}

    found = factor_model.fit(told, ("d", "b", "a", "e"), RANK)

    assert found["log_shares"][[0, 3]].tolist() == [factor_model.NEVER] * 2
    np.testing.assert_allclose(
        np.exp(found["log_shares"]), [0, 1 / 3, 2 / 3, 0], atol=1e-6
    )
    assert not found["means"][[0, 3]].any()
    x = torch.from_numpy(draw("a", 9, 3) - centre()).float()
    known = module(found)(torch.arange(V).expand(9, -1), x, None)
    assert not known.log_weights.exp()[:, [0, 3]].any()


def test_where_nobody_tells_of_any_type_one_normal_for_all_is_left():
    told = {OTHERS: CrossProducts.of(np.concatenate([draw(n, 500, 0) for n in TYPES]))}
    x = torch.from_numpy(draw("a", 5, 3)).float()
    genes, asked = torch.arange(9).expand(5, -1), torch.arange(9, V).expand(5, -1)

    several, one = (
        module(factor_model.fit(told, types, RANK)) for types in (TYPES, ())
    )

    torch.testing.assert_close(
        several.restore(several(genes, x[:, :9], None), asked),
        one.restore(one(genes, x[:, :9], None), asked),
    )


def test_genes_that_a_type_or_everybody_lacks_leave_the_fit_finite():
    x = {name: draw(name, 200, 0) for name in TYPES}
    x["b"][:, 0] = np.nan
    for values in x.values():
        values[:, 1] = np.nan

    found = factor_model.fit(
        {n: CrossProducts.of(v) for n, v in x.items()}, TYPES, V + 5
    )

    assert all(np.isfinite(array).all() for array in found.values())
    assert found["means"][1, 0] == 0
    np.testing.assert_allclose(found["loadings"][1], 0, atol=1e-9)
    values = torch.from_numpy(np.nan_to_num(x["a"])).float()
    known = module(found)(torch.arange(V).expand(200, -1), values, None)
    assert known.factors.isfinite().all()
    assert known.log_weights.isfinite().all()


# ---- sites that measure different genes ----


def site_sums(seed: int, genes: list[int] | None = None) -> dict[str, CrossProducts]:
    """Return one site's sums of two types and of others, of some genes."""
    sums = {}
    of_site = [name for i, name in enumerate(TYPES) if i != seed % len(TYPES)]
    for name in (*of_site, OTHERS):
        x = draw("a" if name == OTHERS else name, 12, seed) - centre()
        if genes is not None:
            x[:, [g for g in range(V) if g not in genes]] = np.nan
        sums[name] = CrossProducts.of(x)
    return sums


def other_panels() -> list[dict[str, CrossProducts]]:
    """Return the sums of sites of which each measures two thirds of the genes."""
    rng = np.random.default_rng(0)
    panels = [sorted(rng.choice(V, 2 * V // 3, replace=False)) for _ in range(8)]
    return [site_sums(seed, genes) for seed, genes in enumerate(panels)]


def test_where_all_have_all_genes_nothing_is_completed():
    sites = [site_sums(1), site_sums(2)]

    found = factor_model.pool_completed(lambda: sites, TYPES, RANK)

    expected = pool_types(sites)
    assert found.keys() == expected.keys()
    for name, sums in found.items():
        assert np.array_equal(sums.products, expected[name].products)
        assert np.array_equal(sums.pair_counts, expected[name].pair_counts)


def test_groups_whose_sums_are_suppressed_do_not_ask_for_completion(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sites = [site_sums(1), site_sums(2)]
    few = CrossProducts.of(draw("a", 2, 5) - centre()).suppressed(9)
    sites[1][OTHERS] = few
    asked: list[str] = []
    monkeypatch.setattr(factor_model, "fit", lambda *_: asked.append("fit"))

    found = factor_model.pool_completed(lambda: sites, TYPES, RANK)

    assert asked == []
    assert np.array_equal(found["a"].products, pool_types(sites)["a"].products)


def test_sums_are_completed_as_each_patient_of_the_group_would_be():
    genes = [g for g in range(V) if g % 3]
    seen, lacked = genes, [g for g in range(V) if g not in genes]
    model = factor_model.fit(groups(), TYPES, RANK)
    x = draw("b", 50, 7)
    known = x.copy()
    known[:, lacked] = np.nan

    found = factor_model._completed(CrossProducts.of(known), "b", model, TYPES)

    k = TYPES.index("b")
    loadings = model["loadings"].astype(float)
    noise = model["noise"] * factor_model.COMPLETED_NOISE / factor_model.NOISE_FACTOR
    of_factors = np.linalg.inv(model["precisions"][k].astype(float))
    cov = loadings @ of_factors @ loadings.T + np.diag(noise)
    mean = model["means"][k].astype(float)
    filled = x.copy()
    filled[:, lacked] = conditional(mean, cov, x, seen, lacked)
    left = cov[np.ix_(lacked, lacked)] - cov[np.ix_(lacked, seen)] @ np.linalg.solve(
        cov[np.ix_(seen, seen)], cov[np.ix_(seen, lacked)]
    )
    products = filled.T @ filled
    products[np.ix_(lacked, lacked)] += 50 * left
    assert found.products == pytest.approx(products, abs=1e-3)
    assert found.totals == pytest.approx(filled.sum(axis=0), abs=1e-3)
    assert (found.pair_counts == 50).all()


def test_completed_sums_lose_little_of_what_the_genes_that_sites_lack_would_tell():
    sites = other_panels()
    x = np.concatenate([draw(name, 200, 99) for name in TYPES]) - centre()
    hidden = list(range(0, V, 2))
    seen = [g for g in range(V) if g not in hidden]
    errors = {}
    for name, sums in {
        "full": pool_types([site_sums(seed) for seed in range(len(sites))]),
        "completed": factor_model.pool_completed(lambda: sites, TYPES, RANK),
        "pairs": pool_types(sites),
    }.items():
        made = module(factor_model.fit(sums, TYPES, RANK))
        there = torch.tensor(seen).expand(len(x), -1)
        known = made(there, torch.tensor(x[:, seen], dtype=torch.float32), None)
        restored = made.restore(known, torch.tensor(hidden).expand(len(x), -1))
        errors[name] = squared_error(restored.numpy(), x, hidden)

    lost = {name: error - errors["full"] for name, error in errors.items()}
    assert 0 < lost["completed"] < lost["pairs"] / 2


def test_a_pair_that_no_patient_of_a_site_has_leaves_the_completion_finite():
    x = draw("a", 40, 3) - centre()
    x[:, 5] = np.nan
    x[:20, 0] = np.nan
    x[20:, 1] = np.nan
    model = factor_model.fit(groups(), TYPES, RANK)

    found = factor_model._completed(CrossProducts.of(x), "a", model, TYPES)

    assert np.isfinite(found.products).all()
    assert found.products == pytest.approx(found.products.T)


def test_without_factors_sums_stay_what_the_sites_sent():
    sites = other_panels()

    found = factor_model.pool_completed(lambda: sites, TYPES, 0)

    assert np.array_equal(found["a"].products, pool_types(sites)["a"].products)


def test_restored_values_do_not_depend_on_mixed_precision() -> None:
    model = MixtureOfFactorAnalyzers(V, R, len(TYPES))
    fitted = factor_model.fit(groups(), TYPES, R)
    model.load_state_dict({name: torch.tensor(x) for name, x in fitted.items()})
    genes = torch.arange(V).expand(5, V)
    values = torch.tensor(draw("a", 5, 3), dtype=torch.float32)

    known = model(genes, values, None)
    plain = model.restore(known, genes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model.restore(known, genes)

    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, plain, rtol=0, atol=0)
