"""Replies that a site has given, kept so that the same question has one answer.

A reply is on the disk before it is sent. Asked again, the site sends the same bytes and
computes nothing: no round is trained twice, and nothing random is drawn twice.
"""

from __future__ import annotations

from pathlib import Path

from flwr.app import RecordDict

from fedgex.common.errors import FedgexError
from fedgex.common.system.files import write_atomic
from fedgex.common.transport.flower import from_bytes, to_bytes

KEPT_ROUNDS = 2
"""A server that lost its last checkpoint asks for the round before, no earlier one."""


class AnotherRequestError(FedgexError):
    """The round was answered already, and that answer cannot be given again."""


class Replies:
    """The stored replies of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, question: str, request: str) -> RecordDict | None:
        """Return the reply to a question, None if it was not answered yet.

        Parameters
        ----------
        question
            Type, phase and round.
        request
            Digest of what is asked.

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
        """Put a reply on the disk; of earlier rounds, only what was asked stays."""
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
