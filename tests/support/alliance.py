"""An alliance of three hospitals in this process: real keys, contracts, gates and logs.

Only Flower is missing: a grid hands each message to the gate of its hospital, and both
contents are serialised on their way. What the disks hold is what processes leave there.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict

import fedgex.client.app
from fedgex.client import identity
from fedgex.client.admission.approvals import ApprovalStore
from fedgex.client.admission.gate import Gate
from fedgex.client.settings import SiteSettings
from fedgex.client.training import local_round
from fedgex.common import keys
from fedgex.common.study import Study
from fedgex.common.trust import audit_log, pki
from fedgex.common.trust.enrolment import SiteRequest
from fedgex.common.trust.receipt import Receipt, verify_chain
from fedgex.common.trust.signed import Signed
from fedgex.server.consortium import annotated_toml, contracts, drafts, members
from fedgex.server.consortium.participants import Deployment
from fedgex.server.consortium.store import Consortium, ConsortiumSettings
from fedgex.server.federation.run import conduct
from fedgex.server.settings import ServerSettings
from fedgex.simulations.grid import ProcessGrid

from ..federation.conftest import TYPES, Exchange, Finished, Killed, _bytes, _parse

RUN = "small-1"
GENES = tuple(f"GENE{i:04d}" for i in range(1, 31))
TODAY = datetime.now(UTC).date()
MESSAGES = 7 * 3
"""Of a run of the study: contract, prepare, statistics, cross-products, three rounds,
to three hospitals each."""

STUDY: dict[str, Any] = {
    "name": "small",
    "minimum_cohort": 10,
    "cross_products": True,
    "pretraining": {"rounds": 2},
    "classification": {"rounds": 1, "classes": TYPES},
    "rounds": {"quorum": 3},
    "vocabulary": {"genes": GENES},
}
"""Three rounds over two phases."""

Hook = Callable[[str, Message], None]
"""Called with a hospital's name and a message; may change what it is given."""


@dataclass(frozen=True)
class Node:
    """A hospital's place in Flower."""

    number: int
    gate: Gate
    context: Context


class GateGrid(ProcessGrid):
    """Hands each message to the gate of its hospital, at once.

    Parameters
    ----------
    before, after
        Called before a message is delivered, and with the reply that comes of it.
    kill_after
        Raise `Killed` as soon as the hospitals answered so many messages.
    silent
        Says which messages are taken and never answered.
    held
        How often the server looks for this hospital's updates before they are there.
    """

    def __init__(
        self,
        site_tomls: dict[str, Path],
        *,
        before: Hook | None = None,
        after: Hook | None = None,
        kill_after: int | None = None,
        silent: Callable[[str, Message], bool] = lambda site, message: False,
        held: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.nodes = {
            name: Node(
                number=number,
                gate=Gate(path, fedgex.client.app.app),
                context=Context(
                    run_id=1,
                    node_id=number,
                    node_config={"site-toml": str(path)},
                    state=RecordDict(),
                    run_config={},
                ),
            )
            for number, (name, path) in enumerate(site_tomls.items(), start=100)
        }
        self.before, self.after = before, after
        self.kill_after, self.silent = kill_after, silent
        self.held = dict(held or {})
        self.exchanges: list[Exchange] = []
        self.replies: dict[str, Message] = {}

    def get_node_ids(self) -> list[int]:
        return [node.number for node in self.nodes.values()]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return [self._deliver(message, next(self._ids)) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self._die()
        return [self.replies.pop(i) for i in message_ids if self._is_here(i)]

    def _deliver(self, message: Message, message_id: str) -> str:
        self._die()
        number = message.metadata.dst_node_id
        (site,) = [name for name, node in self.nodes.items() if node.number == number]
        if self.silent(site, message):
            return message_id
        sent = Message(
            _parse(_bytes(message.content)), number, message.metadata.message_type
        )
        sent.metadata.__dict__["_message_id"] = message_id
        if self.before is not None:
            self.before(site, sent)
        self.replies[message_id] = self.ask(site, sent)
        return message_id

    def ask(self, site: str, sent: Message) -> Message:
        """Hand a message to a hospital, and return its reply."""
        sent_bytes = _bytes(sent.content)
        node = self.nodes[site]
        reply = node.gate(sent, node.context)
        reply_bytes = _bytes(reply.content)
        reply.content = _parse(reply_bytes)
        self.exchanges.append(
            Exchange(
                site=site,
                message_type=sent.metadata.message_type,
                message=sent.content,
                reply=_parse(reply_bytes),
                message_bytes=sent_bytes,
                reply_bytes=reply_bytes,
            )
        )
        if self.after is not None:
            self.after(site, reply)
        return reply

    def _is_here(self, message_id: str) -> bool:
        if message_id not in self.replies:
            return False
        source = self.replies[message_id].metadata.src_node_id
        (site,) = [name for name, node in self.nodes.items() if node.number == source]
        trained = self.replies[message_id].metadata.message_type == keys.TRAIN
        if trained and self.held.get(site, 0):
            self.held[site] -= 1
            return False
        return True

    def _die(self) -> None:
        if self.kill_after is not None and len(self.exchanges) >= self.kill_after:
            raise Killed


@dataclass
class Alliance:
    """Three hospitals that have joined a consortium, all under one folder."""

    folder: Path
    names: tuple[str, ...]

    @property
    def consortium(self) -> Consortium:
        return Consortium(self.folder / "state")

    @property
    def run_dir(self) -> Path:
        return self.folder / "state" / "runs" / RUN

    @property
    def sites(self) -> Path:
        return self.folder / "sites"

    def site_toml(self, name: str) -> Path:
        return self.sites / name / "site.toml"

    def state(self, name: str) -> Path:
        """Return a hospital's state directory."""
        return self.sites / name / "state"

    def approvals(self, name: str) -> ApprovalStore:
        return ApprovalStore.of(SiteSettings.load(self.site_toml(name)))

    def permit(self, name: str, **changes: Any) -> None:
        """Change a hospital's policy.toml."""
        path = self.site_toml(name).with_name("policy.toml")
        policy = SiteSettings.load(self.site_toml(name)).policy
        values = policy.model_dump(mode="json") | changes
        lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
        path.write_text("\n".join(lines) + "\n")

    # ---- contract ----

    def publish(self, study: Study) -> str:
        """Draft, sign and store a contract about a study; return its hash."""
        paths = {name: self.folder / name for name in ("study.toml", "genes.txt")}
        contract = self.folder / "contract.toml"
        paths["study.toml"].write_text(annotated_toml.render(study))
        paths["genes.txt"].write_text("\n".join(study.vocabulary.genes))
        text = drafts.draft(
            self.consortium,
            *paths.values(),
            purpose="restoration of thirty genes",
            expires=date(2999, 12, 31),
            sites=self.names,
            administrators=1,
            no_secure_aggregation="" if study.secure_aggregation else "a test",
        )
        contract.write_text(text)
        return self.sign(contract)

    def sign(self, contract: Path) -> str:
        """Sign and store a contract; return its hash."""
        key = pki.load_key(self.folder / "ada" / "ada.key")
        contracts.signatures_path(contract).unlink(missing_ok=True)
        signed = contracts.sign(contract, key, self.consortium.administrator(key)[1])
        contracts.publish(self.consortium, contract, key)
        for order in (self.folder / "state" / "orders" / "pending").iterdir():
            order.unlink()  # nobody supervises here
        return signed.hash

    def signed(self, contract: str) -> Signed:
        path = self.folder / "state" / "contracts" / f"{contract}.json"
        return Signed.from_json(path.read_text(), "the contract")

    def approve(self, contract: str, *names: str, expires: date | None = None) -> None:
        """Have a person at each of the hospitals, or at all, approve a contract."""
        last = expires or TODAY + timedelta(days=20)
        for name in names or self.names:
            self.approvals(name).receive(self.signed(contract))
            self.approvals(name).decide(contract, "approved", by="Dr. N.", expires=last)

    def agree(self, study: Study) -> str:
        """Publish a contract about a study and have it approved by all."""
        contract = self.publish(study)
        self.approve(contract)
        return contract

    # ---- runs ----

    def grid(self, **hooks: Any) -> GateGrid:
        """Return a new grid; the hospitals' processes have just been started."""
        tomls = {name: self.site_toml(name) for name in self.names}
        grid = GateGrid(tomls, **hooks)
        nodes = {name: node.number for name, node in grid.nodes.items()}
        (self.folder / "state" / "nodes.json").write_text(json.dumps(nodes))
        return grid

    def conduct(
        self,
        contract: str,
        *,
        start_deadline_s: float = 30,
        public: Path | None = None,
        grid: GateGrid | None = None,
        **hooks: Any,
    ) -> Finished:
        """Run a contract's study, or go on with it, until it ends or is killed."""
        grid = grid or self.grid(**hooks)
        settings = ServerSettings.model_validate(
            {
                "state_dir": self.folder / "state",
                "contract": contract,
                "run": RUN,
                "public": public,
                "poll_s": 0.001,
                "start_deadline_s": start_deadline_s,
            }
        )
        with suppress(Killed):
            conduct(grid, settings, Deployment.load(settings))
        return Finished(run_dir=self.run_dir, exchanges=grid.exchanges)

    # ---- what is left ----

    @property
    def outcome(self) -> Finished:
        """Return what is left of the run on the disk."""
        return Finished(run_dir=self.run_dir)

    @property
    def failure(self) -> str:
        """Return why the run failed last."""
        return str(self.outcome.events("run-failed")[-1]["reason"])

    def receipts(self) -> list[Receipt]:
        """Return the run's receipts, their chain and all signatures verified."""
        paths = sorted(self.run_dir.glob("checkpoints/*/receipt.json"))
        signed = [Signed.from_json(path.read_text(), str(path)) for path in paths]
        secure = self.outcome.final.study.secure_aggregation is not None
        verify_chain(signed, self.consortium.authority, secure=secure)
        return [Receipt.read_signed(each) for each in signed]

    def states(self, name: str) -> list[tuple[str, str | None]]:
        """Return a hospital's state and reason in each receipt."""
        parts = [receipt.sites[name] for receipt in self.receipts()]
        return [(part.state, part.reason) for part in parts]

    def log(self, name: str, event: str) -> list[dict[str, Any]]:
        """Return the lines of a kind in a hospital's audit log."""
        lines = audit_log.read(self.state(name) / "audit.jsonl")
        return [line for line in lines if line["event"] == event]


def found(folder: Path, sites: Path, names: tuple[str, ...]) -> Alliance:
    """Found a consortium and have hospitals with the given data join it."""
    alliance = Alliance(folder, names)
    settings = ConsortiumSettings(
        name="alliance", host="fed.example.org", health_port=1
    )
    consortium = Consortium.init(folder / "state", settings)
    request, asked = members.new_administrator("ada", folder / "ada")
    members.add_administrator(consortium, request, asked.fingerprint)
    for name in names:
        shutil.copytree(sites / name, alliance.sites / name)
        site = SiteSettings.load(alliance.site_toml(name))
        path = identity.create(site)
        wanted = SiteRequest.load(path).fingerprint
        kit = folder / f"{name}.kit.json"
        kit.write_text(json.dumps(members.add_site(consortium, path, wanted)))
        identity.join(site, kit)
    return alliance


@contextmanager
def trainings() -> Iterator[Counter[tuple[str, str, int]]]:
    """Count how often each hospital trains each round: (site, phase, round)."""
    counted: Counter[tuple[str, str, int]] = Counter()
    honest = local_round.round_update

    def round_update(
        study: Study, phase: str, number: int, *args: Any, **more: Any
    ) -> Any:
        counted[more["site"], phase, number] += 1
        return honest(study, phase, number, *args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_round, "round_update", round_update)
        yield counted


def round_of(content: RecordDict) -> int:
    """Return the number of a message's round in its phase, 0 if it is of none."""
    record = content.config_records.get(keys.ROUND)
    return 0 if record is None else int(str(record["number"]))


def code(content: RecordDict) -> str | None:
    """Return the code of a refusal, None if the reply is none."""
    record = content.config_records.get(keys.REFUSAL)
    return None if record is None else str(record["code"])
