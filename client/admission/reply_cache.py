"""Cache of a site's replies, by request digest.

A reply is stored before it is sent, and a repeated request gets the stored bytes: no
round is trained twice, and no noise is drawn twice.
"""

from __future__ import annotations

from pathlib import Path

from flwr.app import RecordDict

from fedgex.common.errors import FedgexError
from fedgex.common.system.files import write_atomic
from fedgex.common.transport.flower import from_bytes, to_bytes

KEPT_ROUNDS = 2
"""Rounds whose replies are kept; a server without its last checkpoint repeats one."""


class AnotherRequestError(FedgexError):
    """The question was answered for another request, or its reply was dropped."""


class Replies:
    """Stored replies of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, question: str, request: str) -> RecordDict | None:
        """Return the reply to a question, None if it was not answered yet.

        Parameters
        ----------
        question
            Type, phase and round.
        request
            Digest of the request.

        Raises
        ------
        AnotherRequestError
            If the question was answered for another request.
        """
        path = self._path(question)
        if not path.exists():
            return None
        answered, _, content = path.read_bytes().partition(b"\n")
        if answered.decode() == request and not content:
            raise AnotherRequestError(f"the reply to {question} is no longer kept.")
        if answered.decode() != request:
            raise AnotherRequestError(
                f"{question} was answered for request {answered.decode()[:16]}, and "
                f"this is request {request[:16]}."
            )
        return from_bytes(content)

    def store(self, question: str, request: str, reply: RecordDict) -> None:
        """Store a reply; of replies older than `KEPT_ROUNDS`, keep the digest only."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._path(question)
        write_atomic(path, request.encode() + b"\n" + to_bytes(reply), point="reply")
        group = question.rsplit("-", 1)[0]
        for old in sorted(self.folder.glob(f"{group}-*.reply"))[:-KEPT_ROUNDS]:
            with old.open("rb") as file:
                answered = file.readline()
            if old.stat().st_size > len(answered):
                write_atomic(old, answered)

    def _path(self, question: str) -> Path:
        return self.folder / f"{question}.reply"
