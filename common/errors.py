"""Every error that fedgex raises on purpose, and the findings some of them carry.

    FedgexError
    ├── ConfigError       a setting, study or scenario cannot be used
    ├── DataError         a hospital's file cannot be used; carries all its findings
    ├── UpdateError       an update from a site cannot be aggregated
    │   └── MessageError  a message holds what it may not, or lacks what it must
    ├── CheckpointError   a checkpoint is missing, torn, or belongs to something else
    ├── FederationError   a round could not be completed
    └── TrustError        a key, certificate, signature or chain cannot be trusted

A message says what was found, what was expected and what to do. It never holds a
patient's identifier or value, because messages travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]
"""`error` refuses the data, `warning` needs a look, `note` needs nothing."""


class FedgexError(Exception):
    """Root of all errors raised on purpose."""


class ConfigError(FedgexError):
    """A setting, study or scenario cannot be used."""


class UpdateError(FedgexError):
    """An update from a site cannot be aggregated."""


class MessageError(UpdateError):
    """A message holds what it may not, or lacks what it must."""


class CheckpointError(FedgexError):
    """A checkpoint is missing, torn, or belongs to something else."""


class FederationError(FedgexError):
    """A round could not be completed."""


class TrustError(FedgexError):
    """A key, certificate, signature or chain cannot be trusted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that a check found in a hospital's data."""

    code: str
    """One of `codes.Code`; stable, listed in docs/findings.md."""
    severity: Severity
    where: str
    """File and column or gene, never a patient."""
    found: str
    """What is there: counts and names of columns or genes, never values."""
    expected: str
    """What should be there."""
    action: str
    """What to do about it."""

    def __str__(self) -> str:
        """Return the finding as one line."""
        return (
            f"{self.code} {self.severity}: {self.where}: {self.found}; "
            f"expected {self.expected}. {self.action}"
        )


class DataError(FedgexError):
    """A hospital's file cannot be used; `findings` holds every reason at once."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        self.findings = tuple(findings)
        super().__init__("\n".join(str(finding) for finding in self.findings))
