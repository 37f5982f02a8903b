"""Flower tasks: how our own executors, at server and sites, come by their work."""

from __future__ import annotations

from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.runtime import RuntimeHttpClient

SERVER_APP, CLIENT_APP = "flwr-serverapp", "flwr-clientapp"
"""Kinds of task. Flower has more, and we take none of them."""

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


def _client(port: int, *interceptors: ProtobufClientInterceptor) -> RuntimeHttpClient:
    return RuntimeHttpClient.from_server_address(
        f"127.0.0.1:{port}",
        True,
        None,
        interceptors,
    )
