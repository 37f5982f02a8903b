"""Before the first round, too, a site whose answer is no use is left out alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict

import fedgex.client.app
from fedgex.common import keys
from fedgex.common.data.moments import GeneMoments, Standardisation
from fedgex.common.transport.records import to_arrays, to_record

if TYPE_CHECKING:
    from .conftest import Consortium, Finished

BAD = 1
"""Position of the site that answers nonsense, in order of name."""
SHORT: dict[str, Any] = {
    "pretraining": {"rounds": 1},
    "classification": {"rounds": 0},
    "survival": {"rounds": 0},
}

Tamper = Callable[[RecordDict], None]


def says(key: str, value: Any) -> Tamper:
    """Return what makes a site introduce itself with another value."""

    def tamper(reply: RecordDict) -> None:
        reply.config_records[keys.SITE][key] = value

    return tamper


def says_nothing(reply: RecordDict) -> None:
    for name in list(reply):
        del reply[name]


def sends(record: str, key: str, change: Callable[[Any], Any]) -> Tamper:
    """Return what changes one array of a reply."""

    def tamper(reply: RecordDict) -> None:
        arrays = to_arrays(reply.array_records[record])
        reply[record] = to_record(arrays | {key: change(arrays[key])})

    return tamper


def one_gene_less(record: str) -> Tamper:
    def tamper(reply: RecordDict) -> None:
        arrays = to_arrays(reply.array_records[record])
        reply[record] = to_record({k: array[:-1] for k, array in arrays.items()})

    return tamper


def one_gene_less_in_the_triangle(reply: RecordDict) -> None:
    arrays = to_arrays(reply.array_records[keys.PRODUCTS])
    size = int(np.sqrt(2 * arrays["others/products"].size))
    length = size * (size - 1) // 2
    cut = {
        k: a[: size - 1 if k == "others/totals" else length] for k, a in arrays.items()
    }
    reply[keys.PRODUCTS] = to_record(cut)


def of_no_group(reply: RecordDict) -> None:
    reply[keys.PRODUCTS] = to_record({})


def of_group(name: str) -> Tamper:
    """Return what sends a site's cross-products as those of another group, too."""

    def tamper(reply: RecordDict) -> None:
        arrays = to_arrays(reply.array_records[keys.PRODUCTS])
        more = {k.replace("others", name, 1): array for k, array in arrays.items()}
        reply[keys.PRODUCTS] = to_record(arrays | more)

    return tamper


def lacks(record: str, key: str) -> Tamper:
    """Return what takes one array out of a reply."""

    def tamper(reply: RecordDict) -> None:
        arrays = to_arrays(reply.array_records[record])
        del arrays[key]
        reply[record] = to_record(arrays)

    return tamper


def counts_a_list(reply: RecordDict) -> None:
    reply.metric_records[keys.METRICS][keys.NUM_PATIENTS] = [20, 20]


def with_nan(array: Any) -> Any:
    return np.full(array.shape, np.nan)


@pytest.fixture
def conduct(
    consortium: Consortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, Tamper], Finished]:
    """Run one round, with one site's answer to one message tampered with."""
    honest = fedgex.client.app.app

    def conduct(message_type: str, tamper: Tamper) -> Finished:
        def app(message: Message, context: Context) -> Message:
            reply = honest(message, context)
            asked = message.metadata.message_type == message_type
            if asked and consortium.names[BAD] in str(context.node_config["site-toml"]):
                tamper(reply.content)
            return reply

        monkeypatch.setattr(fedgex.client.app, "app", app)
        return consortium.conduct(consortium.study(**SHORT), tmp_path / "a" / "run")

    return conduct


@pytest.mark.parametrize(
    "tamper",
    [
        pytest.param(says_nothing, id="nothing"),
        pytest.param(says("name", 7), id="name is a number"),
        pytest.param(says("name", ""), id="name is empty"),
        pytest.param(says("name", "../../stolen"), id="name is a path"),
        pytest.param(says("name", "a\nb"), id="name has a line break"),
        pytest.param(says(keys.NUM_PATIENTS, "many"), id="patients are a word"),
        pytest.param(says(keys.NUM_PATIENTS, 9), id="patients below the floor"),
        pytest.param(says("genes", "GENE0001"), id="genes are a word"),
        pytest.param(says("genes", [1, 2]), id="genes are numbers"),
    ],
)
def test_a_site_that_cannot_introduce_itself_takes_no_part(
    consortium: Consortium, conduct: Callable[..., Finished], tamper: Tamper
) -> None:
    run = conduct(keys.PREPARE, tamper)

    (left_out,) = run.events("not-answered")
    assert left_out["state"] == "quarantined"
    others = [name for i, name in enumerate(consortium.names) if i != BAD]
    assert run.events("run-started")[0]["sites"] == others
    assert set(run.events("round")[0]["sites"]) == set(others)
    assert run.events("run-finished")


def test_a_site_cannot_name_a_file_outside_the_run(
    conduct: Callable[..., Finished],
) -> None:
    run = conduct(keys.PREPARE, says("name", "../../stolen"))

    beside = {path.name for path in run.run_dir.parent.iterdir()}
    assert beside == {run.run_dir.name}


@pytest.mark.parametrize(
    "tamper",
    [
        pytest.param(says_nothing, id="nothing"),
        pytest.param(sends(keys.MOMENTS, "total", with_nan), id="NaN"),
        pytest.param(sends(keys.MOMENTS, "count", with_nan), id="counts are NaN"),
        pytest.param(sends(keys.MOMENTS, "count", lambda a: a + 999), id="too many"),
        pytest.param(sends(keys.MOMENTS, "total", lambda a: a[:3]), id="misshapen"),
        pytest.param(one_gene_less(keys.MOMENTS), id="one gene less"),
        pytest.param(counts_a_list, id="patients are a list"),
    ],
)
def test_statistics_that_are_no_use_are_left_out_of_the_pool(
    consortium: Consortium,
    conduct: Callable[..., Finished],
    tamper: Tamper,
) -> None:
    run = conduct(keys.STATISTICS, tamper)

    (left_out,) = run.events("not-answered")
    assert left_out["site"] == consortium.names[BAD]
    assert left_out["state"] == "quarantined"
    assert left_out["reason"].startswith("the reply cannot be used: ")
    genes = run.final.vocabulary.genes
    honest = [
        to_arrays(e.reply.array_records[keys.MOMENTS])
        for e in run.exchanges
        if e.message_type == keys.STATISTICS and e.site != consortium.names[BAD]
    ]
    assert len(honest) == 3
    pooled = GeneMoments(
        count=sum(np.maximum(site["count"], 0) for site in honest),  # -1: suppressed
        total=sum(site["total"] for site in honest),
        square_total=sum(site["square-total"] for site in honest),
        n_patients=999,
    )
    expected = Standardisation.published(pooled)
    np.testing.assert_allclose(run.final.standardisation.mean, expected.mean)
    assert len(genes) == len(pooled.total)


@pytest.mark.parametrize(
    "tamper",
    [
        pytest.param(says_nothing, id="nothing"),
        pytest.param(sends(keys.PRODUCTS, "others/products", with_nan), id="NaN"),
        pytest.param(sends(keys.PRODUCTS, "others/totals", with_nan), id="totals NaN"),
        pytest.param(
            sends(keys.PRODUCTS, "others/totals", lambda a: a[:-1]), id="totals short"
        ),
        pytest.param(
            sends(keys.PRODUCTS, "others/pair-counts", lambda a: a - a - 2),
            id="counts below nought",
        ),
        pytest.param(lacks(keys.PRODUCTS, "others/totals"), id="no totals"),
        pytest.param(of_no_group, id="no group"),
        pytest.param(of_group("type-1"), id="a type that the study does not name"),
        pytest.param(of_group(""), id="a group without a name"),
        pytest.param(one_gene_less(keys.PRODUCTS), id="no triangle"),
        pytest.param(one_gene_less_in_the_triangle, id="one gene less"),
    ],
)
def test_cross_products_that_are_no_use_are_left_out_of_the_pool(
    consortium: Consortium,
    conduct: Callable[..., Finished],
    tamper: Tamper,
) -> None:
    run = conduct(keys.CROSS_PRODUCTS, tamper)

    (left_out,) = run.events("not-answered")
    assert left_out["site"] == consortium.names[BAD]
    assert left_out["state"] == "quarantined"
    assert (run.run_dir / "covariance.safetensors").is_file()
    assert run.events("run-finished")
