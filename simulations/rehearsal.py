"""A consortium on this machine, over the network: real processes, keys and TLS.

The same commands that people type at server and hospitals run one after the other:
found the consortium, admit administrators and hospitals, publish and approve
a study, run it, release the model, predict. The tests of failures use the same class,
and kill what it started.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from fedgex.client.settings import SiteSettings
from fedgex.common.data.cohort import load_cohort
from fedgex.common.errors import ConfigError, FederationError
from fedgex.common.models import checkpoint
from fedgex.common.study import Study
from fedgex.server import journal
from fedgex.server.consortium import annotated_toml
from fedgex.server.settings import ServerSettings
from fedgex.simulations import engine
from fedgex.simulations.daemons import Daemons, free_ports
from fedgex.simulations.data.split import HOLDOUT, PUBLIC, split
from fedgex.simulations.data.synthetic import new_data
from fedgex.simulations.run import checked
from fedgex.simulations.scenario import Scenario, find

ADMINISTRATORS = ("first-administrator", "second-administrator")
HOST = "localhost"
RUN_LIMIT_S = 600.0
"""Longest wait for a run, for a machine that is busy otherwise."""
CHANGES: Mapping[str, Any] = {
    "name": "rehearsal",
    "pretraining": {"rounds": 3},
    "classification": {"rounds": 3},
    "survival": {"rounds": 2},
    "evaluation": {"rates": [0.5], "panels": []},
}
"""Of the scenario's study, so that a rehearsal takes minutes."""

Reporter = Callable[[str], None]
"""Receives one line for each step."""


@dataclass(kw_only=True)
class Rehearsal(Daemons):
    """A consortium under one folder, and the processes that serve it."""

    study: Study
    sites: Sequence[str]
    """Hospitals; their data lie in `folder/split/sites/NAME`."""
    report: Reporter = print
    host: str = HOST
    """Name or address under which hospitals find the server."""
    interface: str = "127.0.0.1"
    """Address that the server listens on."""
    servers: dict[str, str] = field(default_factory=dict)
    """host:port that a hospital connects to, where it is not the server's own."""

    # ---- places ----

    @property
    def state(self) -> Path:
        """The consortium's state directory."""
        return self.folder / "server"

    def site_toml(self, site: str) -> Path:
        """Return the settings file of a hospital."""
        return self.folder / "sites" / site / "site.toml"

    def site_state(self, site: str) -> Path:
        """Return the state directory of a hospital."""
        return SiteSettings.load(self.site_toml(site)).state_dir

    def key(self, administrator: str) -> Path:
        """Return the private key of an administrator."""
        return self.folder / "administrators" / f"{administrator}.key"

    @property
    def contract(self) -> Path:
        """The contract's TOML."""
        return self.folder / "contract.toml"

    def run_dir(self, run: str) -> Path:
        """Return the folder of a run."""
        return self.state / "runs" / run

    # ---- commands ----

    def admin(self, *arguments: str | Path) -> Any:
        """Run `fedgex-admin`, and return its JSON."""
        words = [*map(str, arguments), "--format", "json"]
        text = self._command("fedgex-admin", words)
        return json.loads(text) if text.strip() else None

    def site(self, *arguments: str | Path) -> str:
        """Run `fedgex-site`, and return its output."""
        return self._command("fedgex-site", [str(each) for each in arguments])

    def _command(self, command: str, words: list[str]) -> str:
        # Ends with the same exit code and message as for a person at a terminal.
        program = Path(sys.executable).with_name(command)
        environment = self.environment("commands")
        done = subprocess.run(
            [program, *words], capture_output=True, text=True, env=environment
        )
        if done.returncode:
            shown, reason = " ".join([command, *words]), done.stderr.strip()
            raise FederationError(f"{shown} ended with {done.returncode}: {reason}")
        return done.stdout

    def environment(self, who: str) -> dict[str, str]:
        """Return the environment variables of a process."""
        return {**super().environment(who), "FEDGEX_STATE": str(self.state)}

    # ---- steps ----

    def provision(self) -> None:
        """Found the consortium, admit two administrators and every hospital."""
        port, control, health, metrics = free_ports(4)
        self.admin(
            "consortium", "init", "rehearsal", "--state", self.state,
            "--host", self.host, "--port", port, "--interface", self.interface,
            "--control-port", control, "--health-port", health,
            "--metrics-port", metrics,
        )  # fmt: skip
        for name in ADMINISTRATORS:
            folder = self.folder / "administrators"
            made = self.admin("administrator", "request", name, "--out", folder)
            self.admin(
                "administrator", "add", folder / f"{name}.request.json",
                "--fingerprint", made["fingerprint"],
            )  # fmt: skip
        for name in self.sites:
            self.admit(name, self.servers.get(name, f"{self.host}:{port}"))
        for apart in (HOLDOUT, PUBLIC):
            if self._checked(apart).exists():
                shutil.copytree(self._checked(apart), self.state / apart)
        self.report(f"provisioned: {len(self.sites)} hospitals, {len(ADMINISTRATORS)} "
                  f"administrators, one port ({port})")  # fmt: skip

    def admit(self, name: str, server: str) -> None:
        """Set up one hospital, and have the consortium admit it."""
        source, folder = self.folder / "split" / "sites" / name, self.folder / "sites"
        shutil.copytree(source, folder / name)
        site_toml = self.site_toml(name)
        site_toml.write_text(f'server = "{server}"\n' + site_toml.read_text())
        words = ("--name", name, "--server", server)
        fingerprint = self.site("init", folder / name, *words).strip()
        request = self.site_state(name) / "request.json"
        kit = folder / name / "kit.json"
        self.admin(
            "site", "add", name, "--request", request, "--fingerprint", fingerprint,
            "--out", kit,
        )  # fmt: skip
        self.redirect(name, kit)
        self.site("join", site_toml, kit)

    def redirect(self, name: str, kit: Path) -> None:
        """Have a kit name the server by `servers`, as the hospital's DNS would do."""
        if name in self.servers:
            values = json.loads(kit.read_text()) | {"server": self.servers[name]}
            kit.write_text(json.dumps(values))

    def start_server(self) -> None:
        """Start the server, and wait until it is healthy."""
        self.serve("server", ["fedgex-admin", "server", "start"])
        self.until("the server serves", lambda: self._healthy())

    def start_site(self, name: str) -> None:
        """Start a hospital's daemon."""
        self.serve(name, ["fedgex-site", "start", str(self.site_toml(name))])

    def start(self) -> None:
        """Start server and hospitals."""
        self.start_server()
        for name in self.sites:
            self.start_site(name)
        self.report("started: server and daemons")

    def draft(self) -> str:
        """Write and sign the contract; return its hash."""
        study = self.folder / "study.toml"
        study.write_text(annotated_toml.render(self.study))
        genes = self.folder / "genes.txt"
        genes.write_text("\n".join(self.study.vocabulary.genes) + "\n")
        expires = (datetime.now(UTC) + timedelta(days=30)).date()
        open_ = self.study.secure_aggregation is None
        reason = ("--no-secure-aggregation", "as in the simulator") if open_ else ()
        drafted = self.admin(
            "study", "new", "--study", study, "--genes", genes,
            "--purpose", "Rehearsal of a federation on one machine",
            "--expires", str(expires), "--sites", ",".join(self.sites),
            "--out", self.contract, *reason,
        )  # fmt: skip
        self.admin("study", "sign", self.contract, "--key", self.key(ADMINISTRATORS[0]))
        return str(drafted["hash"])

    def publish(self) -> str:
        """Publish the contract, and wait until every hospital has it."""
        hash = self.draft()
        self.admin(
            "study", "publish", self.contract, "--key", self.key(ADMINISTRATORS[0])
        )
        for name in self.sites:
            path = self.site_state(name) / "contracts" / f"{hash}.json"
            self.until(f"{name} received the contract", path.exists)
        self.report(f"published: contract {hash[:12]}")
        return hash

    def approve(
        self, hash: str, sites: Iterable[str] | None = None, *, runs: int = 1
    ) -> None:
        """Have a person at each hospital approve the contract."""
        expires = (datetime.now(UTC) + timedelta(days=20)).date()
        for name in self.sites if sites is None else sites:
            self.site(
                "study", "approve", self.site_toml(name), hash, "--by", "data-officer",
                "--expires", str(expires), "--runs", str(runs),
            )  # fmt: skip
        self.report("approved: by a person at every hospital")

    def launch(self, hash: str, run: str) -> None:
        """Order a run of a contract."""
        key = self.key(ADMINISTRATORS[0])
        self.admin("run", "launch", hash, "--name", run, "--key", key)

    def wait(self, run: str, limit_s: float = RUN_LIMIT_S) -> str:
        """Wait until a run has ended; return how: finished, failed or stopped."""
        shown = 0

        def ended() -> bool:
            nonlocal shown
            for event in self.events(run)[shown:]:
                shown += 1
                self._tell(event)
            return self.state_of(run) not in ("ordered", "running")

        self.until("the run ends", ended, limit_s)
        return self.state_of(run)

    def release(self, run: str) -> Path:
        """Have both administrators release the model, wait for its delivery."""
        for name in ADMINISTRATORS:
            self.admin("model", "release", run, "--key", self.key(name))
        for name in self.sites:
            path = self.site_state(name) / "models" / f"{run}.fedgex"
            self.until(f"{name} received the model", path.exists)
        bundle = self.state / "releases" / f"{run}.fedgex"
        self.report(f"released: by {len(ADMINISTRATORS)} administrators, delivered")
        return bundle

    def predict(self, name: str, run: str) -> Path:
        """Restore a hospital's missing values with the released model."""
        model = self.site_state(name) / "models" / f"{run}.fedgex"
        out = self.folder / "sites" / name / "restored.csv"
        samples = self.folder / "split" / "sites" / name / "expression.parquet"
        self.site(
            "predict", "impute", "--site", self.site_toml(name), "--model", model,
            "--input", samples, "--output", out,
        )  # fmt: skip
        self.report(f"predicted: {out}")
        return out

    def simulate(self) -> str:
        """Run the same study in the simulator; return the digest of its model."""
        run_dir, sites = self.folder / "simulated", self.folder / "simulated-sites"
        for name in self.sites:
            shutil.copytree(self.folder / "split" / "sites" / name, sites / name)
        study = self.folder / "study.json"
        study.write_text(self.study.to_json())
        public = self._checked(PUBLIC)
        settings = ServerSettings(
            study=study.resolve(),
            run_dir=run_dir.resolve(),
            holdout=self._checked(HOLDOUT).resolve(),
            public=public.resolve() if public.exists() else None,
            n_sites=len(self.sites),
            poll_s=engine.POLL_S,
        )
        log = self.folder / "engine.log"
        if code := engine.start("local", settings, sites, workers=1, log=log).wait():
            raise FederationError(f"the simulator ended with {code}; see {log}")
        return digest(run_dir)

    def _checked(self, apart: str) -> Path:
        return self.folder / "split" / apart / "checked"

    # ---- looks ----

    def events(self, run: str) -> list[dict[str, Any]]:
        """Return a run's journal so far."""
        return journal.tail(self.run_dir(run) / "journal.jsonl", 0)[0]

    def state_of(self, run: str) -> str:
        """Return how a run stands: ordered, running, stopped, failed or finished."""
        path = self.run_dir(run) / "state.json"
        if not path.exists():
            return "ordered"
        return str(json.loads(path.read_text())["state"])

    def digest(self, run: str) -> str:
        """Return the SHA-256 of a run's last model."""
        return digest(self.run_dir(run))

    def _tell(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "round":
            states = [site["state"] for site in event["sites"].values()]
            self.report(
                f"{event['phase']} {event['round']}/{event['rounds']}: "
                f"{states.count('contributed')} of {len(states)} contributed, "
                f"{event['seconds'] or 0:.1f} s"
            )
        elif event["event"] in ("run-failed", "run-finished", "asked-again"):
            reason = event.get("reason", "")
            self.report(f"{event['event']} {event.get('site', '')} {reason}".strip())

    def _healthy(self) -> bool:
        path = self.state / "nodes.json"
        return path.exists() and len(json.loads(path.read_text())) == len(self.sites)


def rehearse(
    data: Path | None, folder: Path, n_sites: int, report: Reporter, *, compare: bool
) -> None:
    """Take a study from founding the consortium to a prediction at a hospital.

    Parameters
    ----------
    data
        Folder of the real data (scenario `tcga`); None for synthetic ones (`demo`).
    compare
        Run the study in the simulator too, and say whether the models are equal.

    Raises
    ------
    FederationError
        If any step fails, or the compared models differ.
    ConfigError
        If the folder is in use, or the data do not fit.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; choose a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    scenario = find("demo" if data is None else "release")
    if data is None:
        data = folder / "data"
        new_data(data)
    study, sites = prepare(scenario, data.resolve(), folder, n_sites, CHANGES)
    with Rehearsal(folder=folder, study=study, sites=sites, report=report) as rehearsal:
        rehearsal.provision()
        rehearsal.start()
        contract = rehearsal.publish()
        rehearsal.approve(contract)
        rehearsal.launch(contract, study.name)
        state = rehearsal.wait(study.name)
        if state != "finished":
            folder = rehearsal.run_dir(study.name)
            raise FederationError(f"the run {state}: see {folder}")
        report(f"model {rehearsal.digest(study.name)[:16]}")
        rehearsal.release(study.name)
        rehearsal.predict(sites[0], study.name)
        if compare:
            simulated = rehearsal.simulate()
            if simulated != rehearsal.digest(study.name):
                raise FederationError(f"the simulator's model is {simulated[:16]}")
            report("the simulator's model is the same, bit for bit")


def prepare(
    scenario: Scenario,
    data: Path,
    folder: Path,
    n_sites: int,
    changes: Mapping[str, Any],
) -> tuple[Study, list[str]]:
    """Split the data, take the largest hospitals, and fix the study's genes.

    Parameters
    ----------
    changes
        Of the scenario's study, by section and key.
    """
    parts = split(scenario, data, folder / "split")
    by_size = sorted(parts.sites, key=lambda name: (-parts.sizes[name], name))
    sites = sorted(by_size[:n_sites])
    for apart in parts.apart:
        checked(folder / "split" / apart, scenario.study)
    cohort = load_cohort(folder / "split" / HOLDOUT / "checked", scenario.study.scale)
    values = json.loads(scenario.study.to_json())
    for section, keys in changes.items():
        values[section] = values[section] | keys if isinstance(keys, Mapping) else keys
    values["vocabulary"]["genes"] = sorted(cohort.genes)
    return Study.read(values, "the rehearsal's study"), sites


def digest(run_dir: Path) -> str:
    """Return the SHA-256 of the last model of a run."""
    return checkpoint.digest(checkpoint.find(run_dir) / "model.safetensors")
