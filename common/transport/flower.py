"""Private interfaces of Flower that server and site share: tasks, and stored records.

No other module of `common` imports them; those of either side are in
`server.service.flower` and `client.service.flower`. Pinned by `flwr` in pyproject.toml.
"""

from __future__ import annotations

import asyncio

from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from flwr.proto.runtime_pb2 import AcquireTaskRequest, SendTaskHeartbeatRequest
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.runtime import RuntimeHttpClient

__all__ = [
    "CLIENT_APP",
    "SERVER_APP",
    "RuntimeHttpClient",
    "acquire",
    "executor",
    "from_bytes",
    "holder",
    "look_less_often",
    "send_heartbeat",
    "to_bytes",
]

SERVER_APP, CLIENT_APP = "flwr-serverapp", "flwr-clientapp"
"""Kinds of task. Flower has more, and we take none of them."""

TICK_S = 0.5

_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"


def executor(port: int, secret: str) -> RuntimeHttpClient:
    """Return a client of a runtime on this machine that may acquire tasks."""
    return _client(
        port,
        RuntimeVersionHttpInterceptor(component_name="SuperExec"),
        SuperExecAuthHttpInterceptor(
            master_secret=secret.encode(), protected_methods=frozenset({_ACQUIRE})
        ),
    )


def holder(port: int, token: str, component: str) -> RuntimeHttpClient:
    """Return a client of a runtime on this machine for the task of a token."""
    return _client(
        port,
        RuntimeVersionHttpInterceptor(component_name=component),
        RuntimeTokenHttpInterceptor(token),
    )


def acquire(client: RuntimeHttpClient, kind: str) -> tuple[str, int] | None:
    """Return token and run of a kind's next pending task, None if there is none."""
    reply = client.AcquireTask(AcquireTaskRequest(supported_task_types=[kind]))
    if not (reply.HasField("task") and reply.token):
        return None
    return str(reply.token), int(reply.task.run_id)


def look_less_often() -> None:
    """Have uvicorn's servers in this process look for their end twice a second.

    Ten times, as without it, costs each 0.2 % of a core while nothing happens.
    """
    import uvicorn

    async def main_loop(server: uvicorn.Server) -> None:
        while not await server.on_tick(0):
            await asyncio.sleep(TICK_S)

    uvicorn.Server.main_loop = main_loop  # type: ignore[method-assign, assignment]


def send_heartbeat(client: RuntimeHttpClient) -> None:
    """Report that the task of a client's token is alive."""
    client.SendTaskHeartbeat(SendTaskHeartbeatRequest())


def to_bytes(content: RecordDict) -> bytes:
    """Return records as bytes; equal records give equal bytes."""
    written: bytes = recorddict_to_proto(content).SerializeToString(deterministic=True)
    return written


def from_bytes(written: bytes) -> RecordDict:
    """Return the records that `to_bytes` wrote."""
    return recorddict_from_proto(RecordDictProto.FromString(written))


def _client(port: int, *interceptors: ProtobufClientInterceptor) -> RuntimeHttpClient:
    return RuntimeHttpClient.from_server_address(
        f"127.0.0.1:{port}",
        True,
        None,
        interceptors,
    )
