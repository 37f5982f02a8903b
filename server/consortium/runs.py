"""Folders of the runs at the server.

runs/RUN/settings.json   settings of the server app (server/settings.py)
runs/RUN/study.json      the contract's study
runs/RUN/state.json      running, stopped, failed or finished, and why
runs/RUN/journal.jsonl, checkpoints/, judgement.json   the app's own
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from fedgex.common.errors import FedgexError
from fedgex.common.system.files import read_json, write_atomic
from fedgex.common.trust.contract import Contract
from fedgex.common.trust.signed import Signed
from fedgex.server import journal
from fedgex.server.consortium.commands import Order
from fedgex.server.consortium.store import Consortium, NotFoundError
from fedgex.server.federation import public_cohort as public

State = Literal["running", "stopped", "failed", "finished"]

HOLDOUT = "holdout"
"""Folder of the public hold-out in the state directory (common/data/cohort.py)."""


@dataclass
class Run:
    """A run's folder."""

    folder: Path

    @property
    def name(self) -> str:
        """Name of the run and its folder."""
        return self.folder.name

    @property
    def settings_path(self) -> Path:
        """Path of the server app's settings."""
        return self.folder / "settings.json"

    @property
    def facts(self) -> dict[str, Any]:
        """Content of state.json: state, reason, contract and times."""
        return read_json(self.folder / "state.json", "the state of a run")

    @property
    def state(self) -> State:
        """State of the run."""
        found = self.facts["state"]
        if found not in get_args(State):
            raise FedgexError(f'{self.folder}: the state "{found}" is unknown.')
        state: State = found
        return state

    def set(self, state: State, *, reason: str | None) -> None:
        """Write a new state."""
        self._write({**self.facts, "state": state, "reason": reason, "since": _now()})

    def _write(self, facts: Mapping[str, Any]) -> None:
        content = json.dumps(facts, sort_keys=True, indent=1)
        write_atomic(self.folder / "state.json", content.encode())


def load(folder: Path, name: str) -> Run:
    """Return a run of the state directory `folder`.

    Raises
    ------
    NotFoundError
        If there is none of that name.
    """
    run = Run(folder / "runs" / name)
    if not (run.folder / "state.json").exists():
        raise NotFoundError(
            f'there is no run "{name}"; fedgex-admin run list shows those there are.'
        )
    return run


def every(folder: Path) -> list[Run]:
    """Return all runs of the state directory, in order of name."""
    return [Run(path.parent) for path in sorted(folder.glob("runs/*/state.json"))]


def unfinished(folder: Path) -> list[Run]:
    """Return the runs to resume when the server starts."""
    return [run for run in every(folder) if run.state == "running"]


def reason(folder: Path) -> str | None:
    """Return why a run stopped, from its journal."""
    path = folder / "journal.jsonl"
    if not path.exists():
        return None
    failed = [e for e in journal.read(path) if e["event"] == "run-failed"]
    return str(failed[-1]["reason"]) if failed else None


def launch(consortium: Consortium, order: Order) -> Run:
    """Create the folder of an ordered run; a repeated order returns the same run.

    Raises
    ------
    FedgexError
        If the contract was not published or has expired, or its study uses a public
        cohort and there is none.
    """
    contract = _contract(consortium, order.subject)
    if contract.expired():
        raise FedgexError(
            f"the contract {order.subject[:16]} expired on {contract.expires}; sign "
            "and publish a new one."
        )
    run = Run(consortium.folder / "runs" / order.run)
    if (run.folder / "state.json").exists():
        if run.facts["token"] != order.token:
            raise FedgexError(
                f'there is a run "{run.name}" already, launched with the token '
                f"{run.facts['token']}; give this one another --name."
            )
        return run
    public.require(contract.study, consortium.folder / public.FOLDER)
    run.folder.mkdir(parents=True, exist_ok=True)
    _settings(consortium, run.folder, contract, order.subject, order.run, "conduct")
    facts = {
        "contract": order.subject,
        "launched": _now(),
        "launched_by": order.administrator,
        "token": order.token,
        "state": "running",
        "reason": None,
        "since": _now(),
    }
    run._write(facts)
    return run


def publishing(consortium: Consortium, order: Order) -> Path:
    """Write the settings of a job that sends a contract to the hospitals."""
    contract = _contract(consortium, order.subject)
    folder = consortium.folder / "contracts" / order.subject
    folder.mkdir(exist_ok=True)
    return _settings(consortium, folder, contract, order.subject, "", "publish")


def delivering(consortium: Consortium, run: str, bundle: Path) -> Path:
    """Write the settings of a job that sends a released model to the hospitals."""
    contract_hash = str(load(consortium.folder, run).facts["contract"])
    contract = _contract(consortium, contract_hash)
    folder = consortium.folder / "releases" / run
    folder.mkdir(exist_ok=True)
    return _settings(
        consortium, folder, contract, contract_hash, run, "deliver", bundle
    )


def _settings(
    consortium: Consortium,
    folder: Path,
    contract: Contract,
    contract_hash: str,
    run: str,
    job: str,
    bundle: Path | None = None,
) -> Path:
    write_atomic(folder / "study.json", contract.study.to_json().encode())
    holdout = consortium.folder / HOLDOUT
    public_cohort = consortium.folder / public.FOLDER
    settings = {
        "job": job,
        "study": str(folder / "study.json"),
        "run_dir": str(folder),
        "holdout": str(holdout) if holdout.exists() else None,
        "public": str(public_cohort) if public_cohort.exists() else None,
        "n_sites": len(contract.sites),
        "poll_s": 0.2,
        "state_dir": str(consortium.folder),
        "contract": contract_hash,
        "run": run,
        "bundle": None if bundle is None else str(bundle),
    }
    path = folder / "settings.json"
    write_atomic(path, json.dumps(settings, indent=1).encode())
    return path


def _contract(consortium: Consortium, contract_hash: str) -> Contract:
    path = consortium.folder / "contracts" / f"{contract_hash}.json"
    if not path.exists():
        raise NotFoundError(
            f"no contract {contract_hash[:16]} was published; sign it and run "
            "fedgex-admin study publish."
        )
    signed = Signed.from_json(path.read_text(), path.name)
    consortium.signers(signed)
    return Contract.read_signed(signed)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
