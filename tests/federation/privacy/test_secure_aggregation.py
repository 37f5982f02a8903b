"""Secure aggregation from the first key to the last checkpoint, with the real apps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message
from numpy.typing import NDArray

from fedgex.client.ledger.ledger import Ledger
from fedgex.client.training import secure_round
from fedgex.common import federation, keys
from fedgex.common.arrays import PER_GENE
from fedgex.common.errors import FederationError
from fedgex.common.models import checkpoint
from fedgex.common.study import Study
from fedgex.common.transport.records import to_arrays
from fedgex.common.trust.receipt import NO_RECEIPT
from fedgex.server.federation.participants import Simulated
from fedgex.server.federation.run import conduct
from fedgex.server.settings import ServerSettings

from ...support import alliance as alliances
from ...support.alliance import GENES, Alliance, code, trainings
from ..conftest import Finished, InProcessGrid, Killed

if TYPE_CHECKING:
    from ..conftest import Consortium, Exchange

CLIP = 100.0
N_SITES = 4
OPENING, OF_A_ROUND = 2 * N_SITES, 5 * N_SITES
"""Messages before the first round, and in each."""

SECURE: dict[str, Any] = {
    "strategy": {"name": "fedavg", "update": "delta", "weights": "equal"},
    "pretraining": {"rounds": 1},
    "classification": {"rounds": 0},
    "survival": {"rounds": 0},
    "rounds": {"quorum": 3, "deadline_s": 0.2},
    "cross_products": False,
}
RULE = {"clip": CLIP}


@pytest.fixture
def sites(consortium: Consortium, tmp_path: Path) -> Path:
    """Return a copy of the hospitals, with nothing of earlier runs."""
    copy = tmp_path / "sites"
    shutil.copytree(consortium.sites, copy)
    return copy


@pytest.fixture(scope="module")
def whole(consortium: Consortium, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Run one round undisturbed, once for all tests that only look."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(consortium.sites, folder / "sites")
    study = secure(consortium)
    return consortium.conduct(study, folder / "run", sites=folder / "sites")


def secure(consortium: Consortium, **changes: Any) -> Study:
    return consortium.study(**(SECURE | {"secure_aggregation": RULE} | changes))


def plain(consortium: Consortium, **changes: Any) -> Study:
    return consortium.study(**(SECURE | changes))


def of_type(finished: Finished, kind: str) -> list[Exchange]:
    return [each for each in finished.exchanges if each.message_type == kind]


def gone_from(kind: str, *sites: str) -> Callable[[str, Message], None]:
    """Return what makes sites fail over one kind of message."""

    def alter(name: str, message: Message) -> None:
        if name in sites and message.metadata.message_type == kind:
            message.content[keys.STUDY] = ConfigRecord({keys.JSON: "{", "hash": ""})

    return alter


def killed_after(messages: int) -> Callable[[str, Message], None]:
    """Return what kills the server instead of its sending another message."""
    left = [messages]

    def alter(name: str, message: Message) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed

    return alter


def common(finished: Finished, *without: str) -> NDArray[np.bool_]:
    """Return which genes three hospitals or more measure, shape (V,)."""
    told = {
        each.site: each.reply.config_records[keys.SITE]["genes"]
        for each in of_type(finished, keys.PREPARE)
        if each.site not in without
    }
    genes = finished.final.vocabulary.genes
    panels: list[Any] = list(told.values())
    found: NDArray[np.bool_] = np.sum([np.isin(genes, p) for p in panels], axis=0) >= 3
    assert 0 < found.sum() < len(found), "the data no longer hold both kinds of genes"
    return found


def assert_close(
    ours: Finished, theirs: Finished, rows: NDArray[np.bool_], tolerance: float
) -> None:
    """Compare two models; of genes' rows, these."""
    found, expected = ours.final.parameters, theirs.final.parameters
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        some = rows if name.endswith(PER_GENE) else slice(None)
        np.testing.assert_allclose(
            found[name][some], array[some], atol=tolerance, err_msg=name
        )


STEP = CLIP / ((2**31 - 1) // N_SITES)
"""Of the fixed point. Each site rounds by half a step, before the mean is taken."""


@pytest.mark.parametrize(("name", "tolerance"), [("fedavg", 1), ("fedadam", 20)])
def test_the_model_is_the_one_of_a_run_in_the_open(
    consortium: Consortium, sites: Path, tmp_path: Path, name: str, tolerance: int
) -> None:
    rule = {"strategy": {**SECURE["strategy"], "name": name, "tau": 0.1}}
    ours = consortium.conduct(secure(consortium, **rule), tmp_path / "a", sites=sites)
    theirs = consortium.conduct(plain(consortium, **rule), tmp_path / "b", sites=sites)

    assert ours.rounds == theirs.rounds == [("pretraining", 1)]
    assert_close(ours, theirs, common(ours), tolerance * STEP)


def test_a_gene_that_two_hospitals_measure_keeps_its_values(
    whole: Finished,
) -> None:
    rows = common(whole)
    folders = sorted((whole.run_dir / "checkpoints").iterdir())
    before = checkpoint.load(folders[0]).parameters
    for name, array in whole.final.parameters.items():
        if name.endswith(PER_GENE):
            assert (array[~rows] == before[name][~rows]).all()
            assert (array[rows] != before[name][rows]).any()


@pytest.mark.parametrize(
    "kind", [keys.SECURE_KEYS, keys.SECURE_SHARES, keys.TRAIN], ids=str
)
def test_a_site_that_leaves_before_its_update_is_there_is_left_out(
    consortium: Consortium, sites: Path, tmp_path: Path, kind: str
) -> None:
    gone = consortium.names[1]
    ours = consortium.conduct(
        secure(consortium), tmp_path / "a", sites=sites, alter=gone_from(kind, gone)
    )
    theirs = consortium.conduct(
        plain(consortium), tmp_path / "b", sites=sites, alter=gone_from("train", gone)
    )

    (round_,) = ours.events("round")
    states = {name: site["state"] for name, site in round_["sites"].items()}
    expected = dict.fromkeys(consortium.names, "contributed") | {gone: "refused"}
    assert states == expected
    assert round_["sites"][gone]["reason"] == "FX-SITE-002"
    assert_close(ours, theirs, common(ours, gone), STEP)
    # Genes of the one that left and two others were masked already, when it left.
    repeated = [event["without"] for event in ours.events("exchange-repeated")]
    assert repeated == ([[gone]] if kind == keys.TRAIN else [])


@pytest.mark.parametrize("kind", [keys.SECURE_CONFIRM, keys.SECURE_UNMASK], ids=str)
def test_a_site_that_leaves_once_its_update_is_there_counts(
    consortium: Consortium, whole: Finished, sites: Path, tmp_path: Path, kind: str
) -> None:
    ours = consortium.conduct(
        secure(consortium),
        tmp_path / "b",
        sites=sites,
        alter=gone_from(kind, consortium.names[1]),
    )
    assert ours.digest == whole.digest
    assert {s["state"] for s in ours.events("round")[0]["sites"].values()} == {
        "contributed"
    }


@pytest.mark.parametrize(
    ("kind", "did"),
    [
        (keys.SECURE_KEYS, "made keys"),
        (keys.SECURE_SHARES, "shared their secrets"),
        (keys.TRAIN, "sent masked updates"),
        (keys.SECURE_CONFIRM, "confirmed the list"),
        (keys.SECURE_UNMASK, "gave out shares"),
    ],
)
def test_below_the_threshold_there_is_no_model_until_the_sites_are_back(
    consortium: Consortium,
    whole: Finished,
    sites: Path,
    tmp_path: Path,
    kind: str,
    did: str,
) -> None:
    gone, run_dir = consortium.names[:2], tmp_path / "b"
    with (
        trainings() as trained,
        pytest.raises(FederationError, match=f"2 of 4 sites {did}.* needs 3") as error,
    ):
        consortium.conduct(
            secure(consortium), run_dir, sites=sites, alter=gone_from(kind, *gone)
        )
    assert all(f"{name}: refused (FX-SITE-002)" in str(error.value) for name in gone)
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == [
        "00000-pretraining-00000"
    ]

    with trainings() as again:
        resumed = consortium.conduct(secure(consortium), run_dir, sites=sites)

    assert resumed.digest == whole.digest
    # Nobody trained twice: what was trained before was masked anew.
    assert dict(trained + again) == {(n, "pretraining", 1): 1 for n in consortium.names}


def test_what_the_server_is_sent_and_keeps_holds_no_update(whole: Finished) -> None:
    folder = whole.run_dir.parent
    kept = list((folder / "sites").rglob("secagg/*/update/*.reply"))
    assert len(kept) == N_SITES
    sent = b"".join(each.reply_bytes for each in whole.exchanges)
    files = [path for path in whole.run_dir.rglob("*") if path.is_file()]
    seen = (sent, *(path.read_bytes() for path in files))
    for path in kept:
        update = path.read_bytes()
        begin = len(update) // 2  # amid the numbers
        parts = [update[i : i + 16] for i in range(begin, begin + 3200, 16)]
        numbers = [part for part in parts if part.count(0) < 4]
        assert len(numbers) > 100
        assert not any(part in content for part in numbers for content in seen)
    for each in of_type(whole, keys.TRAIN):
        assert set(each.reply) == {keys.MASKED, keys.METRICS}
        words = to_arrays(each.reply.array_records[keys.MASKED])[keys.MASKED]
        high = np.bincount(words.astype(np.uint32) >> 24, minlength=256)
        expected = len(words) / 256
        assert (np.abs(high - expected) < 7 * np.sqrt(expected)).all()


def sending(site: str, change: Callable[[Any], Any]) -> Any:
    """Return a stand-in for how sites mask, under which one sends something else."""
    honest = secure_round._mask

    def mask(plain: Any, settings: Any, study: Any, state: Any) -> Any:
        words = honest(plain, settings, study, state)
        return change(words) if settings.name == site else words

    return mask


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda words: words[:-1], "expected uint32 of shape"),
        (lambda words: words.astype(np.int64), "is int64 of shape"),
        (lambda words: words.reshape(1, -1), "expected uint32 of shape"),
    ],
    ids=["shorter", "other type", "other shape"],
)
def test_a_masked_update_of_another_form_is_quarantined(
    consortium: Consortium,
    sites: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Any], Any],
    reason: str,
) -> None:
    bad = consortium.names[2]
    monkeypatch.setattr(secure_round, "_mask", sending(bad, change))
    run = consortium.conduct(secure(consortium), tmp_path / "run", sites=sites)
    (round_,) = run.events("round")
    assert round_["sites"][bad]["state"] == "quarantined"
    assert reason in round_["sites"][bad]["reason"]


def test_a_sum_longer_than_clipped_updates_is_refused(
    consortium: Consortium,
    sites: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    huge = sending(consortium.names[2], lambda words: words + np.uint32(2**28))
    monkeypatch.setattr(secure_round, "_mask", huge)
    with pytest.raises(FederationError, match="the sum of the updates is longer"):
        consortium.conduct(secure(consortium), tmp_path / "run", sites=sites)


@pytest.mark.parametrize(
    "messages",
    [
        pytest.param(0, id="before keys"),
        pytest.param(2, id="among keys"),
        pytest.param(N_SITES + 1, id="among shares"),
        pytest.param(2 * N_SITES, id="before training"),
        pytest.param(2 * N_SITES + 3, id="among updates"),
        pytest.param(3 * N_SITES + 2, id="among confirmations"),
        pytest.param(4 * N_SITES, id="before unmasking"),
        pytest.param(4 * N_SITES + 3, id="among unmasking"),
    ],
)
def test_a_run_killed_and_conducted_again_ends_in_the_same_bits(
    consortium: Consortium, whole: Finished, sites: Path, tmp_path: Path, messages: int
) -> None:
    study, alter = secure(consortium), killed_after(OPENING + messages)
    with trainings() as trained:
        killed = consortium.conduct(study, tmp_path, sites=sites, alter=alter)
        assert not killed.rounds
        resumed = consortium.conduct(study, tmp_path, sites=sites)

    assert resumed.digest == whole.digest
    assert dict(trained) == {(n, "pretraining", 1): 1 for n in consortium.names}


def test_a_run_killed_in_a_later_round_goes_on_with_that(
    consortium: Consortium, sites: Path, tmp_path: Path
) -> None:
    study = secure(consortium, pretraining={"rounds": 2})
    undisturbed = consortium.conduct(study, tmp_path / "a", sites=sites)
    alter = killed_after(OPENING + OF_A_ROUND + 3 * N_SITES + 1)
    with trainings() as trained:
        consortium.conduct(study, tmp_path / "b", sites=sites, alter=alter)
        resumed = consortium.conduct(study, tmp_path / "b", sites=sites)

    assert resumed.digest == undisturbed.digest
    assert resumed.rounds == [("pretraining", 1), ("pretraining", 2)]
    assert set(trained.values()) == {1}


# ---- with differential privacy ----


def with_public(
    consortium: Consortium,
    study: Study,
    run_dir: Path,
    sites: Path,
    messages: int = 10**6,
) -> Finished:
    """Run a study with statistics of a public cohort, until it is killed."""
    run_dir.mkdir(exist_ok=True)
    (run_dir / "study.json").write_text(study.to_json())
    settings = ServerSettings(
        study=run_dir / "study.json",
        run_dir=run_dir,
        public=consortium.holdout.with_name("public"),
        n_sites=N_SITES,
        poll_s=0.001,
    )
    grid = InProcessGrid(sites, alter=killed_after(messages))
    with pytest.MonkeyPatch.context() as patch, suppress(Killed):
        patch.setattr(federation, "MIN_PUBLIC_PATIENTS", 10)
        conduct(grid, settings, Simulated(study=study, n_sites=N_SITES))
    return Finished(run_dir=run_dir, exchanges=grid.exchanges)


def test_patient_level_noise_travels_under_masks_and_is_charged_once(
    consortium: Consortium, sites: Path, tmp_path: Path
) -> None:
    patient = {
        "noise_multiplier": 5.0,
        "delta": 1e-3,
        "clip": 1.0,
        "sample_rate": 0.5,
    }
    study = secure(
        consortium, privacy={"patient": patient}, public={"statistics": True}
    )
    among_updates = 3 * N_SITES + 2
    killed = with_public(consortium, study, tmp_path / "a", sites, among_updates)
    finished = with_public(consortium, study, tmp_path / "a", sites)

    replies = [e.reply for e in of_type(killed, keys.TRAIN)]
    assert len(replies) == 2
    for reply in (*replies, *(e.reply for e in of_type(finished, keys.TRAIN))):
        assert set(reply) == {keys.MASKED, keys.METRICS, keys.WITHHELD}
    assert finished.rounds == [("pretraining", 1)]
    for name in consortium.names:
        assert len(Ledger.open(sites / name / "state").rows()) == 1


def test_site_level_noise_is_put_on_the_sum(
    consortium: Consortium, sites: Path, tmp_path: Path
) -> None:
    multiplier, clip = 1e-4, 0.5
    rule = {
        "strategy": SECURE["strategy"] | {"per_gene": False},
        "privacy": {
            "site": {"noise_multiplier": multiplier, "clip": clip, "delta": 1e-3}
        },
        "public": {"statistics": True},
    }
    ours, theirs = (
        with_public(consortium, study, tmp_path / name, sites)
        for name, study in (
            ("a", secure(consortium, **rule)),
            ("b", plain(consortium, **rule)),
        )
    )
    every = np.ones(len(ours.final.vocabulary), dtype=np.bool_)
    std = multiplier * clip / N_SITES
    assert_close(ours, theirs, every, 7 * np.sqrt(2) * std + STEP)
    assert ours.digest != theirs.digest


# ---- between hospitals ----


@pytest.fixture(scope="module")
def founded(
    consortium: Consortium, tmp_path_factory: pytest.TempPathFactory
) -> Alliance:
    folder = tmp_path_factory.mktemp("secure-alliance") / "founded"
    return alliances.found(folder, consortium.sites, consortium.names)


@pytest.fixture
def alliance(founded: Alliance, tmp_path: Path) -> Alliance:
    shutil.copytree(founded.folder, tmp_path / "alliance")
    return Alliance(tmp_path / "alliance", founded.names)


def contracted(**changes: Any) -> Study:
    values = SECURE | {
        "name": "small",
        "minimum_cohort": 10,
        "vocabulary": {"genes": GENES},
        "secure_aggregation": RULE,
    }
    return Study.read(values | changes, "a test's study")


def test_hospitals_come_to_the_same_bits_after_kills(alliance: Alliance) -> None:
    contract = alliance.agree(contracted())
    copy = alliance.folder.with_name("undisturbed")
    shutil.copytree(alliance.folder, copy)
    whole = Alliance(copy, alliance.names).conduct(contract)
    with trainings() as trained:
        for messages in (9, 14, 19, 23, 27):
            alliance.conduct(contract, kill_after=messages)
        run = alliance.conduct(contract)

    assert run.digest == whole.digest
    assert set(trained.values()) == {1}
    for name in alliance.names:
        assert alliance.states(name) == [("contributed", None)]
    assert alliance.receipts()[0].previous == NO_RECEIPT


def test_a_key_that_the_coordinator_replaces_is_found_by_its_signature(
    alliance: Alliance,
) -> None:
    lied_to, victim = alliance.names[:2]

    def replace(site: str, message: Message) -> None:
        told = message.content.config_records.get(keys.PUBLIC_KEYS)
        if told is not None and site == lied_to:
            own = json.loads(str(told[victim]))
            told[victim] = json.dumps(own | {"mask": "09" * 32})

    contract = alliance.agree(contracted())
    alliance.conduct(contract, before=replace)
    refused = [line["code"] for line in alliance.log(lied_to, "refused")]
    assert refused == ["FX-RUN-005"]
    ((state, _),) = alliance.states(lied_to)
    assert state == "quarantined"  # it signed an answer to what the honest server asked
    assert alliance.states(victim) == [("contributed", None)]


def test_participants_that_the_contract_does_not_name_are_refused(
    alliance: Alliance,
) -> None:
    first = alliance.names[0]

    def add(site: str, message: Message) -> None:
        told = message.content.config_records.get(keys.PUBLIC_KEYS)
        if told is not None and site == first:
            told["stranger"] = told[first]

    alliance.conduct(alliance.agree(contracted()), before=add)
    assert [line["code"] for line in alliance.log(first, "refused")] == ["FX-STUDY-006"]
    ((state, _),) = alliance.states(first)
    assert state == "quarantined"  # it signed its refusal of what it was sent


def test_a_gate_answers_for_planned_rounds_of_such_studies_alone(
    alliance: Alliance,
) -> None:
    contract = alliance.agree(contracted())
    run = alliance.conduct(contract)
    name = alliance.names[0]
    grid = alliance.grid()
    (sent,) = [e for e in of_type(run, keys.SECURE_KEYS) if e.site == name]
    node = grid.nodes[name].number
    again = grid.ask(name, _message(sent, node))
    assert packed_keys(again) == packed_keys(sent)

    sent.message.config_records[keys.ROUND]["number"] = 2
    assert code(grid.ask(name, _message(sent, node)).content) == "FX-STUDY-006"


def _message(exchange: Exchange, node: int) -> Message:
    message = Message(exchange.message, node, exchange.message_type)
    message.metadata.__dict__["_message_id"] = "message-again"
    return message


def packed_keys(answered: Any) -> dict[str, object]:
    content = getattr(answered, "reply", None) or answered.content
    return dict(content.config_records[keys.PUBLIC_KEYS])
