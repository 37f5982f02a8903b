"""Numbers for Prometheus, served on the loopback interface only.

A collector reads them from the files of a state directory at each scrape, so that the
processes that write those files need not know of it.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.registry import Collector

from fedgex.common.errors import ConfigError

logger = logging.getLogger(__name__)

ADDRESS = "127.0.0.1"


def serve(port: int, collector: Collector) -> None:
    """Answer scrapes from this machine, in a thread that ends with the process.

    A file that cannot be read makes a scrape fail, which Prometheus reports.

    Raises
    ------
    ConfigError
        If the port cannot be listened on.
    """
    registry = CollectorRegistry()
    registry.register(collector)
    try:
        start_http_server(port, ADDRESS, registry)
    except OSError as error:
        raise ConfigError(
            f"metrics_port {port} cannot be listened on ({error.strerror}); expected a "
            "free port of this machine. Choose another, or stop what holds it."
        ) from error
    logger.info("metrics on http://%s:%d/metrics", ADDRESS, port)


class Tail:
    """A file of JSON lines that grows: each finished line is given out once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0

    def new(self) -> list[dict[str, Any]]:
        """Return the lines added since the last call; none if there is no file.

        Raises
        ------
        ValueError
            If a finished line is not JSON; the next call meets it again.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            return []
        finished = content[: content.rfind(b"\n") + 1]
        lines = [json.loads(line) for line in finished.splitlines()]
        self._offset += len(finished)
        return lines
