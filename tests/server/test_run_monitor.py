"""The monitor of a run: its state, its lines and its display."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedgex.server.journal import Journal
from fedgex.server.run_monitor import SITES_SHOWN, RunState, display, follow, line

START = datetime(2026, 1, 5, 9, 0, 0, tzinfo=UTC)
CONTRIBUTED = {"state": "contributed", "reason": None}


def started(after_s: float = 0.0) -> dict[str, Any]:
    return {
        "time": (START + timedelta(seconds=after_s)).isoformat(),
        "event": "run-started",
        "study": "pan-cancer",
        "study_hash": "ab12",
        "sites": ["h1", "h2"],
        "plan": [
            {"phase": "pretraining", "rounds": 4},
            {"phase": "survival", "rounds": 2},
        ],
    }


def round_event(
    number: int,
    *,
    after_s: float = 0.0,
    seconds: float | None = 10.0,
    mse: float | None = 0.5123,
    train_loss: float | None = 0.6834,
    sites: dict[str, Any] | None = None,
) -> dict[str, Any]:
    return {
        "time": (START + timedelta(seconds=after_s)).isoformat(),
        "event": "round",
        "phase": "pretraining",
        "round": number,
        "rounds": 4,
        "seconds": seconds,
        "train_loss": train_loss,
        "judged_loss": None,
        "sites": sites or {"h1": CONTRIBUTED, "h2": CONTRIBUTED},
        "holdout": None if mse is None else {"mcar": {"0.5": {"mse": mse}}},
        "bytes_up": 1,
        "bytes_down": 1,
    }


def state_after(*events: dict[str, Any]) -> RunState:
    state = RunState()
    for event in events:
        state.apply(event)
    return state


def drawn(state: RunState, after_s: float = 0.0) -> str:
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    console.print(display(state, START + timedelta(seconds=after_s)))
    assert isinstance(console.file, io.StringIO)
    rows = console.file.getvalue().splitlines()
    return "\n".join(" ".join(row.strip("│ ").split()) for row in rows)


def watched(path: Path, finished: Callable[[RunState], bool], *, terminal: bool) -> str:
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=terminal)
    follow(path, finished, console)
    return file.getvalue()


def test_a_round_is_one_line_with_errors_and_remaining_time() -> None:
    state = state_after(
        started(),
        round_event(1, seconds=10, after_s=12),
        round_event(2, seconds=20, after_s=83),
    )

    assert line(state) == (
        "phase=pretraining round=2/4 train_loss=0.683 restoration_mse=0.512 "
        "epsilon=none left=0:01:00 absent=nobody"  # 4 of 6 rounds left, 15 s each
    )


def test_a_round_of_unknown_length_counts_as_a_round_and_lengthens_nothing() -> None:
    state = state_after(
        started(),
        round_event(1, seconds=10),
        round_event(2, seconds=None),
        round_event(3, seconds=20),
    )

    assert state.left_s == 3 * 15  # 3 of 6 rounds left, 15 s each
    assert "round 3 of 6" in drawn(state)


def test_no_time_is_left_as_far_as_is_known_until_a_round_was_timed() -> None:
    state = state_after(started(), round_event(1, seconds=None))

    assert state.left_s is None
    assert "left=unknown" in line(state)


def test_what_was_not_measured_is_none_in_the_line() -> None:
    state = state_after(started(), round_event(1, mse=None, train_loss=None))

    assert "train_loss=none restoration_mse=none epsilon=none" in line(state)


def test_hospitals_that_did_not_contribute_are_named_with_their_reason() -> None:
    sites = {
        "h1": CONTRIBUTED,
        "h3": {"state": "refused", "reason": "NaN in encoder.read"},
        "h2": {"state": "late", "reason": None},
    }
    state = state_after(started(), round_event(1, sites=sites))

    text = drawn(state)

    assert line(state).endswith("absent=h2 late; h3 refused (NaN in encoder.read)")
    assert "1 of 3 contributed" in text
    assert "h2 late 0 rounds" in text
    assert "h3 refused 0 rounds NaN in encoder.read" in text


def test_a_hospital_cannot_break_the_line_or_steer_the_terminal() -> None:
    sites = {"h1": {"state": "failed", "reason": "a\nb\x1b[31mc\rround=9/9"}}
    state = state_after(started(), round_event(1, sites=sites))

    assert "absent=h1 failed (a b [31mc round=9/9); h2 ready" in line(state)
    assert "\x1b" not in drawn(state)


def test_names_with_square_brackets_are_shown_as_they_are() -> None:
    sites = {"[red]h1": {"state": "late", "reason": "[/] 60 s"}}
    state = state_after(started() | {"study": "[b]x"}, round_event(1, sites=sites))

    text = drawn(state)

    assert "[red]h1 late 0 rounds [/] 60 s" in text
    assert "[b]x" in text


def test_the_display_shows_phase_rounds_losses_and_times() -> None:
    state = state_after(
        started(),
        {"event": "phase-started", "phase": "pretraining", "rounds": 4},
        round_event(1, mse=0.9),
        round_event(2, mse=0.5),
    )

    text = drawn(state, after_s=83)

    assert "pan-cancer" in text
    assert "round 2 of 6" in text
    assert "round 2 of 4" in text
    assert "2 of 2 contributed" in text
    assert "0.683" in text
    assert "0.500 █▁ half missing" in text
    assert "elapsed 0:01:23, left 0:00:40" in text


def test_a_new_phase_begins_with_no_rounds_done() -> None:
    state = state_after(
        started(),
        round_event(1),
        {"event": "phase-started", "phase": "survival", "rounds": 2},
    )

    text = drawn(state)

    assert "survival" in text
    assert "round 0 of 2" in text


def test_the_display_has_something_to_say_before_the_run_starts() -> None:
    assert "waiting for the run to start" in drawn(RunState())


def test_of_many_hospitals_the_display_shows_the_absent_first_and_counts_the_rest() -> (
    None
):
    sites: dict[str, Any] = {f"h{i:02}": CONTRIBUTED for i in range(SITES_SHOWN + 5)}
    sites["h16"] = {"state": "late", "reason": None}
    state = state_after(started() | {"sites": [*sites]}, round_event(1, sites=sites))

    text = drawn(state)

    assert text.count(" contributed 1 rounds") == SITES_SHOWN - 1
    assert "h16 late" in text
    assert "and 5 more" in text
    assert "absent=h16 late" in line(state)


def test_outside_a_terminal_there_is_one_line_a_round(
    tmp_path: Path,
) -> None:
    path = tmp_path / "journal.jsonl"
    writer = Journal(path)
    for number in (1, 2):
        fields = round_event(number)
        writer.write(fields.pop("event"), **fields)
    writer.write("run-failed", reason="no quorum")

    lines = watched(
        path, lambda state: state.ending is not None, terminal=False
    ).splitlines()

    assert [each.split()[1] for each in lines] == ["round=1/4", "round=2/4"]


@pytest.mark.parametrize("terminal", [True, False])
def test_watching_ends_with_the_run_even_when_the_journal_does_not(
    tmp_path: Path, terminal: bool
) -> None:
    path = tmp_path / "journal.jsonl"
    looks = iter([False, True])

    def finished(_: RunState) -> bool:
        done = next(looks)
        if done:  # the last event comes between two looks at the journal
            fields = round_event(1)
            Journal(path).write(fields.pop("event"), **fields)
        return done

    begin = time.monotonic()
    text = watched(path, finished, terminal=terminal)

    assert "0.683" in text
    assert time.monotonic() - begin < 5


def test_in_a_terminal_the_last_display_stays_and_says_how_the_run_ended(
    tmp_path: Path,
) -> None:
    path = tmp_path / "journal.jsonl"
    writer = Journal(path)
    for fields in (started(), round_event(1)):
        writer.write(fields.pop("event"), **fields)
    writer.write("run-finished", checkpoint="runs/model.safetensors")

    text = watched(path, lambda state: state.ending is not None, terminal=True)

    assert "finished; checkpoint runs/model.safetensors" in text
    assert ", left" not in text.rsplit("pan-cancer", 1)[1]


def test_epsilon_so_far_is_shown_for_each_guarantee() -> None:
    spent = {"epsilon": {"patient": 3.214, "site": 12}}
    state = state_after(started(), round_event(1) | spent)

    assert "epsilon=patient:3.21,site:12.00" in line(state)
    assert "epsilon patient:3.21,site:12.00" in drawn(state)


def test_the_display_shows_the_contributions_of_each_hospital() -> None:
    late = {"h1": CONTRIBUTED, "h2": {"state": "late", "reason": "no answer in 5 s"}}
    state = state_after(started(), round_event(1), round_event(2, sites=late))

    rows = drawn(state).splitlines()

    assert "epsilon none" in rows
    assert "h1 contributed 2 rounds" in rows
    assert "h2 late 1 rounds no answer in 5 s" in rows


def test_a_round_reported_twice_counts_once_and_unknown_times_are_left_out() -> None:
    state = RunState()
    plan = [{"phase": "pretraining", "rounds": 4}]
    start = {"event": "run-started", "study": "s", "sites": ["a"], "plan": plan}
    finished = {"event": "round", "phase": "pretraining", "sites": {}, "holdout": {}}
    failed = {"event": "run-failed", "reason": "killed"}

    for event in (
        start,
        finished | {"round": 1, "seconds": 20.0},
        finished | {"round": 2, "seconds": None},
        failed,
        start,
        finished | {"round": 2, "seconds": None},
    ):
        state.apply(event)

    assert len(state.rounds) == 2
    assert state.left_s == 40.0
    assert state.ending is None
