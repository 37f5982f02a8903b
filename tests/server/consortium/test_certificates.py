from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from fedgex.common.trust import pki
from fedgex.server.consortium import store
from fedgex.server.consortium.certificates import Expiry, expiries


def test_certificates_are_warned_of_thirty_days_before_their_end(
    admitted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    consortium = admitted.consortium
    assert expiries(consortium) == ()

    later = datetime.now(UTC) + timedelta(days=store.VALID_DAYS - 29)
    monkeypatch.setattr(pki, "now", lambda: later)

    roles = sorted((each.role, each.name) for each in expiries(consortium))
    assert roles == [
        ("administrator", "ada"),
        ("administrator", "bo"),
        ("coordinator", "alliance"),
        ("server", "alliance"),
        ("site", "north"),
        ("site", "south"),
    ]


def test_a_warning_says_what_to_do() -> None:
    ended = Expiry("north", "site", datetime(2020, 1, 1, tzinfo=UTC))

    assert 'the certificate of site "north" expired on 2020-01-01' in str(ended)
    assert "fedgex-admin site renew north" in str(ended)
