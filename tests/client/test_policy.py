"""A hospital's policy.toml: every key was decided by somebody."""

import json
import tomllib
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from fedgex.client.policy import TEMPLATE, Policy
from fedgex.common.errors import ConfigError


def load(folder: Path, text: str) -> Policy:
    path = folder / "policy.toml"
    path.write_text(text, encoding="utf-8")
    return Policy.load(path)


def test_no_key_has_a_default() -> None:
    assert all(field.is_required() for field in Policy.model_fields.values())


def test_what_init_writes_names_every_key_and_loads(tmp_path: Path) -> None:
    policy = load(tmp_path, TEMPLATE)

    assert policy.model_fields_set == set(Policy.model_fields)
    assert policy == Policy.proposed()
    assert not policy.share_cross_products


@pytest.mark.parametrize("key", Policy.model_fields)
def test_a_missing_key_is_named_with_what_init_would_write(
    tmp_path: Path, key: str
) -> None:
    lines = [x for x in TEMPLATE.splitlines() if not x.startswith(f"{key} ")]
    proposed = json.dumps(tomllib.loads(TEMPLATE)[key])

    with pytest.raises(ConfigError) as refusal:
        load(tmp_path, "\n".join(lines))

    assert str(refusal.value) == (
        f"policy.toml: {key} is missing, and no key of a policy has a default. "
        f"`fedgex-site init` would write: {key} = {proposed}"
    )


def test_everything_missing_unknown_or_unusable_is_named_at_once(
    tmp_path: Path,
) -> None:
    text = TEMPLATE.replace("threads = 1", "thread = 1").replace(
        "memory_mb = 0", "memory_mb = -1"
    )

    with pytest.raises(ConfigError) as refusal:
        load(tmp_path, text)

    for named in (
        "policy.toml: threads is missing",
        "policy.toml: thread: Extra",
        "policy.toml: memory_mb: ",
    ):
        assert named in str(refusal.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("minimum_cohort", 0),
        ("tasks", []),
        ("tasks", ["imputation"]),
        ("metrics", ["accuracy"]),
        ("privacy_epsilon", 0),
        ("privacy_epsilon", float("inf")),
        ("privacy_delta", 0),
        ("privacy_delta", 1),
        ("threads", 0),
        ("message_limit_s", 0),
        ("message_limit_s", float("inf")),
        ("hours", "8:00-17:00"),
        ("hours", "08:00-25:00"),
        ("hours", "24:00-08:00"),
        ("hours", "always"),
    ],
)
def test_an_unusable_value_refuses_and_is_named(key: str, value: object) -> None:
    values = tomllib.loads(TEMPLATE) | {key: value}

    with pytest.raises(ConfigError, match=rf"policy\.toml: {key}(\.0)?: "):
        Policy.read(values, "policy.toml")


def test_hours_that_end_when_they_begin_are_refused() -> None:
    with pytest.raises(ConfigError, match='write "00:00-24:00" for always'):
        Policy.read(tomllib.loads(TEMPLATE) | {"hours": "08:00-08:00"}, "policy.toml")


def test_an_absent_file_is_refused_with_what_init_would_write(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"policy\.toml: is not there") as refusal:
        Policy.load(tmp_path / "policy.toml")

    assert TEMPLATE in str(refusal.value)


def test_metrics_may_all_be_withheld() -> None:
    assert Policy.proposed(metrics=[]).metrics == ()


@pytest.mark.parametrize(
    ("hours", "time", "expected"),
    [
        ("00:00-24:00", "00:00", True),
        ("00:00-24:00", "23:59", True),
        ("08:00-17:00", "07:59", False),
        ("08:00-17:00", "08:00", True),
        ("08:00-17:00", "16:59", True),
        ("08:00-17:00", "17:00", False),
        ("20:00-06:00", "19:59", False),
        ("20:00-06:00", "20:00", True),
        ("20:00-06:00", "00:00", True),
        ("20:00-06:00", "05:59", True),
        ("20:00-06:00", "06:00", False),
        ("20:00-24:00", "23:59", True),
        ("20:00-24:00", "00:00", False),
        ("20:00-00:00", "23:59", True),
        ("20:00-00:00", "00:00", False),
    ],
)
def test_hours_include_their_begin_and_not_their_end(
    hours: str, time: str, expected: bool
) -> None:
    at = datetime.fromisoformat(f"2026-02-03T{time}")

    assert Policy.proposed(hours=hours).open_at(at) is expected


def test_hours_are_local_whatever_the_zone_of_the_question() -> None:
    policy = Policy.proposed(hours="08:00-17:00")
    local = datetime(2026, 2, 3, 8).astimezone()

    for hours in (-9, 0, 5):
        elsewhere = local.astimezone(timezone(timedelta(hours=hours)))
        assert policy.open_at(elsewhere)
        assert not policy.open_at(elsewhere - timedelta(minutes=1))
