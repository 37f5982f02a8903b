"""What is refused between real processes, and what its reader sees."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto, run_from_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.runtime_pb2 import PullTaskInputRequest
from flwr.supercore.fab import Fab
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from fedgex.common import keys
from fedgex.common.transport import flower as runtime
from fedgex.common.trust import audit_log
from fedgex.server.consortium.store import Consortium
from fedgex.server.service import flower, superlink
from fedgex.simulations.daemons import LIMIT_S

pytestmark = pytest.mark.deployment


def test_only_the_fleet_and_health_are_reachable_from_outside(served):
    """Launch, stop, register and taking a task are tried, and answered with 404."""
    consortium = Consortium(served.consortium.state)
    address = f"https://{served.consortium.host}:{consortium.settings.port}"
    authority = str(consortium.folder / "pki" / "authority.crt")
    tried = [
        "/v1/control/start-run",
        "/v1/control/stop-run",
        "/v1/control/register-node",
        "/v1/control/list-runs",
        "/v1/runtime/acquire-task",
        "/v1/runtime/pull-task-input",
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/docs",
        "/openapi.json",
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/%2e%2e/control/list-runs",
    ]
    with httpx.Client(verify=authority, trust_env=False) as client:
        found = {
            path: client.post(
                address + path,
                content=b"",
                headers={"content-type": "application/x-protobuf"},
            ).status_code
            for path in tried
        }
        assert set(found.values()) == {404}, found
        assert client.get(f"{address}/health").status_code == 200
    lines = audit_log.read(consortium.folder / "audit.jsonl")
    assert sum(line["event"] == "denied" for line in lines) < len(tried)


def test_control_on_the_loopback_interface_wants_the_supervisors_secret(served):
    port = Consortium(served.consortium.state).settings.control_port
    address = f"http://127.0.0.1:{port}/v1/control/list-runs"
    reply = httpx.post(address, content=b"", trust_env=False)
    assert reply.status_code == 401


def test_code_in_a_bundle_never_runs_at_a_site(served, tmp_path: Path, monkeypatch):
    """A coordinator who turned evil pushes code and a message of his own."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)  # which Flower's client, in this process, would use
    marker = tmp_path / "ran"
    evil = f"import pathlib; pathlib.Path({str(marker)!r}).write_text('ran')\n"
    content, _ = build_fab_from_files(
        {
            "pyproject.toml": flower.BUNDLE.format(version="6.6.6").encode(),
            "fedgex/__init__.py": evil.encode(),
            "fedgex/client/app.py": evil.encode(),
            "sitecustomize.py": evil.encode(),
        }
    )
    bundle = Fab(_sha256(content), content, {})
    (pid,) = served.consortium.children("server", "fedgex.server.service.superlink")
    secret = _environment(pid)[superlink.SECRET_VARIABLE]
    port = Consortium(served.consortium.state).settings.control_port
    codes: set[str] = set()

    def push() -> None:
        supervisor = served.consortium.processes["server"].pid
        os.kill(supervisor, signal.SIGSTOP)  # it would take the task and ignore it
        try:
            request = StartRunRequest(fab=fab_to_proto(bundle))
            with closing(flower.Control(port, secret).client) as control:
                run = control.StartRun(request).run_id
            with closing(runtime.executor(port, secret)) as executor:
                task = runtime.acquire(executor, runtime.SERVER_APP)
            assert task is not None
            assert task[1] == run
            with closing(_grid(port, task[0])) as grid:
                codes.update(_send(grid, served))
        finally:
            os.kill(supervisor, signal.SIGCONT)

    served.survives(push)
    assert codes == {"FX-STUDY-006"}
    assert not marker.exists()
    for name in served.consortium.sites:
        state = served.consortium.site_state(name)
        lines = audit_log.read(state / "audit.jsonl")
        assert bundle.hash_str in {e.get("digest") for e in lines}
        assert "FX-STUDY-006" in {e.get("code") for e in lines}


def test_a_site_whose_key_was_struck_is_refused_and_named(served):
    """The site is revoked between two rounds; the quorum wants it, so the run fails."""
    name, state_of = served.consortium.sites[-1], served.consortium.state_of
    run = served.running()
    served.consortium.admin("site", "revoke", name, "--reason", "a test")
    served.consortium.until("the run fails", lambda: state_of(run) == "failed")
    state = served.consortium.run_dir(run) / "state.json"
    reason = json.loads(state.read_text())["reason"]
    assert name in reason
    assert "revoked" in reason


def test_new_keys_bring_a_struck_site_back_without_touching_other_kits(served):
    """New keys, new kit, and a new contract: the one before pins the key struck."""
    consortium, name = served.consortium, served.consortium.sites[-1]
    others = {
        n: (consortium.site_state(n) / "identity" / "kit.json").read_bytes()
        for n in consortium.sites[:-1]
    }
    process = consortium.processes.pop(name)
    process.terminate()
    process.wait()
    state, site_toml = consortium.site_state(name), consortium.site_toml(name)
    (state / "identity").rename(state / "identity.before")
    server = consortium.servers[name]
    words = ("--name", name, "--server", server)
    fingerprint = consortium.site("init", site_toml.parent, *words).strip()
    kit = site_toml.parent / "new-kit.json"
    consortium.admin(
        "site", "add", name, "--request", state / "request.json",
        "--fingerprint", fingerprint, "--out", kit,
    )  # fmt: skip
    consortium.redirect(name, kit)
    consortium.site("join", site_toml, kit)
    consortium.start_site(name)
    for path in consortium.folder.glob(f"{consortium.contract.name}*"):
        path.rename(path.with_name(f"before.{path.name}"))
    served.contract = consortium.publish()
    consortium.approve(served.contract, runs=1000)
    served.survives()
    for other, kit_before in others.items():
        path = consortium.site_state(other) / "identity" / "kit.json"
        assert path.read_bytes() == kit_before


def test_the_servers_new_certificate_is_taken_up_during_a_run(served):
    served.survives(lambda: served.consortium.admin("consortium", "renew"))


def _grid(port: int, token: str) -> HttpGrid:
    grid = HttpGrid(f"127.0.0.1:{port}", insecure=True, token=token)
    task = grid._runtime_client.PullTaskInput(PullTaskInputRequest())
    TaskIdentity.run_id, TaskIdentity.node_id = task.run.run_id, task.context.node_id
    TaskIdentity.task_id = task.task_id
    grid.set_run(run_from_proto(task.run))
    return grid


def _send(grid: HttpGrid, served: Any) -> set[str]:
    """Send every site a message of the evil run; return the codes of the refusals."""
    content = RecordDict({"evil": ConfigRecord({"wants": "rows"})})
    nodes = list(grid.get_node_ids())
    assert len(nodes) == len(served.consortium.sites)
    waiting = set(
        grid.push_messages([Message(content, node, keys.TRAIN) for node in nodes])
    )
    codes, end = set(), time.monotonic() + LIMIT_S
    while waiting and time.monotonic() < end:
        for reply in grid.pull_messages(list(waiting)):
            waiting.discard(reply.metadata.reply_to_message_id)
            codes.add(str(reply.content.config_records[keys.REFUSAL]["code"]))
        time.sleep(0.2)
    assert not waiting
    return codes


def _environment(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
