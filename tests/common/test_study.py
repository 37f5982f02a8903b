"""The study: read once, everything wrong at once, hashed alike everywhere."""

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgex.common.data.scales import Scale
from fedgex.common.errors import ConfigError
from fedgex.common.models.gexbert import PRESETS
from fedgex.common.settings import added
from fedgex.common.study import MaskingRule, Study

WHOLE: dict[str, Any] = {
    "name": "all-phases",
    "pretraining": {"rounds": 2, "masking": {"min_rate": 0.2, "mnar": 0}},
    "classification": {"rounds": 1, "classes": ["BRCA", "KIRC"]},
    "survival": {"rounds": 3, "cancer_types": ["BRCA"], "head": "shared"},
    "strategy": {"name": "trimmed-mean", "weights": "equal"},
}


def study(**values: Any) -> Study:
    return Study.read({"name": "test"} | values, "study.toml")


def refusal(**values: Any) -> str:
    with pytest.raises(ConfigError) as error:
        study(**values)
    return str(error.value)


def test_a_study_needs_only_a_name():
    found = study()

    assert list(found.phases) == ["pretraining"]
    assert found.scale == Scale.LOG2P1


def test_unknown_missing_and_unusable_values_are_named_at_once_with_the_source():
    message = refusal(
        name="Has Spaces",
        sede=3,
        pretraining={"batch_size": 0, "epochs": 2},
        strategy={"precision": "int8"},
    )

    lines = message.splitlines()
    assert len(lines) == 6
    assert all(line.startswith("study.toml: ") for line in lines)
    for key in (
        "name",
        "sede",
        "pretraining.batch_size",
        "pretraining.epochs",
        "strategy.name: Field required",
        "strategy.precision",
    ):
        assert sum(f"study.toml: {key}" in line for line in lines) == 1, key
    assert "(found 'int8')" in message


@pytest.mark.parametrize(
    ("values", "place", "instead"),
    [
        ({"strategy": {"name": "fedyogi"}}, "strategy.name", '"fedadam"'),
        (
            {"strategy": {"name": "fedavg", "precision": "float16"}},
            "strategy.precision",
            '"float32"',
        ),
        ({"survival": {"head": "local"}}, "survival.head", '"shared"'),
        ({"classification": {"head": "local"}}, "classification.head", '"shared"'),
    ],
)
def test_what_was_retired_is_refused_with_what_to_do_instead(values, place, instead):
    (line,) = refusal(name="test", **values).splitlines()

    assert line.startswith(f"study.toml: {place}: ")
    assert "was retired; set " in line
    assert instead in line


def test_a_study_that_never_named_what_was_retired_keeps_its_hash():
    assert Study.read({"name": "x"}, "x").hash == (
        "bbcdb74c04fdd2a415b3efe986fbe71732c8f7697a92feb3609516fb6889b652"
    )


@pytest.mark.parametrize("section", ["pretraining", "classification", "survival"])
def test_a_misspelt_key_of_any_section_is_an_error(section):
    assert f"{section}.roundz" in refusal(**{section: {"roundz": 1}})


def test_the_canonical_form_goes_there_and_back():
    whole = Study.read(WHOLE, "test")

    found = Study.from_json(whole.to_json(), "message")

    assert found == whole
    assert found.hash == whole.hash


def test_the_canonical_form_is_sorted_and_without_spaces():
    text = Study.read(WHOLE, "test").to_json()

    values = json.loads(text)
    assert text == json.dumps(values, sort_keys=True, separators=(",", ":"))
    assert values["survival"]["cancer_types"] == ["BRCA"]


def test_the_hash_is_that_of_the_canonical_form():
    whole = Study.read(WHOLE, "test")

    assert whole.hash == hashlib.sha256(whole.to_json().encode()).hexdigest()


@settings(max_examples=20)
@given(st.permutations(list(WHOLE)), st.permutations(list(WHOLE["survival"])))
def test_the_order_of_keys_does_not_change_the_hash(sections, keys):
    turned = {name: WHOLE[name] for name in sections}
    turned["survival"] = {key: WHOLE["survival"][key] for key in keys}

    assert Study.read(turned, "test").hash == Study.read(WHOLE, "test").hash


def test_a_default_written_out_does_not_change_the_hash():
    assert study(seed=1, rounds={"quorum": 2}).hash == study().hash


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"seed": 2},
        {"scale": "ln1p"},
        {"pretraining": {"masking": {"mcar": 0.61}}},
        {"survival": {"interval_ends": [365]}},
        {"rounds": {"mandatory_sites": ["h1"]}},
        {"vocabulary": {"genes": ["TP53"]}},
    ],
)
def test_another_value_makes_another_hash(change):
    assert study(**change).hash != study().hash


class Later(MaskingRule):
    """As a later release might have it."""

    block: float = added(0.0, ge=0)
    """Weight of one more pattern."""


def test_a_field_that_was_added_leaves_text_and_hash_of_earlier_studies_alone():
    assert Later(block=0).to_json() == MaskingRule().to_json()
    assert Later().weights == MaskingRule().weights


def test_a_field_that_was_added_is_part_of_the_text_once_a_study_sets_it():
    set_ = Later(block=0.5)

    assert json.loads(set_.to_json()) == json.loads(MaskingRule().to_json()) | {
        "block": 0.5
    }
    assert Later.read(json.loads(set_.to_json()), "message") == set_
    assert list(set_.weights) == ["mcar", "panel", "mnar", "block"]


def test_every_section_of_a_study_has_the_text_that_it_always_had():
    """If this fails for a new field: make it `added`, or every study's hash moves."""
    full = Study.read(
        {
            "name": "full",
            "pretraining": {"rounds": 1},
            "strategy": {"name": "fedavg", "weights": "equal", "update": "delta"}
            | {"per_gene": False},
            "public": {"statistics": True},
            "privacy": {
                "patient": {"epsilon": 3, "delta": 1e-5, "clip": 1, "sample_rate": 0.1},
                "site": {"noise_multiplier": 1, "clip": 1, "delta": 1e-5},
            },
            "secure_aggregation": {},
            "rounds": {"quorum": 3},
        },
        "test",
    )

    assert full.hash == (
        "8f58a872928139c1e9318d5c56612c43c3013683fd13e446cb0c2a190670a2c4"
    )


def test_a_study_cannot_be_edited():
    with pytest.raises(ValueError, match="frozen"):
        study().seed = 2


def test_phases_without_rounds_are_left_out_and_the_others_stay_in_order():
    assert list(Study.read(WHOLE, "test").phases) == [
        "pretraining",
        "classification",
        "survival",
    ]
    later = {"pretraining": {"rounds": 0}, "survival": WHOLE["survival"]}
    assert list(study(**later).phases) == ["survival"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pretraining": {"rounds": 0}}, "no phase has any rounds"),
        (
            {"pretraining": {"masking": {"min_rate": 0.6, "max_rate": 0.5}}},
            "min_rate is above max_rate",
        ),
        (
            {"pretraining": {"masking": {"mcar": 0, "panel": 0, "mnar": 0}}},
            "the weights of mcar, panel, mnar are all zero",
        ),
        (
            {"classification": {"rounds": 1, "classes": ["a"]}},
            "classification needs two or more distinct classes",
        ),
        ({"survival": {"rounds": 1}}, "survival needs one or more cancer_types"),
        ({"survival": {"interval_ends": []}}, "must be positive and rising"),
        ({"survival": {"interval_ends": [0, 1]}}, "must be positive and rising"),
        ({"survival": {"interval_ends": [2, 1]}}, "must be positive and rising"),
        ({"survival": {"interval_ends": [1, 1]}}, "must be positive and rising"),
        (
            {"strategy": {"name": "median"}},
            'median takes no weights; set weights = "equal" and say so',
        ),
        (
            {"strategy": {"name": "trimmed-mean", "weights": "loss-terms"}},
            "trimmed-mean takes no weights",
        ),
        ({"strategy": {"name": "fedprox"}}, "fedprox needs proximal_mu above 0"),
        (
            {"strategy": {"name": "fedadam", "proximal_mu": 0.1}},
            "proximal_mu is for fedprox alone",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(values, message):
    found = refusal(**values)

    assert message in found
    assert found.startswith(f"study.toml: {next(iter(values))}") or "no phase" in found


@pytest.mark.parametrize(
    ("section", "key"), [("classification", "classes"), ("survival", "cancer_types")]
)
def test_a_type_named_twice_is_refused(section, key):
    message = refusal(**{section: {"rounds": 1, key: ["a", "b", "a"]}})

    assert f"{key} must be distinct" in message


@pytest.mark.parametrize("name", ["", "-x", "A", "a_b", "a" * 64])
def test_a_name_is_short_and_of_lower_case_letters_digits_and_hyphens(name):
    assert "study.toml: name: " in refusal(name=name)


@pytest.mark.parametrize("name", ["a", "3-sites", "a" * 63])
def test_good_names_pass(name):
    assert study(name=name).name == name


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"evaluation": {"rates": [1.5]}}, "rates must lie between 0 and 1"),
        ({"evaluation": {"panels": [0]}}, "panels must be of one gene or more"),
        ({"preset": "huge"}, "preset"),
    ],
)
def test_what_cannot_be_run_is_refused_before_the_run(changes, named):
    with pytest.raises(ConfigError, match=named):
        Study.read({"name": "x"} | changes, "test")


def test_every_preset_of_the_model_can_be_named():
    for name in PRESETS:
        assert Study.read({"name": "x", "preset": name}, "test").preset == name


def test_the_genes_of_a_study_are_distinct_symbols_in_any_order():
    genes = ("TP53", "BRCA1")

    assert study(vocabulary={"genes": genes}).vocabulary.genes == genes
    twice = {"genes": ["TP53", "BRCA1", "TP53"]}
    assert "genes must be distinct" in refusal(vocabulary=twice)
    for symbol in ("", "TP53 ", "TP53\nBRCA1"):
        assert "vocabulary.genes.0" in refusal(vocabulary={"genes": [symbol]})


def fixed(by_site: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"name": "fedavg", "weights": "fixed", "site_weights": by_site} | changes


def test_fixed_weights_are_positive_numbers_of_named_sites():
    found = study(strategy=fixed({"north": 2, "south": 0.5}))

    assert found.strategy.site_weights == {"north": 2.0, "south": 0.5}
    for weight in (0, -1, "inf", "nan"):
        message = refusal(strategy=fixed({"north": weight}))
        assert "strategy.site_weights.north" in message
    assert "strategy.site_weights.Nord" in refusal(strategy=fixed({"Nord": 1}))


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (fixed({}), 'weights = "fixed" needs site_weights'),
        (fixed({"north": 1}, weights="equal"), 'are for weights = "fixed" alone'),
        (fixed({"north": 1}, name="median"), "median takes no weights"),
        (fixed({"north": 1}, name="trimmed-mean"), "trimmed-mean takes no weights"),
    ],
)
def test_fixed_weights_are_given_where_they_are_used_and_nowhere_else(
    strategy, message
):
    assert message in refusal(strategy=strategy)


def test_the_order_of_fixed_weights_does_not_change_the_hash():
    one = study(strategy=fixed({"north": 2, "south": 1}))
    other = study(strategy=fixed({"south": 1.0, "north": 2.0}))

    assert one.hash == other.hash


DELTAS = {
    "name": "fedavg",
    "weights": "equal",
    "update": "delta",
    "per_gene": False,
}
SITE = {"site": {"noise_multiplier": 1, "clip": 1, "delta": 1e-3}}


def test_noise_on_the_mean_does_not_stand_beside_statistics_without_any():
    study(strategy=DELTAS, privacy=SITE, public={"statistics": True})

    with pytest.raises(ConfigError, match="pooled statistics would stand in the model"):
        study(strategy=DELTAS, privacy=SITE)


LINEAR: dict[str, Any] = {"cross_products": True, "linear_rank": 3}


def test_a_factor_model_tells_apart_the_types_that_the_study_names_in_their_order():
    found = study(**LINEAR, linear_types=["KIRC", "BRCA"])

    assert found.linear_types == ("KIRC", "BRCA")
    assert found.hash != study(**LINEAR, linear_types=["BRCA", "KIRC"]).hash
    assert study(**LINEAR).linear_types == ()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"linear_types": ["BRCA"]}, "linear_types are for linear_rank above 0"),
        (LINEAR | {"linear_types": ["A", "B", "A"]}, "linear_types must be distinct"),
        (LINEAR | {"linear_types": ["A", "others"]}, 'linear_types names "others"'),
    ],
)
def test_linear_types_are_distinct_types_of_a_factor_model(values, said):
    assert said in refusal(**values)


def test_a_public_cohort_and_sites_are_not_both_asked_for_cross_products():
    with pytest.raises(ConfigError, match="cross_products = false"):
        study(cross_products=True, public={"statistics": True})


PRIVATE: dict[str, Any] = {
    "privacy": {
        "patient": {"epsilon": 1, "delta": 1e-3, "clip": 1, "sample_rate": 0.5}
    },
    "public": {"statistics": True},
    "strategy": {"name": "fedavg", "weights": "equal"},
}


def test_a_study_may_promise_patients_privacy():
    assert study(**PRIVATE).privacy.patient is not None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"strategy": {"name": "fedavg", "weights": "patients"}}, "counts patients"),
        ({"public": {}}, "public.statistics = true"),
        ({"cross_products": True, "public": {}}, "cross_products = false"),
        (
            {"survival": {"rounds": 1, "cancer_types": ["BRCA"], "loss": "cox"}},
            "no sum over patients",
        ),
    ],
)
def test_what_would_tell_of_patients_beside_the_noise_is_refused(change, said):
    assert said in refusal(**PRIVATE | change)


@pytest.mark.parametrize("given", [{}, {"epsilon": 1, "noise_multiplier": 1}])
def test_privacy_is_set_by_target_or_by_noise(given):
    patient = {"delta": 1e-3, "clip": 1, "sample_rate": 0.5} | given

    message = refusal(**PRIVATE | {"privacy": {"patient": patient}})

    assert "either epsilon or noise_multiplier" in message


SUMMED: dict[str, Any] = {
    "secure_aggregation": {},
    "strategy": {"name": "fedavg", "weights": "equal", "update": "delta"},
    "rounds": {"quorum": 3},
}


def test_a_study_may_show_the_server_sums_alone():
    assert study(**SUMMED).secure_aggregation is not None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rounds": {"quorum": 2}}, "quorum to 3"),
        ({"strategy": SUMMED["strategy"] | {"name": "median"}}, "by itself"),
        ({"strategy": SUMMED["strategy"] | {"update": "parameters"}}, '"delta"'),
        ({"strategy": SUMMED["strategy"] | {"weights": "patients"}}, '"equal"'),
    ],
)
def test_what_a_sum_cannot_serve_is_refused(change, said):
    assert said in refusal(**SUMMED | change)
