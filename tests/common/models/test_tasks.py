"""Which modules each phase trains, under which names, and which of them travel."""

import json

import numpy as np
import pytest
import torch

from fedgex.common.data.cross_products import OTHERS, CrossProducts
from fedgex.common.errors import UpdateError
from fedgex.common.models import tasks
from fedgex.common.models.factor_model import NOISE_FACTOR
from fedgex.common.models.parameters import parameters
from fedgex.common.study import CLASSIFICATION, PRETRAINING, SURVIVAL, Study

V = 5
FINE_TUNING = (CLASSIFICATION, SURVIVAL)
PARTS = {"tuned": ("encoder", "head"), "frozen": ("head",)}
"""Parts that travel, by backbone."""


def study(backbone: str = "tuned", seed: int = 1) -> Study:
    how = {"rounds": 1, "backbone": backbone}
    return Study.read(
        {
            "name": "test",
            "seed": seed,
            "pretraining": {"rounds": 1},
            "classification": how | {"classes": ["BRCA", "KIRC", "LUAD"]},
            "survival": how
            | {"cancer_types": ["BRCA", "KIRC"], "interval_ends": [365, 730]},
        },
        "test",
    )


def same(a: tasks.Parameters, b: tasks.Parameters) -> bool:
    return set(a) == set(b) and all(np.array_equal(a[name], b[name]) for name in a)


def under(prefix: str, whole: tasks.Parameters) -> tasks.Parameters:
    return {
        name.removeprefix(prefix): array
        for name, array in whole.items()
        if name.startswith(prefix)
    }


def built(a_study: Study, phase: str) -> dict[str, np.ndarray]:
    """Return a phase's new parameters by name."""
    return parameters(tasks.named(phase, tasks.build(a_study, V, phase)))


def test_each_phase_builds_its_model_in_the_sizes_of_the_study():
    roots = {
        phase: {".".join(name.split(".")[:2]) for name in built(study(), phase)}
        for phase in study().phases
    }

    assert roots == {
        PRETRAINING: {"backbone.encoder", "backbone.decoder"},
        CLASSIFICATION: {"classification.encoder", "classification.head"},
        SURVIVAL: {"survival.encoder", "survival.head"},
    }
    assert tasks.new_classifier(study(), V).head.linear.out_features == 3
    assert tasks.new_survival(study(), V).head.baseline.weight.shape == (2, 2)


@pytest.mark.parametrize("phase", [PRETRAINING, *FINE_TUNING])
def test_the_studys_seed_alone_decides_the_initial_model(phase):
    before = torch.random.get_rng_state()

    first = built(study(), phase)
    torch.rand(5)
    torch.random.set_rng_state(before)
    torch.manual_seed(99)
    again = built(study(), phase)
    other = built(study(seed=2), phase)

    assert same(first, again)
    assert not same(first, other)


def test_building_leaves_the_global_generator_as_it_was():
    before = torch.random.get_rng_state()

    tasks.build(study(), V, PRETRAINING)

    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("phase", FINE_TUNING)
@pytest.mark.parametrize(("backbone", "parts"), PARTS.items())
def test_what_travels_follows_the_backbone(phase, backbone, parts):
    names = tasks.uploaded_modules(study(backbone), phase)

    assert names == tuple(f"{phase}.{part}" for part in parts)


def test_the_backbone_travels_in_pretraining():
    assert tasks.uploaded_modules(study(), PRETRAINING) == ("backbone",)


def test_a_new_model_holds_the_backbone_and_the_heads():
    start = tasks.initial(study(), V)

    kept = {".".join(name.split(".")[:2]) for name in start}
    heads = {"classification.head", "survival.head"}
    assert kept == {"backbone.encoder", "backbone.decoder"} | heads


def test_a_model_for_pretraining_alone_has_no_heads():
    alone = Study.read({"name": "test"}, "test")

    assert all(name.startswith("backbone.") for name in tasks.initial(alone, V))


@pytest.mark.parametrize("phase", FINE_TUNING)
def test_a_tuned_encoder_begins_as_a_copy_of_the_backbones(phase):
    start = tasks.initial(study(), V)

    begun = tasks.begin(study(), phase, start)

    copied = under(f"{phase}.encoder.", begun)
    assert copied
    assert same(copied, under("backbone.encoder.", start))
    assert same({name: begun[name] for name in start}, start)


def test_a_phase_that_goes_on_keeps_its_tuned_encoder():
    begun = tasks.begin(study(), SURVIVAL, tasks.initial(study(), V))
    tuned = {name: array + 1 for name, array in begun.items()}

    assert same(tasks.begin(study(), SURVIVAL, tuned), tuned)


def test_pretraining_and_a_frozen_backbone_begin_with_the_model_as_it_is():
    frozen = study(backbone="frozen")
    start = tasks.initial(frozen, V)

    for phase in frozen.phases:
        assert same(tasks.begin(frozen, phase, start), start)


def test_a_site_is_sent_the_backbone_alone_for_pretraining():
    whole = tasks.initial(study(), V)

    sent = tasks.download_state(study(), PRETRAINING, whole)

    assert same(under("backbone.", sent), under("backbone.", whole))
    assert len(sent) == len(under("backbone.", whole))


@pytest.mark.parametrize("phase", FINE_TUNING)
@pytest.mark.parametrize("backbone", PARTS)
def test_a_site_is_sent_its_encoder_and_head_and_nothing_else(phase, backbone):
    start = tasks.initial(study(backbone), V)
    whole = {
        name: array + 1 if name.startswith(f"{phase}.encoder.") else array
        for name, array in tasks.begin(study(backbone), phase, start).items()
    }

    sent = tasks.download_state(study(backbone), phase, whole)

    expected = {
        f"{phase}.encoder.{name}": array + (backbone == "tuned")
        for name, array in under("backbone.encoder.", start).items()
    }
    expected |= {k: v for k, v in whole.items() if k.startswith(f"{phase}.head.")}
    assert same(sent, expected)


@pytest.mark.parametrize("phase", [PRETRAINING, *FINE_TUNING])
def test_a_phase_is_loaded_from_a_whole_model(phase):
    begun = tasks.begin(study(), phase, tasks.initial(study(), V))
    whole = {name: array + np.float32(0.5) for name, array in begun.items()}

    loaded = parameters(tasks.named(phase, tasks.load(study(), V, phase, whole)))

    assert same(loaded, {name: whole[name] for name in loaded})


def test_a_model_without_a_head_is_not_loaded():
    whole = tasks.begin(study(), SURVIVAL, tasks.initial(study(), V))
    del whole["survival.head.own.weight"]

    with pytest.raises(UpdateError, match=r"survival\.head\.own.weight is missing"):
        tasks.load(study(), V, SURVIVAL, whole)


def with_factors(*types: str) -> Study:
    linear = {"linear_rank": 2, "linear_types": types, "cross_products": True}
    return Study.read(json.loads(study().to_json()) | linear, "test")


def products(covariance: np.ndarray, n: int) -> CrossProducts:
    """Return the sums over n patients with mean 0 and this covariance."""
    return CrossProducts(
        products=n * covariance,
        pair_counts=np.full(covariance.shape, n),
        totals=np.zeros(len(covariance)),
    )


def test_the_factor_model_explains_the_pooled_covariance():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(V, 2)) / 3
    covariance = w @ w.T + np.diag(1 - (w**2).sum(1))

    found = tasks.mixture(with_factors(), {OTHERS: products(covariance, 500)})

    loadings = found["backbone.encoder.linear.loadings"]
    noise = found["backbone.encoder.linear.noise"] / NOISE_FACTOR
    np.testing.assert_allclose(
        loadings @ loadings.T + np.diag(noise), covariance, atol=0.02
    )


@pytest.mark.parametrize("types", [(), ("BRCA", "KIRC", "LUAD")])
def test_the_factor_model_is_the_part_of_a_new_model_that_is_not_drawn(types):
    told = with_factors(*types)
    groups = {OTHERS: products(np.eye(V), 500), "KIRC": products(np.eye(V), 100)}

    found = tasks.mixture(told, groups)

    initial = tasks.initial(told, V)
    there = {name for name in initial if name.startswith("backbone.encoder.linear.")}
    assert set(found) == there
    assert all(found[name].shape == initial[name].shape for name in there)
    assert all(array.dtype == np.float32 for array in found.values())


def test_without_factors_there_is_no_factor_model():
    assert tasks.mixture(study(), {OTHERS: products(np.eye(V), 500)}) == {}


def test_a_head_reads_latents_factors_and_a_probability_of_each_linear_type():
    model = tasks.new_classifier(with_factors("BRCA", "KIRC"), V)
    genes = torch.arange(V)[None]

    vector = model.encoder.embed(genes, torch.ones(1, V), None)

    plain = tasks.new_classifier(study(), V).encoder
    more = vector.shape[1] - plain.embed(genes, torch.ones(1, V), None).shape[1]
    assert more == 2 + 2
    assert model.head(vector).shape == (1, 3)


@pytest.mark.parametrize("phase", [PRETRAINING, *FINE_TUNING])
def test_the_factor_model_goes_down_to_the_sites_and_never_back_up(phase):
    begun = tasks.begin(with_factors(), phase, tasks.initial(with_factors(), V))
    sent = tasks.download_state(with_factors(), phase, begun)

    up = tasks.upload_state(with_factors(), phase, sent)

    kept = {name.rsplit(".", 1)[1] for name in set(sent) - set(up)}
    assert kept == {"loadings", "noise", "means", "precisions", "log_shares"}
    assert all(".encoder.linear." in name for name in set(sent) - set(up))
    assert set(up) < set(sent)
