"""What three sites come to together equals what their patients come to in one place."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedgex.client.training import local_round
from fedgex.common.arrays import PER_GENE
from fedgex.common.data.cross_products import CrossProducts
from fedgex.common.data.dataset import Patients
from fedgex.common.data.moments import GeneMoments, pool
from fedgex.common.federation import Update
from fedgex.common.models import tasks, training
from fedgex.common.study import PRETRAINING, Study
from fedgex.server.federation.strategy import combine

N_GENES = 9
SIZES = {"h1": 4, "h2": 7, "h3": 13}
RATE = 0.5

Parameters = dict[str, NDArray[np.float32]]


def study(**strategy: Any) -> Study:
    """Return a study whose round is one full-batch step of plain gradient descent."""
    return Study.model_validate(
        {
            "name": "pooled",
            "pretraining": {
                "rounds": 1,
                "optimizer": "sgd",
                "learning_rate": RATE,
                "weight_decay": 0,
                "max_grad_norm": 1e9,
                "batch_size": 1000,
            },
            "strategy": {"name": "fedavg", "weights": "loss-terms", **strategy},
        }
    )


def hide_by_row(values: Tensor, measured: Tensor, *_: object) -> Tensor:
    """Hide what is above the patient's own mean, so that batches do not matter."""
    return measured & (values > values.nanmean(dim=1, keepdim=True))


@pytest.fixture(autouse=True)
def _hidden_cells_depend_on_the_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "draw_hidden", hide_by_row)


def patients(seed: int, n: int, lacking: tuple[int, ...] = ()) -> Patients:
    values = torch.randn(n, N_GENES, generator=torch.Generator().manual_seed(seed))
    values[:, list(lacking)] = torch.nan
    return Patients(
        values=values,
        cancer_type=(None,) * n,
        duration=torch.full((n,), torch.nan),
        event=torch.full((n,), torch.nan),
        clinical=torch.zeros(n, 2),
    )


def pooled(sites: dict[str, Patients]) -> Patients:
    """Return all patients in one place."""
    everybody = list(sites.values())
    return Patients(
        values=torch.cat([site.values for site in everybody]),
        cancer_type=tuple(t for site in everybody for t in site.cancer_type),
        duration=torch.cat([site.duration for site in everybody]),
        event=torch.cat([site.event for site in everybody]),
        clinical=torch.cat([site.clinical for site in everybody]),
    )


def step(
    rules: Study, site: str, own: Patients, incoming: Parameters, folder: Path
) -> Update:
    """Train one round at a site, as its ClientApp does."""
    result = local_round.train_round(
        rules,
        PRETRAINING,
        1,
        own,
        incoming,
        site=site,
        min_cell_count=1,
        state_dir=folder,
    )
    return Update(
        site=site,
        arrays=result.update,
        num_examples=result.report.num_examples,
        num_loss_terms=result.report.num_loss_terms,
        measured=own.measured.any(dim=0).numpy(),
    )


def read(update: Update, incoming: Parameters) -> dict[str, NDArray[np.floating]]:
    return {name: update.arrays[name] for name in incoming}


@pytest.mark.parametrize("form", ["parameters", "delta"])
def test_one_full_batch_step_over_three_sites_equals_the_pooled_step(
    tmp_path: Path, form: str
) -> None:
    rules = study(update=form)
    incoming = tasks.initial(rules, N_GENES)
    sites = {s: patients(i, n) for i, (s, n) in enumerate(SIZES.items())}
    updates = [step(rules, s, own, incoming, tmp_path) for s, own in sites.items()]
    assert len({u.num_loss_terms / u.num_examples for u in updates}) > 1

    together, _ = combine(rules.strategy, incoming, updates, 1, {})

    in_one_place = read(
        step(study(), "all", pooled(sites), incoming, tmp_path), incoming
    )
    for name, array in together.items():
        np.testing.assert_allclose(
            array, in_one_place[name], rtol=1e-6, atol=1e-6, err_msg=name
        )
    moved = max(np.abs(together[name] - incoming[name]).max() for name in incoming)
    assert moved > 1e-2  # the step was one


def test_the_comparison_notices_sites_that_count_by_something_else(
    tmp_path: Path,
) -> None:
    rules = study(weights="equal")
    incoming = tasks.initial(rules, N_GENES)
    sites = {s: patients(i, n) for i, (s, n) in enumerate(SIZES.items())}
    updates = [step(rules, s, own, incoming, tmp_path) for s, own in sites.items()]

    together, _ = combine(rules.strategy, incoming, updates, 1, {})

    in_one_place = read(step(rules, "all", pooled(sites), incoming, tmp_path), incoming)
    largest = max(np.abs(together[k] - in_one_place[k]).max() for k in incoming)
    assert largest > 1e-3


def test_a_site_that_lacks_a_gene_does_not_pull_that_genes_row(tmp_path: Path) -> None:
    rules = study()
    incoming = tasks.initial(rules, N_GENES)
    lacking = {"h1": (0, 1, 8), "h2": (2, 8), "h3": (0, 8)}  # nobody has gene 8
    sites = {s: patients(i, n, lacking[s]) for i, (s, n) in enumerate(SIZES.items())}
    updates = {s: step(rules, s, own, incoming, tmp_path) for s, own in sites.items()}
    trained = {s: read(update, incoming) for s, update in updates.items()}
    terms = {s: update.num_loss_terms for s, update in updates.items()}

    together, _ = combine(rules.strategy, incoming, list(updates.values()), 1, {})

    by_gene = [name for name in incoming if name.endswith(PER_GENE)]
    assert len(by_gene) == len(PER_GENE)
    for name in by_gene:
        for gene in range(N_GENES):
            having = [s for s in SIZES if gene not in lacking[s]]
            if having:
                expected = sum(terms[s] * trained[s][name][gene] for s in having)
                expected = expected / sum(terms[s] for s in having)
            else:
                expected = incoming[name][gene]
            np.testing.assert_allclose(
                together[name][gene], expected, rtol=1e-6, atol=1e-6
            )
        np.testing.assert_array_equal(together[name][8], incoming[name][8])
    # Gene 0 is measured at h2 alone: its row is that of h2, as if h2 were alone.
    question = "backbone.decoder.question.weight"
    np.testing.assert_allclose(
        together[question][0], trained["h2"][question][0], rtol=1e-6
    )
    assert (together[question][0] != incoming[question][0]).any()


def test_parameters_that_all_genes_share_are_averaged_over_all_sites(
    tmp_path: Path,
) -> None:
    rules = study()
    incoming = tasks.initial(rules, N_GENES)
    lacking = {"h1": (0, 1), "h2": (2,), "h3": (0,)}
    sites = {s: patients(i, n, lacking[s]) for i, (s, n) in enumerate(SIZES.items())}
    updates = [step(rules, s, own, incoming, tmp_path) for s, own in sites.items()]

    together, _ = combine(rules.strategy, incoming, updates, 1, {})

    # Hidden cells add up whatever the panels, so the shared step is the pooled one.
    in_one_place = read(step(rules, "all", pooled(sites), incoming, tmp_path), incoming)
    for name, array in together.items():
        if not name.endswith(PER_GENE):
            np.testing.assert_allclose(
                array, in_one_place[name], rtol=1e-6, atol=1e-6, err_msg=name
            )


def cells_with_gaps() -> dict[str, NDArray[np.float64]]:
    rng = np.random.default_rng(5)
    sites = {
        site: rng.normal(8, 3, size=(n, 5)) + 4 * i
        for i, (site, n) in enumerate(SIZES.items())
    }
    for values in sites.values():
        values[rng.random(values.shape) < 0.2] = np.nan
    sites["h1"][:, 3] = np.nan  # a gene that one site lacks
    return sites


def test_pooled_moments_are_those_of_the_pooled_patients() -> None:
    sites = cells_with_gaps()
    everybody = np.concatenate(list(sites.values()))

    moments = pool(GeneMoments.of(values) for values in sites.values())

    assert moments.n_patients == 24
    np.testing.assert_array_equal(moments.count, (~np.isnan(everybody)).sum(axis=0))
    np.testing.assert_allclose(moments.mean, np.nanmean(everybody, axis=0), rtol=1e-6)
    np.testing.assert_allclose(moments.sd, np.nanstd(everybody, axis=0), rtol=1e-6)


def test_pooled_cross_products_are_the_covariance_of_the_pooled_patients() -> None:
    rng = np.random.default_rng(6)
    mix = rng.normal(size=(5, 5))
    sites = [rng.normal(i, 1, size=(n, 5)) @ mix for i, n in enumerate(SIZES.values())]
    everybody = np.concatenate(sites)
    mean, sd = everybody.mean(axis=0), everybody.std(axis=0)

    products = pool(CrossProducts.of((values - mean) / sd) for values in sites)

    np.testing.assert_allclose(
        products.covariance(), np.corrcoef(everybody, rowvar=False), rtol=1e-6
    )
