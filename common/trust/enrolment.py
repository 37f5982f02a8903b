"""What hospitals and administrators send to be admitted: no private key."""

from __future__ import annotations

import hashlib
from typing import Literal

from pydantic import Field

from fedgex.common.settings import NAME_PATTERN, Settings


class EnrolmentRequest(Settings):
    """A name and a request for a certificate under it."""

    format: Literal[1] = 1
    name: str = Field(pattern=NAME_PATTERN)
    certificate_request: str
    """PEM; its key signs, see `pki`."""

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
