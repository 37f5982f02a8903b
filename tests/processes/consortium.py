"""A consortium of real processes, and one long run of it that tests disturb.

Its hospitals train many short rounds. A test disturbs whichever round is under way and
compares the receipts of the rounds that followed with those of the simulator's rounds:
the digest of the model after each must be the same.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

import fedgex.client.cli
import fedgex.server.cli
from fedgex.common.errors import FederationError
from fedgex.common.models import checkpoint
from fedgex.common.trust import audit_log, pki
from fedgex.common.trust.receipt import Receipt, verify_chain
from fedgex.common.trust.signed import Signed
from fedgex.server.consortium import commands
from fedgex.server.consortium.store import Consortium
from fedgex.simulations import rehearsal
from fedgex.simulations.data.synthetic import new_data
from fedgex.simulations.rehearsal import ADMINISTRATORS, RUN_LIMIT_S, Rehearsal
from fedgex.simulations.scenario import Scenario

from .troubles import Clock, Disk, Link, Road, intercepting_proxy

TYPES = ["type-1", "type-2"]
N_SITES = 3
OUTAGE_S = float(os.environ.get("FEDGEX_OUTAGE_S", "20"))
"""How long a link is away; an hour is tried by hand."""
DEADLINE_S = 3600 + OUTAGE_S
"""Of a round: longer than its hospital is away, or the hospital would be late."""
AHEAD = 5
"""Rounds that a run must have left when a test disturbs it."""

STUDY: dict[str, Any] = {
    "name": "small",
    "minimum_cohort": 10,
    "cross_products": True,
    "linear_rank": 4,
    "pretraining": {"rounds": 24, "local_epochs": 1},
    "classification": {"rounds": 12, "classes": TYPES},
    "evaluation": {"rates": [0.5], "panels": [10]},
    "rounds": {"quorum": N_SITES, "deadline_s": DEADLINE_S},
}
"""Three sites and rounds of a second, more than the tests disturb."""

SCENARIO: dict[str, Any] = {
    "study": STUDY,
    "data": {
        "expression": "expression.parquet",
        "scale": "log2p1",
        "clinical": "clinical.csv",
    },
    "sites": {"column": "institution", "minimum_patients": 10},
    "holdout": {"institutions": ["Hold-out 01"]},
    "reference": {"alone": False, "pooled": False},
}


class InProcess(Rehearsal):
    """A consortium whose commands run in this process: the same words, no start-up."""

    def _command(self, command: str, words: list[str]) -> str:
        apps = {
            "fedgex-admin": fedgex.server.cli.app,
            "fedgex-site": fedgex.client.cli.app,
        }
        environment = {"FEDGEX_STATE": str(self.state)}
        done = CliRunner().invoke(apps[command], words, env=environment)
        if done.exit_code:
            shown = " ".join([command, *words])
            reason = f"{shown} ended with {done.exit_code}: {done.output}"
            raise FederationError(reason) from done.exception
        return done.stdout


def build(
    folder: Path,
    *,
    kind: type[Rehearsal] = InProcess,
    values: Mapping[str, Any] = SCENARIO,
    n_sites: int = N_SITES,
    n_holdouts: int = 1,
    patients_per_site: int = 30,
) -> Rehearsal:
    """Return a consortium that is not provisioned yet."""
    data = folder / "data"
    new_data(
        data,
        n_sites=n_sites,
        n_holdouts=n_holdouts,
        patients_per_site=patients_per_site,
        n_genes=30,
        n_cancer_types=len(TYPES),
    )
    scenario = Scenario.read(values, "a test's scenario")
    study, sites = rehearsal.prepare(scenario, data, folder, n_sites, {})
    return kind(folder=folder, study=study, sites=sites, report=_silent, reviving=True)


@dataclass
class Served:
    """A consortium that serves, its approved contract and its runs."""

    consortium: Rehearsal
    contract: str
    reference: Sequence[str] = ()
    """Digest of the simulator's model after each round."""
    clocks: Mapping[str, Clock] = field(default_factory=dict)
    """Of the first hospital and the server, if started in their environments."""
    disks: Mapping[str, Disk] = field(default_factory=dict)
    """The disks of the same two."""
    links: Mapping[str, Link] = field(default_factory=dict)
    """Each hospital's way to the server; the second's begins at a proxy."""
    proxied: list[str] = field(default_factory=list)
    """Where the proxy was asked to connect to."""
    road: Road | None = None
    """The third hospital is at its other end."""
    no_disks: str = ""
    """Why no disk can be filled here, if so."""
    no_clocks: str = ""
    """Why no clock can be moved here, if so."""
    run: str = ""
    """The run that is disturbed at present."""
    launched: int = 0

    # ---- runs ----

    @property
    def n_rounds(self) -> int:
        """Rounds of a run."""
        return sum(phase.rounds for phase in self.consortium.study.phases.values())

    def launch(self, run: str) -> None:
        """Order a run."""
        self._order("launch", run)

    def resume(self, run: str) -> None:
        """Order that a failed run goes on."""
        self._order("resume", run)
        state_of = self.consortium.state_of
        self.consortium.until(f"{run} goes on", lambda: state_of(run) != "failed")

    def stop(self, run: str) -> None:
        """Order that a run stops, and wait until it has."""
        self._order("stop", run)
        state_of = self.consortium.state_of
        self.consortium.until(f"{run} stops", lambda: state_of(run) != "running")

    def _order(self, kind: str, run: str) -> None:
        consortium = Consortium(self.consortium.state)
        key = pki.load_key(self.consortium.key(ADMINISTRATORS[0]))
        if kind == "launch":
            commands.launch(consortium, self.contract, run, key)
        else:
            commands.submit(consortium, kind, run, key)  # type: ignore[arg-type]

    def running(self) -> str:
        """Return a run that is past its first round and far from its last.

        It is another than before only if that one has ended, such as by a test's
        failure, or is about to.
        """
        state_of = self.consortium.state_of
        if self.run and self.committed() > self.n_rounds - AHEAD:
            self.consortium.wait(self.run)
        if not self.run or state_of(self.run) != "running":
            self.launched += 1
            self.run = f"small-{self.launched}"
            self.launch(self.run)
        self.until_round(1)
        return self.run

    @contextmanager
    def apart(self, run: str) -> Iterator[None]:
        """Launch another run, disturb that one in this context, and stop it."""
        self.launch(run)
        self.run, before = run, self.run
        try:
            yield
        finally:
            self.run = before
            if self.consortium.state_of(run) == "running":
                self.stop(run)

    def committed(self) -> int:
        """Return how many rounds of the run are on the server's disk."""
        return len(self.receipt_paths(self.run))

    def until_round(self, number: int, limit_s: float = RUN_LIMIT_S) -> None:
        """Wait until so many rounds of the run are on the disk, or it has ended.

        Raises
        ------
        FederationError
            If it stopped or failed before, or takes longer than `limit_s`.
        """
        state_of = self.consortium.state_of

        def reached() -> bool:
            ended = state_of(self.run) not in ("ordered", "running")
            return ended or self.committed() >= number

        self.consortium.until(f"round {number} of {self.run}", reached, limit_s)
        if self.committed() < number and state_of(self.run) != "finished":
            reason = self.consortium.events(self.run)[-1].get("reason")
            raise FederationError(
                f"{self.run} is {state_of(self.run)} after round {self.committed()}: "
                f"{reason}"
            )

    def survives(
        self,
        disturb: Callable[[], object] = lambda: None,
        limit_s: float = RUN_LIMIT_S,
    ) -> None:
        """Disturb the round under way; it and the next must end in the same bits.

        The next, too, because it needs every hospital and every process again.
        `limit_s` counts from the end of the disturbance.
        """
        self.running()
        before = self.committed()
        disturb()
        self.until_round(self.committed() + 2, limit_s)
        self.compare(self.run, first=before + 1)

    def receipt_paths(self, run: str) -> list[Path]:
        """Return the receipts of a run's rounds, in order."""
        return _receipt_paths(self.consortium.run_dir(run))

    def compare(self, run: str, first: int = 1) -> None:
        """Compare a run's rounds, from one on, with the simulator's.

        Raises
        ------
        AssertionError
            If a receipt's signature does not hold, a hospital is missing in one, or
            the model after a round is another; the rounds are named.
        """
        authority = Consortium(self.consortium.state).authority
        signed = [_signed(path) for path in self.receipt_paths(run)]
        study = checkpoint.load(checkpoint.find(self.consortium.run_dir(run))).study
        secure = study.secure_aggregation is not None
        verify_chain(signed, authority, secure=secure)
        receipts = [Receipt.read_signed(each) for each in signed]
        assert len(receipts) >= first, f"round {first} of {run} was not reached"
        wrong = {
            receipt.index: {n: (s.state, s.reason) for n, s in receipt.sites.items()}
            for receipt in receipts[first - 1 :]
            if receipt.outgoing != self.reference[receipt.index - 1]
            or any(site.state != "contributed" for site in receipt.sites.values())
            or set(receipt.sites) != set(self.consortium.sites)
        }
        assert not wrong, f"rounds of {run} that differ from the simulator's: {wrong}"
        audit_log.verify(self.consortium.state / "audit.jsonl")
        for name in self.consortium.sites:
            audit_log.verify(self.consortium.site_state(name) / "audit.jsonl")

    def replays(self) -> dict[str, int]:
        """Return how many replies each site sent again, from its log.

        Raises
        ------
        AssertionError
            If one trained a round again after its reply was stored.
        """
        found = {}
        for name in self.consortium.sites:
            lines = audit_log.read(self.consortium.site_state(name) / "audit.jsonl")
            stored: set[tuple[str, str, int]] = set()
            found[name] = 0
            for line in lines:
                if line.get("type") != "train" or line["event"] == "refused":
                    continue
                about = (line["run"], line["phase"], line["round"])
                if line["event"] == "asked":
                    assert about not in stored, (name, about)
                if line["event"] == "replayed":
                    stored.add(about)
                    found[name] += 1
        return found

    # ---- processes ----

    def kill(self, *names: str) -> None:
        """Kill server or hospitals; what they started is left to notice."""
        for name in names:
            self.consortium.processes[name].kill()
            self.consortium.processes[name].wait()

    def kill_child(self, name: str, module: str) -> None:
        """Kill one process that server or a hospital started."""
        for pid in self.consortium.children(name, module):
            os.kill(pid, signal.SIGKILL)
            return
        raise FederationError(f"{name} has no process {module}")

    def restart(self, environments: Mapping[str, Mapping[str, str]]) -> None:
        """End and start server or hospitals; no other one has such variables then."""
        self.consortium.environments = environments
        ending = [self.consortium.processes[name] for name in environments]
        for process in ending:
            process.terminate()
        for process in ending:
            process.wait()
        self.consortium.revive()

    def pause(self, seconds: float) -> None:
        """Let time pass, and start again what ends meanwhile, as systemd does."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.consortium.revive()
            time.sleep(0.5)

    def log(self, name: str) -> str:
        """Return what server or hospital has printed."""
        path = self.consortium.folder / f"{name}.log"
        return path.read_text(errors="replace")


@contextmanager
def serving(folder: Path, road: Road) -> Iterator[Served]:
    """Provision, start and approve a consortium for the tests of a session."""
    consortium = build(folder)
    first, second, third = consortium.sites
    served = Served(consortium, "", road=road)
    if not road.why_not:
        consortium.interface = road.here
        consortium.prefixes = {third: road.prefix}
    address = consortium.host = consortium.interface
    served.links = {name: Link(address) for name in consortium.sites}
    consortium.servers = {name: link.open() for name, link in served.links.items()}
    served.clocks = {n: Clock(folder / f"{n}.clock") for n in (first, "server")}
    for clock in served.clocks.values():
        clock.jump(0)
    served.no_clocks = served.clocks["server"].why_not()
    consortium.provision()
    port = Consortium(consortium.state).settings.port
    for link in served.links.values():
        link.target = (address, port)
    proxy = intercepting_proxy(folder / "proxy", address, served.proxied)
    site_toml = consortium.site_toml(second)
    lines = f'proxy = "{proxy}"\nserver_authority = "{folder}/proxy/ca.pem"\n'
    site_toml.write_text(lines + site_toml.read_text())
    served.disks = {
        first: Disk(consortium.site_state(first)),
        "server": Disk(consortium.state),
    }
    try:
        for disk in served.disks.values():
            served.no_disks = served.no_disks or disk.mount()
        with consortium, ThreadPoolExecutor() as background:
            reference = background.submit(_reference, consortium)
            consortium.start()
            served.contract = consortium.publish()
            consortium.approve(served.contract, runs=1000)
            served.reference = reference.result()
            yield served
    finally:  # its processes have ended before the disks go
        for disk in served.disks.values():
            disk.unmount()
        for link in served.links.values():
            link.close()


def _reference(consortium: Rehearsal) -> list[str]:
    """Return the digest of the simulator's model after each round."""
    consortium.simulate()
    paths = _receipt_paths(consortium.folder / "simulated")
    return [Receipt.read_signed(_signed(path)).outgoing for path in paths]


def _receipt_paths(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("checkpoints/[0-9]*/receipt.json"))


def _signed(path: Path) -> Signed:
    return Signed.from_json(path.read_text(), str(path))


def _silent(line: str) -> None:
    """Say nothing."""
