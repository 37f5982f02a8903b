"""Certificates of a consortium that are to be renewed soon."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from fedgex.common.trust import pki
from fedgex.server.consortium.store import Consortium

WARN_DAYS = 30
"""Certificates that expire sooner are warned of."""


@dataclass(frozen=True)
class Expiry:
    """A certificate that ends soon, or has ended."""

    name: str
    role: str
    expires: datetime

    @property
    def days_left(self) -> int:
        """Full days; negative once it has expired."""
        return (self.expires - pki.now()).days

    def __str__(self) -> str:
        """Return a warning with what to do."""
        when = "expired" if self.expires <= pki.now() else "expires"
        remedy = {
            "authority": "found a new consortium; it cannot be renewed",
            "server": "run fedgex-admin consortium renew and restart the server",
            "coordinator": "run fedgex-admin consortium renew and restart the server",
            "administrator": f"run fedgex-admin administrator renew {self.name} and "
            "send the certificate",
            "site": f"run fedgex-admin site renew {self.name} and send the kit",
        }[self.role]
        return (
            f'the certificate of {self.role} "{self.name}" {when} on '
            f"{self.expires:%Y-%m-%d} ({self.days_left} days); {remedy}."
        )


def expiries(
    consortium: Consortium, within_days: int = WARN_DAYS
) -> tuple[Expiry, ...]:
    """Return the certificates in force that end within so many days, soonest first.

    Those that have ended already are among them.
    """
    name = consortium.settings.name
    found = [
        Expiry(name, role, consortium.certificate(role).not_valid_after_utc)
        for role in ("authority", "server", "coordinator")
    ]
    found += [
        Expiry(who, "administrator", certificate.not_valid_after_utc)
        for who, certificate in consortium.administrators().items()
    ]
    found += [
        Expiry(site.name, "site", site.expires)
        for site in consortium.sites().values()
        if site.state == "active"
    ]
    soon = [each for each in found if each.days_left < within_days]
    return tuple(sorted(soon, key=lambda each: each.expires))
