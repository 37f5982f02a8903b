"""Which modules each phase trains, under which names, and which of them travel."""

import json

import numpy as np
import pytest
import torch

from fedgex.common import tasks
from fedgex.common.errors import UpdateError
from fedgex.common.model import Encoder, GexBert
from fedgex.common.models.heads import ClassificationHead, SurvivalHead
from fedgex.common.parameters import parameters
from fedgex.common.start import NOISE_FACTOR
from fedgex.common.statistics import OTHERS, CrossProducts
from fedgex.common.study import CLASSIFICATION, PRETRAINING, SURVIVAL, Study

V = 5
FINE_TUNING = (CLASSIFICATION, SURVIVAL)
COMBINATIONS = {
    ("tuned", "shared"): ("encoder", "head"),
    ("tuned", "local"): ("encoder",),
    ("frozen", "shared"): ("head",),
}
"""Parts that travel, by backbone and head; neither would leave nothing to learn."""


def study(backbone: str = "tuned", head: str = "shared", seed: int = 1) -> Study:
    how = {"rounds": 1, "backbone": backbone, "head": head}
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


def test_each_phase_builds_its_modules_in_the_sizes_of_the_study():
    built = {phase: tasks.build(study(), V, phase) for phase in study().phases}

    assert {phase: tuple(modules) for phase, modules in built.items()} == {
        PRETRAINING: ("backbone",),
        CLASSIFICATION: ("classification.encoder", "classification.head"),
        SURVIVAL: ("survival.encoder", "survival.head"),
    }
    assert isinstance(built[PRETRAINING]["backbone"], GexBert)
    assert isinstance(built[SURVIVAL]["survival.encoder"], Encoder)
    classification = built[CLASSIFICATION]["classification.head"]
    survival = built[SURVIVAL]["survival.head"]
    assert isinstance(classification, ClassificationHead)
    assert isinstance(survival, SurvivalHead)
    assert classification.linear.out_features == 3
    assert survival.baseline.weight.shape == (2, 2)


@pytest.mark.parametrize("phase", [PRETRAINING, *FINE_TUNING])
def test_the_studys_seed_alone_decides_the_initial_model(phase):
    before = torch.random.get_rng_state()

    first = parameters(tasks.build(study(), V, phase))
    torch.rand(5)
    torch.random.set_rng_state(before)
    torch.manual_seed(99)
    again = parameters(tasks.build(study(), V, phase))
    other = parameters(tasks.build(study(seed=2), V, phase))

    assert same(first, again)
    assert not same(first, other)


def test_building_leaves_the_global_generator_as_it_was():
    before = torch.random.get_rng_state()

    tasks.build(study(), V, PRETRAINING)

    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("phase", FINE_TUNING)
@pytest.mark.parametrize(("how", "parts"), COMBINATIONS.items())
def test_what_travels_follows_backbone_and_head(phase, how, parts):
    names = tasks.travelling(study(*how), phase)

    assert names == tuple(f"{phase}.{part}" for part in parts)


def test_the_backbone_travels_in_pretraining():
    assert tasks.travelling(study(), PRETRAINING) == ("backbone",)


@pytest.mark.parametrize("head", ["shared", "local"])
def test_a_new_model_holds_the_backbone_and_the_heads_that_travel(head):
    start = tasks.initial(study(head=head), V)

    kept = {".".join(name.split(".")[:2]) for name in start}
    heads = {"classification.head", "survival.head"} if head == "shared" else set()
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

    sent = tasks.sent(study(), PRETRAINING, whole)

    assert same(under("backbone.", sent), under("backbone.", whole))
    assert len(sent) == len(under("backbone.", whole))


@pytest.mark.parametrize("phase", FINE_TUNING)
@pytest.mark.parametrize("how", COMBINATIONS)
def test_a_site_is_sent_its_encoder_and_a_shared_head_and_nothing_else(phase, how):
    backbone, head = how
    start = tasks.initial(study(*how), V)
    whole = {
        name: array + 1 if name.startswith(f"{phase}.encoder.") else array
        for name, array in tasks.begin(study(*how), phase, start).items()
    }

    sent = tasks.sent(study(*how), phase, whole)

    expected = {
        f"{phase}.encoder.{name}": array + (backbone == "tuned")
        for name, array in under("backbone.encoder.", start).items()
    }
    if head == "shared":
        expected |= {k: v for k, v in whole.items() if k.startswith(f"{phase}.head.")}
    assert same(sent, expected)


@pytest.mark.parametrize("phase", [PRETRAINING, *FINE_TUNING])
def test_a_phase_is_loaded_from_a_whole_model(phase):
    begun = tasks.begin(study(), phase, tasks.initial(study(), V))
    whole = {name: array + np.float32(0.5) for name, array in begun.items()}

    loaded = parameters(tasks.load(study(), V, phase, whole))

    assert same(loaded, {name: whole[name] for name in loaded})


def test_a_head_that_stayed_at_its_site_cannot_be_loaded_from_the_model():
    local = study(head="local")
    whole = tasks.begin(local, SURVIVAL, tasks.initial(local, V))

    with pytest.raises(UpdateError, match=r"survival\.head\.own.weight is missing"):
        tasks.load(local, V, SURVIVAL, whole)


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


def test_the_linear_start_explains_the_pooled_covariance():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(V, 2)) / 3
    covariance = w @ w.T + np.diag(1 - (w**2).sum(1))

    found = tasks.linear_start(with_factors(), {OTHERS: products(covariance, 500)})

    loadings = found["backbone.encoder.linear.loadings"]
    noise = found["backbone.encoder.linear.noise"] / NOISE_FACTOR
    np.testing.assert_allclose(
        loadings @ loadings.T + np.diag(noise), covariance, atol=0.02
    )


@pytest.mark.parametrize("types", [(), ("BRCA", "KIRC", "LUAD")])
def test_the_linear_start_is_the_part_of_a_new_model_that_is_not_drawn(types):
    told = with_factors(*types)
    groups = {OTHERS: products(np.eye(V), 500), "KIRC": products(np.eye(V), 100)}

    found = tasks.linear_start(told, groups)

    initial = tasks.initial(told, V)
    there = {name for name in initial if name.startswith("backbone.encoder.linear.")}
    assert set(found) == there
    assert all(found[name].shape == initial[name].shape for name in there)
    assert all(array.dtype == np.float32 for array in found.values())


def test_without_factors_there_is_no_linear_start():
    assert tasks.linear_start(study(), {OTHERS: products(np.eye(V), 500)}) == {}


def test_a_head_reads_latents_factors_and_a_probability_of_each_linear_type():
    built = tasks.build(with_factors("BRCA", "KIRC"), V, CLASSIFICATION)
    genes = torch.arange(V)[None]

    vector = built["classification.encoder"].embed(genes, torch.ones(1, V), None)

    plain = tasks.build(study(), V, CLASSIFICATION)["classification.encoder"]
    more = vector.shape[1] - plain.embed(genes, torch.ones(1, V), None).shape[1]
    assert more == 2 + 2
    assert built["classification.head"](vector).shape == (1, 3)


@pytest.mark.parametrize("phase", [PRETRAINING, *FINE_TUNING])
def test_the_linear_start_goes_down_to_the_sites_and_never_back_up(phase):
    begun = tasks.begin(with_factors(), phase, tasks.initial(with_factors(), V))
    sent = tasks.sent(with_factors(), phase, begun)

    up = tasks.updated(with_factors(), phase, sent)

    kept = {name.rsplit(".", 1)[1] for name in set(sent) - set(up)}
    assert kept == {"loadings", "noise", "means", "precisions", "log_shares"}
    assert all(".encoder.linear." in name for name in set(sent) - set(up))
    assert set(up) < set(sent)


def test_of_a_local_head_nothing_goes_up():
    local = study(head="local")
    arrays = parameters(tasks.build(local, V, SURVIVAL))

    up = tasks.updated(local, SURVIVAL, arrays)

    assert up
    assert all(name.startswith("survival.encoder.") for name in up)
