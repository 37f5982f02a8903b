"""What hospitals and administrators send to be admitted: no private key."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal, Self

from pydantic import Field

from fedgex.common.settings import NAME_PATTERN, Settings
from fedgex.common.system.files import read_json


class EnrolmentRequest(Settings):
    """A name and a request for a certificate under it."""

    format: Literal[1] = 1
    name: str = Field(pattern=NAME_PATTERN)
    certificate_request: str
    """PEM; its key signs, see `pki`."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a request's file.

        Raises
        ------
        ConfigError
            If the file cannot be read or is no such request.
        """
        return cls.read(read_json(path, "a request to be admitted"), path.name)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical form, as its owner reads it out."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


class SiteRequest(EnrolmentRequest):
    """`request.json` of a hospital, as `fedgex-site init` writes it."""

    node_public_key: str
    """OpenSSH text; authenticates the hospital's connection."""
    version: str
    """The fedgex that made it."""
