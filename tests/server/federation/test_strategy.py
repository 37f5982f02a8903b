import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from fedgex.common import study
from fedgex.common.arrays import PER_GENE, Arrays
from fedgex.common.errors import UpdateError
from fedgex.common.federation import Update
from fedgex.common.models.gexbert import GexBert, preset
from fedgex.common.models.parameters import parameters
from fedgex.common.study import SitePrivacy, StrategyRule
from fedgex.common.transport.records import packed, to_record
from fedgex.server.federation import strategy
from fedgex.server.federation.strategy import Spooled, combine

GENES = "backbone.encoder.tokens.identity.weight"  # a row for each gene, (4, 2)
SHARED = "backbone.encoder.norm.weight"  # (3,)
SHAPES = {GENES: (4, 2), SHARED: (3,)}

Floats = dict[str, NDArray[np.float32]]


def rule(name: str, **settings: Any) -> StrategyRule:
    return StrategyRule.model_validate({"name": name, **settings})


def random_arrays(seed: int) -> Floats:
    rng = np.random.default_rng(seed)
    return {k: rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}


def constant(value: float) -> Floats:
    return {name: np.full(s, value, dtype=np.float32) for name, s in SHAPES.items()}


def update(
    folder: Path,
    site: str,
    arrays: Arrays,
    *,
    patients: int = 10,
    terms: int = 10,
    measured: Sequence[int] = (1, 1, 1, 1),
) -> Update:
    path = folder / f"{site}.safetensors"
    path.write_bytes(packed(to_record(arrays)))
    return Update(
        site=site,
        arrays=Spooled(path),
        num_examples=patients,
        num_loss_terms=terms,
        measured=np.array(measured, dtype=bool),
    )


def as_bytes(arrays: Arrays) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in arrays.items()}


EVERY_RULE = [
    rule("fedavg"),
    rule("fedavg", weights="loss-terms", per_gene=False),
    rule("fedprox", proximal_mu=0.1, update="delta"),
    rule("trimmed-mean", weights="equal", trim_share=0.25),
    rule("median", weights="equal"),
    rule("fedadam"),
]


@pytest.mark.parametrize("a_rule", EVERY_RULE, ids=lambda r: r.name)
@settings(deadline=None, max_examples=15)
@given(order=st.permutations(range(6)))
def test_the_order_of_updates_changes_no_bit(
    a_rule: StrategyRule, tmp_path_factory: pytest.TempPathFactory, order: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("spool")
    # Two pairs of sites all but cancel, so that a sum in another order shows.
    sizes = (1e15, -1e15, 1e12, -1e12, 1.0, 1.0)
    updates = [
        update(
            folder,
            f"h{i}",
            {k: np.float32(size) * v for k, v in random_arrays(i // 2).items()},
            patients=10 + 37 * (i // 2),
            terms=7 * (i // 2) + 1,
            measured=(1, i % 2, i > 2, 0),
        )
        for i, size in enumerate(sizes)
    ]
    incoming = random_arrays(99)

    in_order = combine(a_rule, incoming, updates, 1, {})
    shuffled = combine(a_rule, incoming, [updates[i] for i in order], 1, {})

    assert as_bytes(in_order[0]) == as_bytes(shuffled[0])
    assert as_bytes(in_order[1]) == as_bytes(shuffled[1])


@pytest.mark.parametrize("a_rule", EVERY_RULE, ids=lambda r: r.name)
def test_float32_stays_float32_and_every_parameter_comes_back(
    a_rule: StrategyRule, tmp_path: Path
) -> None:
    updates = [update(tmp_path, f"h{i}", random_arrays(i)) for i in range(4)]

    new, _ = combine(a_rule, random_arrays(9), updates, 1, {})

    assert {name: array.shape for name, array in new.items()} == SHAPES
    assert all(array.dtype == np.float32 for array in new.values())


@pytest.mark.parametrize(
    ("weights", "expected"),
    [("patients", 3.0), ("loss-terms", 1.0), ("equal", 2.0)],
)
def test_a_site_counts_by_what_the_rule_names(
    tmp_path: Path, weights: str, expected: float
) -> None:
    updates = [
        update(tmp_path, "a", constant(0.0), patients=10, terms=30),
        update(tmp_path, "b", constant(4.0), patients=30, terms=10),
    ]

    new, _ = combine(rule("fedavg", weights=weights), constant(9.0), updates, 1, {})

    for array in new.values():
        np.testing.assert_array_equal(array, expected)


def test_only_rows_of_genes_are_averaged_by_gene(tmp_path: Path) -> None:
    updates = [
        update(tmp_path, "a", constant(0.0), patients=10, measured=(1, 1, 0, 0)),
        update(tmp_path, "b", constant(4.0), patients=30, measured=(1, 0, 1, 0)),
    ]

    by_gene, _ = combine(rule("fedavg"), constant(9.0), updates, 1, {})
    plain, _ = combine(rule("fedavg", per_gene=False), constant(9.0), updates, 1, {})

    assert by_gene[GENES].tolist() == [[3, 3], [0, 0], [4, 4], [9, 9]]
    assert by_gene[SHARED].tolist() == [3, 3, 3]
    assert plain[GENES].tolist() == [[3, 3]] * 4
    assert plain[SHARED].tolist() == [3, 3, 3]


def test_exactly_the_parameters_with_a_row_for_each_gene_count_as_such() -> None:
    n_genes = 37  # no other dimension of the model is 37
    model = parameters({"backbone": GexBert(preset("tiny", n_genes))})

    with_rows = {name for name, array in model.items() if array.shape[0] == n_genes}

    assert with_rows == {name for name in model if name.endswith(PER_GENE)}
    assert len(with_rows) == len(PER_GENE)


def test_the_median_by_gene_needs_no_weights(tmp_path: Path) -> None:
    updates = [
        update(tmp_path, site, constant(x), patients=n, measured=m)
        for site, x, n, m in (
            ("a", 1.0, 10, (1, 1, 0, 0)),
            ("b", 2.0, 10_000, (1, 1, 1, 0)),
            ("c", 7.0, 10, (1, 0, 0, 0)),
        )
    ]

    new, _ = combine(rule("median", weights="equal"), constant(9.0), updates, 1, {})

    assert new[GENES].tolist() == [[2, 2], [1.5, 1.5], [2, 2], [9, 9]]
    assert new[SHARED].tolist() == [2, 2, 2]


def test_the_trimmed_mean_cuts_off_the_share_of_the_rule(tmp_path: Path) -> None:
    values = {"a": -1e6, "b": 1.0, "c": 2.0, "d": 6.0, "e": 1e6}
    updates = [update(tmp_path, site, constant(x)) for site, x in values.items()]
    a_rule = rule("trimmed-mean", weights="equal", trim_share=0.2)

    new, _ = combine(a_rule, constant(9.0), updates, 1, {})

    np.testing.assert_array_equal(new[SHARED], 3.0)
    np.testing.assert_array_equal(new[GENES], 3.0)


def test_changes_come_to_the_same_as_parameters(tmp_path: Path) -> None:
    incoming = random_arrays(0)
    trained = {site: random_arrays(i) for i, site in enumerate("abc", start=1)}
    whole = [update(tmp_path, f"{s}-whole", trained[s]) for s in "abc"]
    change = [
        update(tmp_path, f"{s}-change", {k: v - incoming[k] for k, v in arrays.items()})
        for s, arrays in trained.items()
    ]

    by_parameters, _ = combine(rule("fedavg"), incoming, whole, 1, {})
    by_change, _ = combine(rule("fedavg", update="delta"), incoming, change, 1, {})

    for name, array in by_parameters.items():
        np.testing.assert_allclose(by_change[name], array, rtol=1e-6, atol=1e-6)


def test_adaptive_steps_are_those_of_reddi_et_al(tmp_path: Path) -> None:
    """Algorithm 2 of Reddi et al. (2021), written naively, over three rounds.

    Moments begin at zero. FedAdam's learning rate is Flower's, with the bias
    correction of Kingma and Ba (2014) for a count that begins at 2.
    """
    eta, beta_1, beta_2, tau = 0.05, 0.8, 0.95, 1e-2
    a_rule = rule(
        "fedadam", server_learning_rate=eta, beta_1=beta_1, beta_2=beta_2, tau=tau
    )
    x: dict[str, NDArray[np.float64]] = {
        k: v.astype(np.float64) for k, v in random_arrays(0).items()
    }
    m = {k: np.zeros_like(v) for k, v in x.items()}
    v = {k: np.zeros_like(array) for k, array in x.items()}
    model: Arrays = random_arrays(0)
    state: Arrays = {}

    for t in (1, 2, 3):
        sites = {s: random_arrays(10 * t + i) for i, s in enumerate("ab")}
        updates = [
            update(tmp_path, s, arrays, patients=n)
            for (s, arrays), n in zip(sites.items(), (10, 30), strict=True)
        ]
        rate = eta * np.sqrt(1 - beta_2 ** (t + 1)) / (1 - beta_1 ** (t + 1))
        for k in x:
            mean = 0.25 * sites["a"][k].astype(float) + 0.75 * sites["b"][k]
            delta = mean - x[k]
            m[k] = beta_1 * m[k] + (1 - beta_1) * delta
            v[k] = beta_2 * v[k] + (1 - beta_2) * delta**2
            x[k] = x[k] + rate * m[k] / (np.sqrt(v[k]) + tau)

        new, state = combine(a_rule, model, updates, t, state)  # type: ignore[arg-type]
        save_file(dict(state), tmp_path / "state")
        model, state = new, load_file(tmp_path / "state")

        for k in x:
            np.testing.assert_allclose(model[k], x[k], rtol=1e-4, atol=1e-5)


AS_FLOWER = (
    "0ac97742db6fc502b70a0813521c13c33e1f84ce24ac9561a9d52b471de0199d",
    "04259f44a065f2f50e8e803a629a4e1d5038d6a3442c884ffcc4d55fc4cd6475",
    "1a732b732cc280311cabeea08502e5d28708038f18249b6f746605f4a6361233",
    "37a5dd05252d58f89d667fd8f04647b824dbc990ab8a369eb3d865bde4632942",
    "3d90787b89822461e88a48bca0cf322849f5c923321b787a95b2110975fac646",
)
"""SHA-256 of model and moments after each of five rounds of Flower 1.41's FedAdam."""


def test_fedadam_has_the_bits_of_flowers(tmp_path: Path) -> None:
    adam = rule("fedadam", server_learning_rate=0.05, beta_1=0.8, beta_2=0.95, tau=1e-2)
    model: Floats = random_arrays(0)
    state: Arrays = {}

    for t, expected in enumerate(AS_FLOWER, start=1):
        updates = [
            update(
                tmp_path, s, random_arrays(10 * t + i), patients=n, measured=measured
            )
            for i, (s, n, measured) in enumerate(
                [("a", 10, (1, 1, 1, 0)), ("b", 30, (1, 0, 1, 0))]
            )
        ]
        new, state = combine(adam, model, updates, t, state)
        save_file(dict(state), tmp_path / "state")
        model, state = new, load_file(tmp_path / "state")  # type: ignore[assignment]

        found = hashlib.sha256()
        for name, array in sorted({**model, **state}.items()):
            found.update(f"{name} {array.dtype} {array.shape}".encode())
            found.update(array.tobytes())
        assert found.hexdigest() == expected, f"round {t}"


def test_every_rule_that_a_study_may_name_has_its_strategy() -> None:
    assert set(strategy.MEANS) == set(study.MEANS)
    assert set(strategy.ROBUST) == set(study.ROBUST)


def test_an_adaptive_step_leaves_the_row_of_a_gene_that_nobody_measured(
    tmp_path: Path,
) -> None:
    incoming = random_arrays(0)
    updates = [
        update(tmp_path, s, random_arrays(i), measured=(1, 1, 1, 0))
        for i, s in enumerate("ab", start=1)
    ]

    new, _ = combine(rule("fedadam"), incoming, updates, 1, {})

    np.testing.assert_array_equal(new[GENES][3], incoming[GENES][3])
    assert (new[GENES][:3] != incoming[GENES][:3]).all()


def test_a_mean_leaves_no_state_behind(tmp_path: Path) -> None:
    _, state = combine(
        rule("fedavg"), constant(0), [update(tmp_path, "a", constant(1))], 1, {}
    )

    assert state == {}


def test_a_spooled_update_is_read_back_bit_by_bit(tmp_path: Path) -> None:
    arrays = random_arrays(3)
    arrays["transposed"] = np.arange(6, dtype=np.float32).reshape(2, 3).T

    spooled = update(tmp_path, "a", arrays)

    for name, array in arrays.items():
        np.testing.assert_array_equal(spooled.arrays[name], array)


def test_a_spooled_update_is_a_mapping_in_order_of_name(tmp_path: Path) -> None:
    spooled = update(tmp_path, "a", random_arrays(3)).arrays

    assert list(spooled) == sorted(SHAPES)
    assert len(spooled) == len(SHAPES)
    assert SHARED in spooled
    assert "other" not in spooled
    assert 3 not in spooled
    with pytest.raises(KeyError, match="other"):
        spooled["other"]


@pytest.mark.parametrize("content", [b"", b"no arrays", b"\xff" * 64])
def test_a_spooled_file_of_other_bytes_is_refused(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)

    with pytest.raises(UpdateError, match=r"^the arrays cannot be read$"):
        Spooled(tmp_path / "a.safetensors")


def test_an_array_in_a_format_that_numpy_lacks_is_refused_by_name_and_no_other(
    tmp_path: Path,
) -> None:
    header = (
        b'{"brain":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]},'
        b'"other":{"dtype":"F16","shape":[1],"data_offsets":[2,4]}}'
    )
    one = np.float16(1).tobytes()
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + one + one)

    spooled = Spooled(tmp_path / "a")

    assert spooled["other"].tolist() == [1]
    with pytest.raises(UpdateError, match=r"^brain cannot be read$"):
        spooled["brain"]


def test_fixed_weights_count_whatever_the_number_of_patients(tmp_path: Path) -> None:
    fixed = rule("fedavg", weights="fixed", site_weights={"a": 3, "b": 1, "away": 9})
    updates = [
        update(tmp_path, "a", constant(1), patients=10, terms=5),
        update(
            tmp_path, "b", constant(5), patients=990, terms=7, measured=(1, 1, 1, 0)
        ),
    ]

    new, _ = combine(fixed, constant(0), updates, 1, {})

    np.testing.assert_allclose(new[SHARED], 2.0)  # (3 * 1 + 1 * 5) / 4
    np.testing.assert_allclose(new[GENES][:3], 2.0)
    np.testing.assert_allclose(new[GENES][3], 1.0)  # b did not measure the gene


def test_a_site_without_a_fixed_weight_is_refused_by_its_name(tmp_path: Path) -> None:
    fixed = rule("fedavg", weights="fixed", site_weights={"a": 3, "b": 1})
    updates = [update(tmp_path, site, constant(1)) for site in ("a", "c")]

    with pytest.raises(UpdateError, match=r'site "c" has no fixed weight.* a, b'):
        combine(fixed, constant(0), updates, 1, {})


def test_noise_is_put_on_the_mean_once_whatever_the_number_of_sites(
    tmp_path: Path,
) -> None:
    wide = {"shared": np.zeros((100, 100), np.float32)}
    deltas = rule("fedavg", weights="equal", update="delta", per_gene=False)
    changes = {k: np.full(a.shape, 0.25, np.float32) for k, a in wide.items()}
    updates = [update(tmp_path, f"site-{i}", changes) for i in range(4)]
    privacy = SitePrivacy(noise_multiplier=3.0, clip=2.0, delta=1e-3)

    new, _ = combine(deltas, wide, updates, 1, {}, privacy)

    noise = new["shared"].astype(np.float64) - 0.25
    assert noise.std() == pytest.approx(3.0 * 2.0 / 4, rel=0.05)
    assert abs(noise.mean()) < 0.1


def test_a_server_optimiser_sees_the_mean_with_its_noise_alone(tmp_path: Path) -> None:
    still = constant(0.0)
    adam = rule("fedadam", weights="equal", update="delta", per_gene=False)
    privacy = SitePrivacy(noise_multiplier=3.0, clip=2.0, delta=1e-3)

    _, state = combine(adam, still, [update(tmp_path, "a", still)], 1, {}, privacy)

    # without noise nothing moves and every first moment is 0
    assert all(moment.all() for name, moment in state.items() if "first/" in name)
