"""What a hospital never gives in secure aggregation, whatever the coordinator asks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedgex.client.settings import SiteSettings
from fedgex.client.training import secure_round
from fedgex.client.training.secure_round import ExchangeError
from fedgex.client.training.secure_state import AttemptState
from fedgex.common import keys
from fedgex.common.arrays import PER_GENE
from fedgex.common.data.moments import Standardisation
from fedgex.common.data.vocabulary import Vocabulary
from fedgex.common.messages.fields import (
    AdvertisedKeys,
    Attempt,
    Round,
    TrainingMetrics,
)
from fedgex.common.messages.replies import TrainReply
from fedgex.common.messages.requests import (
    ConfirmRequest,
    CrossProductsRequest,
    KeysRequest,
    SharesRequest,
    StatisticsRequest,
    TrainRequest,
    UnmaskRequest,
)
from fedgex.common.secure_aggregation.protocol import PrivateKeys
from fedgex.common.secure_aggregation.vectors import FixedPoint
from fedgex.common.study import Study
from fedgex.common.transport.records import to_arrays, to_record
from fedgex.common.trust import pki
from fedgex.common.trust.audit_log import Head
from fedgex.common.trust.receipt import Part, reply_digest
from fedgex.common.trust.signed import sign

NAMES = ("east", "north", "south", "west")
GENES = 4
VOCABULARY = Vocabulary(("EGFR", "KRAS", "MYC", "TP53"))
ROWS = f"backbone.{PER_GENE[0]}"
CLIP = 10.0
STUDY = Study.read(
    {
        "name": "test",
        "pretraining": {"rounds": 3},
        "classification": {"rounds": 1, "classes": ["a", "b"]},
        "strategy": {"name": "fedavg", "update": "delta", "weights": "equal"},
        "secure_aggregation": {"clip": CLIP},
        "rounds": {"quorum": 3},
    },
    "test",
)


Asked = TypeVar("Asked", bound=StatisticsRequest)


@dataclass
class Coordinator:
    """Asks four hospitals what it likes; by default what the protocol says."""

    folder: Path
    phase: str = "pretraining"
    number: int = 1
    attempt: int = 1
    study: Study = STUDY
    panels: dict[str, list[int]] = field(default_factory=dict)
    model: float = 0.0
    """What the sites train on."""
    trained: Counter[str] = field(default_factory=Counter)
    keys: dict[str, dict[str, str]] = field(default_factory=dict)
    boxes: dict[str, dict[str, str]] = field(default_factory=dict)
    records: dict[str, Any] = field(default_factory=dict)
    """What every message holds besides."""

    def settings(self, name: str) -> SiteSettings:
        return SiteSettings.model_construct(name=name, state_dir=self.folder / name)

    def update(self, name: str) -> dict[str, NDArray[np.float32]]:
        """Return what a site would answer in the open."""
        rng = np.random.default_rng(NAMES.index(name))
        return {
            ROWS: rng.normal(0, 1, (GENES, 2)).astype(np.float32),
            "other": rng.normal(0, 1, 3).astype(np.float32),
        }

    def asked(self, kind: type[Asked], **records: Any) -> Asked:
        """Return a request as a site reads it."""
        told = {keys.ATTEMPT: self.attempt, "run": "run-1"}
        record = ConfigRecord(told | records.pop("lists", {}))
        order = Round(phase=self.phase, number=self.number)
        asked = KeysRequest(
            study=self.study,
            vocabulary=VOCABULARY,
            standardisation=Standardisation.identity(GENES),
            round=order,
            attempt=Attempt(attempt=1, run=""),
        ).to_records()
        if not issubclass(kind, CrossProductsRequest):
            del asked[keys.STANDARDISATION]
        return kind.from_records(
            RecordDict({**asked, keys.EXCHANGE: record, **self.records, **records})
        )

    # ---- the steps, each of one site ----

    def advertise(self, name: str) -> ConfigRecord:
        panel = np.array(self.panels.get(name, [1] * GENES), dtype=np.bool_)
        advertise = secure_round.advertise(lambda request, settings: panel)
        reply = advertise(self.asked(KeysRequest), self.settings(name))
        return reply.to_records().config_records[keys.PUBLIC_KEYS]

    def share(
        self, name: str, told: Mapping[str, Mapping[str, str]] | None = None
    ) -> dict[str, str]:
        told = self.keys if told is None else told
        lines = {name: json.dumps(each) for name, each in told.items()}
        record = ConfigRecord(dict(lines))
        request = self.asked(SharesRequest, **{keys.PUBLIC_KEYS: record})
        return hexadecimal(secure_round.share(request, self.settings(name)).boxes)

    def train(
        self,
        name: str,
        sharers: Collection[str] = NAMES,
        boxes: Mapping[str, str] | None = None,
    ) -> RecordDict:
        own = {s: self.boxes[s][name] for s in sharers if s != name}
        model = to_record({"model": np.full(3, self.model, dtype=np.float32)})
        scale = {"mean": np.zeros(GENES), "sd": np.ones(GENES)}
        request = self.asked(
            TrainRequest,
            lists={"sharers": list(sharers)},
            **{
                keys.BOXES: ConfigRecord(dict(own if boxes is None else boxes)),
                keys.STANDARDISATION: to_record(scale),
                keys.MODEL: model,
            },
        )

        @secure_round.masked
        def train(request: TrainRequest, settings: SiteSettings) -> TrainReply:
            self.trained[settings.name] += 1
            update = to_record(self.update(settings.name))
            return TrainReply(update=update, metrics=TrainingMetrics(num_examples=20))

        return train(request, self.settings(name)).to_records()

    def confirm(
        self, name: str, survivors: Collection[str] = NAMES, sharers: Any = NAMES
    ) -> dict[str, str]:
        lists = {"sharers": list(sharers), "survivors": list(survivors)}
        request = self.asked(ConfirmRequest, lists=lists)
        reply = secure_round.confirm(request, self.settings(name))
        return hexadecimal(reply.confirmations)

    def unmask(
        self,
        name: str,
        tags: Mapping[str, Mapping[str, str]],
        survivors: Collection[str] = NAMES,
        sharers: Any = NAMES,
    ) -> tuple[set[str], set[str]]:
        """Return for whose seed and for whose mask key the site gave a share."""
        lists = {"sharers": list(sharers), "survivors": list(survivors)}
        own = {sender: each[name] for sender, each in tags.items() if sender != name}
        record = ConfigRecord(dict(own))
        request = self.asked(UnmaskRequest, lists=lists, **{keys.CONFIRMATIONS: record})
        reply = secure_round.unmask(request, self.settings(name))
        return set(reply.seeds), set(reply.masks)

    # ---- the steps of all ----

    def make_keys(self, names: Collection[str] = NAMES) -> None:
        self.keys = {name: passed_on(self.advertise(name)) for name in names}

    def collect(self) -> dict[str, RecordDict]:
        """Come as far as masked updates."""
        self.make_keys()
        self.boxes = {name: self.share(name) for name in NAMES}
        return {name: self.train(name) for name in NAMES}

    def finish(self, survivors: Collection[str] = NAMES) -> None:
        """Come to the end, with these survivors."""
        tags = {name: self.confirm(name, survivors) for name in survivors}
        for name in survivors:
            self.unmask(name, tags, survivors)


def passed_on(advertised: ConfigRecord) -> dict[str, str]:
    """Return what the server tells the others of a site's keys."""
    return {key: str(v) for key, v in advertised.items() if key != keys.ATTEMPT}


def hexadecimal(parts: Mapping[str, bytes]) -> dict[str, str]:
    return {name: part.hex() for name, part in parts.items()}


def other_keys(measured: NDArray[np.bool_]) -> ConfigRecord:
    public = PrivateKeys.new().public(measured)
    return ConfigRecord(AdvertisedKeys.of(public, 1).encode())


@pytest.fixture
def coordinator(tmp_path: Path) -> Coordinator:
    return Coordinator(tmp_path)


def words(reply: RecordDict) -> list[int]:
    found = to_arrays(reply.array_records[keys.MASKED])[keys.MASKED]
    assert found.dtype == np.uint32
    return [int(x) for x in found]


# ---- what is sent ----


def test_masked_updates_differ_from_the_plain_ones_and_add_up_to_their_sum(
    coordinator: Coordinator,
) -> None:
    """Without seeds: masks of pairs cancel, so take the own masks off by hand."""
    replies = coordinator.collect()
    from fedgex.common.secure_aggregation import protocol

    total = np.zeros(GENES * 2 + 3, dtype=np.uint32)
    for name, reply in replies.items():
        assert keys.UPDATE not in reply
        mine = np.array(words(reply), dtype=np.uint32)
        state = AttemptState.read(coordinator.folder / name / "secagg/run-1")
        assert state is not None
        seed = protocol._own_seed(state.group, name, state.private.seed)
        protocol._add(mine, seed, -1)
        total += mine
    plain = sum(
        np.concatenate([coordinator.update(n)[k].ravel() for k in (ROWS, "other")])
        for n in NAMES
    )
    fixed = FixedPoint(CLIP, len(NAMES))
    np.testing.assert_allclose(fixed.decode(total), plain, atol=2 * fixed.step)


def test_the_numbers_beside_an_update_leave_as_they_are(
    coordinator: Coordinator,
) -> None:
    reply = coordinator.collect()["east"]
    assert set(reply) == {keys.MASKED, keys.METRICS, keys.WITHHELD}


def test_private_state_is_readable_by_its_owner_alone(coordinator: Coordinator) -> None:
    coordinator.collect()
    files = [
        path for path in (coordinator.folder / "east").rglob("*") if path.is_file()
    ]
    assert len(files) == 2
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


def test_the_next_rounds_keys_replace_what_was_kept(coordinator: Coordinator) -> None:
    coordinator.collect()
    folder = coordinator.folder / "east"
    before = (folder / "secagg/run-1/exchange.json").read_text()
    secrets = json.loads(before)["private"].values()

    coordinator.number = 2
    coordinator.advertise("east")

    left = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert not any(secret.encode() in left for secret in secrets)
    assert not list(folder.rglob("*.reply"))


def test_a_study_in_the_open_is_not_masked(coordinator: Coordinator) -> None:
    values = json.loads(STUDY.to_json()) | {"secure_aggregation": None}
    coordinator.study = Study.read(values, "test")
    coordinator.boxes = {name: dict.fromkeys(NAMES, "") for name in NAMES}
    assert keys.UPDATE in coordinator.train("east")


# ---- asked again ----


def test_asked_again_a_site_answers_the_same_and_trains_once(
    coordinator: Coordinator,
) -> None:
    first = coordinator.collect()
    boxes = coordinator.boxes
    second = coordinator.collect()
    assert coordinator.boxes == boxes
    assert {n: words(r) for n, r in first.items()} == {
        n: words(r) for n, r in second.items()
    }
    assert coordinator.trained == dict.fromkeys(NAMES, 1)


def test_another_attempt_masks_the_same_update_anew(coordinator: Coordinator) -> None:
    first = coordinator.collect()
    coordinator.attempt = 2
    second = coordinator.collect()
    for name in NAMES:
        assert not set(words(first[name])) & set(words(second[name]))
    assert coordinator.trained == dict.fromkeys(NAMES, 1)


def test_another_attempt_on_another_model_is_refused(coordinator: Coordinator) -> None:
    coordinator.collect()
    coordinator.attempt, coordinator.model = 2, 1.0
    coordinator.make_keys()
    coordinator.boxes = {name: coordinator.share(name) for name in NAMES}
    with pytest.raises(ExchangeError, match="trained on one model"):
        coordinator.train("east")


def test_an_earlier_attempt_is_not_answered_once_a_later_one_began(
    coordinator: Coordinator,
) -> None:
    coordinator.collect()
    coordinator.attempt = 2
    coordinator.advertise("east")
    coordinator.attempt = 1
    with pytest.raises(ExchangeError, match="is over"):
        coordinator.advertise("east")
    with pytest.raises(ExchangeError, match="not the one"):
        coordinator.train("east")
    with pytest.raises(ExchangeError, match="not the one"):
        coordinator.confirm("east")


@pytest.mark.parametrize("attempt", [1, 2])
def test_a_round_that_is_over_does_not_come_back(
    coordinator: Coordinator, attempt: int
) -> None:
    coordinator.number = 2
    coordinator.collect()
    coordinator.number, coordinator.attempt = 1, attempt
    with pytest.raises(ExchangeError, match="is over"):
        coordinator.advertise("east")


def test_a_later_phase_begins_with_its_first_round(coordinator: Coordinator) -> None:
    coordinator.number = 3
    coordinator.collect()
    coordinator.phase, coordinator.number = "classification", 1
    coordinator.collect()
    coordinator.phase, coordinator.number = "pretraining", 3
    with pytest.raises(ExchangeError, match="is over"):
        coordinator.advertise("east")


def test_a_round_whose_shares_left_has_no_other_attempt(
    coordinator: Coordinator,
) -> None:
    """Of the sums with and without a site, the difference would be its update."""
    coordinator.collect()
    coordinator.finish()
    coordinator.attempt = 2
    for name in NAMES:
        with pytest.raises(ExchangeError, match="could reveal one site"):
            coordinator.advertise(name)


# ---- participants ----


def test_fewer_than_three_participants_are_refused(coordinator: Coordinator) -> None:
    coordinator.make_keys(("east", "north"))
    with pytest.raises(ExchangeError, match="the quorum is 3"):
        coordinator.share("east")


def test_fewer_participants_than_the_quorum_are_refused(
    coordinator: Coordinator,
) -> None:
    coordinator.study = Study.read(
        json.loads(STUDY.to_json()) | {"rounds": {"quorum": 4}}, "test"
    )
    coordinator.make_keys(("east", "north", "south"))
    with pytest.raises(ExchangeError, match="the quorum is 4"):
        coordinator.share("east")


@pytest.mark.parametrize("key", ["channel", "mask", "measured"])
def test_own_keys_that_were_changed_are_refused(
    coordinator: Coordinator, key: str
) -> None:
    coordinator.make_keys()
    forged = other_keys(np.zeros(GENES, dtype=np.bool_))
    coordinator.keys["east"][key] = str(forged[key])
    with pytest.raises(ExchangeError, match="our keys"):
        coordinator.share("east")


def test_a_second_list_of_participants_is_refused(coordinator: Coordinator) -> None:
    coordinator.make_keys()
    coordinator.share("east")
    fewer = {name: coordinator.keys[name] for name in NAMES[:3]}
    with pytest.raises(ExchangeError, match="another list of participants"):
        coordinator.share("east", fewer)


def test_a_key_that_is_replaced_for_one_site_is_found(coordinator: Coordinator) -> None:
    coordinator.make_keys()
    forged = other_keys(np.ones(GENES, dtype=np.bool_))
    lie = coordinator.keys | {"west": passed_on(forged)}
    coordinator.boxes = {
        name: coordinator.share(name, lie if name == "east" else None)
        for name in NAMES[:3]
    }
    with pytest.raises(ExchangeError, match="given other keys than this one"):
        coordinator.train("north", NAMES[:3])
    with pytest.raises(ExchangeError, match="given other keys than this one"):
        coordinator.train("east", NAMES[:3])


# ---- shares ----


def test_shares_of_another_attempt_are_refused(coordinator: Coordinator) -> None:
    coordinator.collect()
    old = {name: coordinator.boxes[name]["east"] for name in NAMES[1:]}
    coordinator.attempt = 2
    coordinator.make_keys()
    coordinator.boxes = {name: coordinator.share(name) for name in NAMES}
    with pytest.raises(ExchangeError, match="cannot be opened"):
        coordinator.train("east", boxes=old)


def test_fewer_sharers_than_the_threshold_are_refused(coordinator: Coordinator) -> None:
    coordinator.make_keys()
    coordinator.boxes = {name: coordinator.share(name) for name in NAMES}
    with pytest.raises(ExchangeError, match="2 of 4 sites; expected 3"):
        coordinator.train("east", ("east", "north"))


def test_an_update_is_masked_with_one_list_of_sharers(coordinator: Coordinator) -> None:
    coordinator.collect()
    with pytest.raises(ExchangeError, match="another list of sharers"):
        coordinator.train("east", NAMES[:3])


# ---- survivors ----


def test_a_share_of_one_kind_leaves_for_each_site(coordinator: Coordinator) -> None:
    coordinator.collect()
    left = NAMES[:3]
    tags = {name: coordinator.confirm(name, left) for name in left}
    assert coordinator.unmask("east", tags, left) == (set(left), {"west"})


def test_fewer_survivors_than_the_threshold_are_refused(
    coordinator: Coordinator,
) -> None:
    coordinator.collect()
    with pytest.raises(ExchangeError, match="2 of 4 sites; expected 3"):
        coordinator.confirm("east", ("east", "north"))


def test_a_site_that_is_said_to_be_gone_does_not_help(coordinator: Coordinator) -> None:
    coordinator.collect()
    with pytest.raises(ExchangeError, match="lacks this site"):
        coordinator.confirm("west", NAMES[:3])


def test_a_site_whose_update_never_left_does_not_help(coordinator: Coordinator) -> None:
    coordinator.make_keys()
    coordinator.boxes = {name: coordinator.share(name) for name in NAMES}
    with pytest.raises(ExchangeError, match="was not masked"):
        coordinator.confirm("east")


def test_a_second_list_of_survivors_is_refused_after_a_restart_too(
    coordinator: Coordinator,
) -> None:
    """All that a site remembers is on its disk: it is a new process each time."""
    coordinator.collect()
    coordinator.confirm("east", NAMES)
    with pytest.raises(ExchangeError, match="another list of survivors"):
        coordinator.confirm("east", NAMES[:3])


def test_both_shares_of_a_site_are_never_to_be_had(coordinator: Coordinator) -> None:
    coordinator.collect()
    coordinator.finish(NAMES)
    tags = {name: dict.fromkeys(NAMES, "00" * 32) for name in NAMES[:3]}
    for name in NAMES[:3]:  # those who gave shares of west's seed
        with pytest.raises(ExchangeError, match="another list of survivors"):
            coordinator.unmask(name, tags, NAMES[:3])


def test_no_share_leaves_before_the_list_is_confirmed(coordinator: Coordinator) -> None:
    coordinator.collect()
    tags = {name: coordinator.confirm(name) for name in NAMES[1:]}
    with pytest.raises(ExchangeError, match="before this list was confirmed"):
        coordinator.unmask("east", tags)


def test_no_share_leaves_when_sites_were_told_different_survivors(
    coordinator: Coordinator,
) -> None:
    coordinator.collect()
    left = NAMES[:3]
    tags = {name: coordinator.confirm(name, left) for name in left[:2]}
    tags["south"] = coordinator.confirm("south", NAMES)
    for name in left[:2]:
        with pytest.raises(ExchangeError, match="south did not confirm"):
            coordinator.unmask(name, tags, left)
        with pytest.raises(ExchangeError, match="2 sites confirmed"):
            coordinator.unmask(name, {n: tags[n] for n in left[:2]}, left)


def test_no_share_leaves_if_a_gene_is_left_to_two_sites(
    coordinator: Coordinator,
) -> None:
    coordinator.panels = {"east": [1, 1, 1, 0]}
    coordinator.collect()
    # Gene 4 is measured by the three others, of whom one is gone.
    with pytest.raises(ExchangeError, match="a gene to one or two"):
        coordinator.confirm("east", NAMES[:3])


def test_genes_that_two_sites_measure_do_not_leave_at_all(
    coordinator: Coordinator,
) -> None:
    coordinator.panels = {"east": [1, 1, 1, 0], "north": [1, 1, 0, 0]}
    coordinator.collect()
    sent = []

    def spy(change: Any, clip: float, kept: NDArray[np.bool_]) -> Any:
        sent.append(kept.tolist())
        return honest(change, clip, kept)

    honest = secure_round.vectors.to_vector
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(secure_round.vectors, "to_vector", spy)
        for name in NAMES:
            coordinator.train(name)
    # Gene 3 is measured by three, gene 4 by two; no site sends what it does not have.
    assert sent == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]


# ---- signed keys ----


@dataclass(frozen=True)
class Signers:
    """A consortium's authority, and each hospital's key and certificate."""

    authority_key: pki.Key
    authority: Any
    issued: dict[str, tuple[pki.Key, Any]]

    @classmethod
    def new(cls) -> Signers:
        key, authority = pki.new_authority("alliance")
        issued = {}
        for name in NAMES:
            own = pki.new_key()
            issued[name] = (
                own,
                pki.issue(
                    key,
                    authority,
                    pki.request(own, name, "site"),
                    name=name,
                    role="site",
                    days=9,
                ),
            )
        return cls(key, authority, issued)

    def proof(self, name: str, record: ConfigRecord, **changes: Any) -> dict[str, str]:
        key, certificate = self.issued[name]
        part = Part(
            **{
                "contract": "c" * 64,
                "run": "run-1",
                "site": name,
                "type": keys.SECURE_KEYS,
                "phase": "pretraining",
                "round": 1,
                "request": "d" * 64,
                "reply": reply_digest(RecordDict({keys.PUBLIC_KEYS: record})),
                "head": Head(1, "e" * 64),
                "patients": "suppressed",
                **changes,
            }
        ).to_json()
        return {
            keys.JSON: part,
            keys.SIGNATURE: sign(key, part.encode()),
            keys.CERTIFICATE: pki.to_pem(certificate),
        }


@pytest.fixture(scope="module")
def signers() -> Signers:
    return Signers.new()


@pytest.fixture
def deployed(
    coordinator: Coordinator, signers: Signers, monkeypatch: pytest.MonkeyPatch
) -> Coordinator:
    """Return a coordinator of hospitals that know their consortium's authority."""

    class Known:
        authority, revoked = signers.authority, frozenset(())

    pins = {n: pki.fingerprint(held) for n, (_, held) in signers.issued.items()}
    contract = SimpleNamespace(contract=SimpleNamespace(site_keys=pins))
    approvals = SimpleNamespace(contract=lambda hash: contract)
    monkeypatch.setattr(secure_round.Identity, "load", lambda folder: Known)
    monkeypatch.setattr(secure_round.ApprovalStore, "of", lambda settings: approvals)
    run = {"contract": "c" * 64, "run": "run-1"}
    coordinator.records = {keys.RUN: ConfigRecord(dict(run))}
    coordinator.make_keys()
    for name in NAMES:
        record = coordinator.advertise(name)
        coordinator.keys[name] |= signers.proof(name, record)
    return coordinator


def test_keys_that_their_owners_signed_are_taken(deployed: Coordinator) -> None:
    assert set(deployed.share("east")) == set(NAMES) - {"east"}


def test_keys_that_nobody_signed_are_refused(deployed: Coordinator) -> None:
    del deployed.keys["west"][keys.SIGNATURE]
    with pytest.raises(ExchangeError, match="signature"):
        deployed.share("east")


def test_keys_that_another_site_signed_are_refused(
    deployed: Coordinator, signers: Signers
) -> None:
    record = deployed.advertise("west")
    deployed.keys["west"] |= signers.proof("south", record)
    with pytest.raises(ExchangeError, match=r"signed for another \['site'\]"):
        deployed.share("east")


def test_keys_under_another_authority_are_refused(deployed: Coordinator) -> None:
    record = deployed.advertise("west")
    deployed.keys["west"] |= Signers.new().proof("west", record)
    with pytest.raises(ExchangeError, match="not issued by this consortium"):
        deployed.share("east")


@pytest.mark.parametrize("key", ["channel", "mask", "measured"])
def test_a_replaced_key_does_not_fit_its_owners_signature(
    deployed: Coordinator, key: str
) -> None:
    forged = other_keys(np.zeros(GENES, dtype=np.bool_))
    deployed.keys["west"][key] = str(forged[key])
    with pytest.raises(ExchangeError, match=r"signed for another \['reply'\]"):
        deployed.share("east")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("contract", "d" * 64),
        ("run", "run-2"),
        ("type", keys.TRAIN),
        ("phase", "survival"),
        ("round", 2),
    ],
)
def test_keys_of_another_round_are_refused(
    deployed: Coordinator, signers: Signers, key: str, value: object
) -> None:
    record = deployed.advertise("west")
    deployed.keys["west"] |= signers.proof("west", record, **{key: value})
    with pytest.raises(ExchangeError, match=rf"signed for another \['{key}'\]"):
        deployed.share("east")


def test_keys_of_another_attempt_are_refused(
    deployed: Coordinator, signers: Signers
) -> None:
    earlier = ConfigRecord({**deployed.advertise("west"), keys.ATTEMPT: 7})
    deployed.keys["west"] |= signers.proof("west", earlier)
    with pytest.raises(ExchangeError, match=r"signed for another \['reply'\]"):
        deployed.share("east")


def test_a_run_under_another_contract_is_refused(deployed: Coordinator) -> None:
    run = {"contract": "d" * 64, "run": "run-1"}
    deployed.records = {keys.RUN: ConfigRecord(dict(run))}
    with pytest.raises(ExchangeError, match="another contract"):
        deployed.advertise("east")
