"""What we ask of Flower's control interface."""

from types import SimpleNamespace

import httpx
import pytest

from fedgex.server.service.flower import Control


def answering(status):
    """Return the interface of a SuperLink that answers every order with a status."""

    def stop(request):
        response = httpx.Response(status, request=httpx.Request("POST", "http://here"))
        response.raise_for_status()

    control = Control(1, "secret")
    control.client.close()
    control.client = SimpleNamespace(StopRun=stop)
    return control


def test_a_run_that_is_over_already_counts_as_stopped():
    answering(412).stop_run(7)


def test_whatever_else_the_superlink_refuses_is_told():
    with pytest.raises(httpx.HTTPStatusError):
        answering(401).stop_run(7)
