"""A draft pins the keys of who takes part, and asks for secure aggregation."""

from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from fedgex.common.errors import ConfigError
from fedgex.common.trust import pki
from fedgex.common.trust.contract import Contract, remaining
from fedgex.server.consortium import drafts, members

SITES = ("east", "north", "south")


@pytest.fixture
def new(
    admitted: Any, drafted: dict[str, Path], ask: Callable[..., Any]
) -> Callable[..., Contract]:
    """Return a function that drafts a contract of a study between three hospitals."""
    asked = ask("east")
    members.add_site(admitted.consortium, asked.path, asked.fingerprint)

    def make(study: str = "", **changed: Any) -> Contract:
        drafted["study"].write_text(drafted["study"].read_text() + study)
        terms = {
            "purpose": "restoration of three genes",
            "expires": date(2999, 12, 31),
            "sites": SITES,
            "administrators": 2,
        } | changed
        text = drafts.draft(
            admitted.consortium, drafted["study"], drafted["genes"], **terms
        )
        return Contract.from_toml(text, "the draft")

    return make


def test_the_keys_of_hospitals_and_administrators_are_pinned(
    new: Callable[..., Contract], admitted: Any
) -> None:
    contract, consortium = new(), admitted.consortium

    assert contract.site_keys == {
        name: pki.fingerprint(pki.from_pem(consortium.site(name).certificate))
        for name in SITES
    }
    assert contract.administrator_keys == {
        name: pki.fingerprint(admitted.key(name).public_key()) for name in ("ada", "bo")
    }


def test_secure_aggregation_is_asked_for_with_what_it_needs(
    new: Callable[..., Contract],
) -> None:
    study = new().study

    assert study.secure_aggregation is not None
    assert (study.strategy.weights, study.strategy.update) == ("equal", "delta")
    assert study.rounds.quorum == 3


def test_a_reason_leaves_it_out_and_stands_in_what_remains(
    new: Callable[..., Contract],
) -> None:
    contract = new(no_secure_aggregation="two of us share a server")

    assert contract.study.secure_aggregation is None
    assert contract.study.strategy.weights == "patients"
    assert "(two of us share a server)" in remaining(contract)[0]


@pytest.mark.parametrize(
    ("study", "why"),
    [
        ('[study.strategy]\nname = "median"\nweights = "equal"\n', "use a mean"),
        ('[study.strategy]\nname = "fedavg"\nweights = "patients"\n', "weights"),
        ("[study.rounds]\nquorum = 2\n", "quorum"),
    ],
)
def test_a_study_that_cannot_have_it_is_refused_with_what_to_do(
    new: Callable[..., Contract], study: str, why: str
) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        new(study)

    assert "give a reason with --no-secure-aggregation" in str(caught.value)


def test_two_hospitals_are_too_few(new: Callable[..., Contract]) -> None:
    with pytest.raises(ConfigError, match="3, more than the 2 sites"):
        new(sites=SITES[:2])


def test_a_reason_against_what_the_study_asks_for_is_refused(
    new: Callable[..., Contract],
) -> None:
    study = (
        '[study.secure_aggregation]\n[study.strategy]\nname = "fedavg"\n'
        'weights = "equal"\nupdate = "delta"\n[study.rounds]\nquorum = 3\n'
    )
    with pytest.raises(ConfigError, match="gives a reason, and the study asks for it"):
        new(study, no_secure_aggregation="a reason")


def test_a_hospital_that_is_not_in_the_consortium_is_refused_at_once(
    new: Callable[..., Contract],
) -> None:
    with pytest.raises(ConfigError, match="munich: no active hospital of alliance"):
        new(sites=("north", "south", "munich"))


def test_what_remains_names_how_many_must_collude(
    new: Callable[..., Contract],
) -> None:
    # Of three hospitals all three must be left to unmask: 2 * 3 - 3.
    assert "with which 3 or more hospitals" in remaining(new())[0]


def test_retired_symbols_are_written_as_the_current_ones(
    new: Callable[..., Contract], drafted: dict[str, Path]
) -> None:
    drafted["genes"].write_text("MARCH1\nTP53\n")

    assert new().study.vocabulary.genes == ("MARCHF1", "TP53")
    assert drafts.retired_genes(drafted["genes"]) == {"MARCH1": "MARCHF1"}


def test_a_gene_under_two_of_its_names_is_refused(
    new: Callable[..., Contract], drafted: dict[str, Path]
) -> None:
    drafted["genes"].write_text("MARCH1\nMARCHF1\nTP53\n")

    with pytest.raises(ConfigError, match="MARCH1, MARCHF1 are retired and current"):
        new()
