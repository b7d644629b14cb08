"""A migration as people see it: progress, its last line, and what the command line refuses."""

from __future__ import annotations

from typing import Any

import click
import pytest
from click.testing import CliRunner

from deploy.cli_migrate import migrate, parse_bandwidth
from deploy.migration_view import headline, progress_lines, result_line
from protocol.errors import UserError

FACTS: dict[str, Any] = {
    "vm": "vm1", "source": "alpha", "host": "beta", "phase": "moving", "status": "active", "reason": "",
    "since": 0.0, "seconds": 1.84, "progress": {},
}  # fmt: skip


def facts(**changes: object) -> dict[str, Any]:
    return {**FACTS, **changes}


def test_progress_says_how_far_it_is_and_what_will_not_end() -> None:
    progress = {
        "round": 3, "total_bytes": 64 << 20, "transferred_bytes": 70 << 20, "remaining_bytes": 4 << 20,
        "zero_pages": 900, "data_pages": 160, "dirty_pages_per_second": 160, "bytes_per_second": 8 << 20,
        "expected_downtime_ms": 500, "converges": False,
    }  # fmt: skip
    shown = facts(progress=progress)

    assert headline(shown) == "vm1  alpha -> beta  moving (active)  1.8 s"
    assert progress_lines(shown) == [
        "  round 3  70 MiB sent  4.0 MiB of 64 MiB remain",
        "  pages  zero 900  data 160",
        "  8.0 MiB/s  written by the guest 10 MiB/s  "
        "does not converge: raise --bandwidth or --downtime-limit, or cancel",
        "  expected downtime 500 ms",
    ]


@pytest.mark.parametrize("progress", [{}, {"round": 1, "transferred_bytes": "x", "downtime_ms": None}])
def test_facts_that_a_qemu_does_not_give_are_left_out(progress: dict[str, Any]) -> None:
    assert len(progress_lines(facts(progress=progress))) == len(progress) // 3


def test_the_last_line_says_where_the_vm_is() -> None:
    moved = facts(phase="done", progress={"downtime_ms": 84, "transferred_bytes": 70 << 20})

    assert result_line(moved) == "vm1 runs on beta: 1.8 s, downtime 84 ms, 70 MiB"
    assert result_line(facts(phase="done")) == "vm1 runs on beta: 1.8 s"
    assert result_line(facts(phase="failed", reason="no\x1b[2J")) == "vm1 stays on alpha: no?[2J"
    assert result_line(facts(phase="in-doubt")) == "vm1: nobody knows where it runs: pefbox recover vm1"


@pytest.mark.parametrize(("text", "n_bytes"), [("64M/s", 64 << 20), ("1G", 1 << 30), ("0", 0), ("5MiB/s", 5 << 20)])
def test_a_bandwidth_is_a_size_a_second(text: str, n_bytes: int) -> None:
    assert parse_bandwidth(text) == n_bytes


def test_what_is_no_bandwidth_is_one_line() -> None:
    with pytest.raises(UserError, match=r'^--bandwidth: "fast" is none; allowed: bytes a second'):
        parse_bandwidth("fast")


@pytest.mark.parametrize("text", ["99999999999999999999G/s", "9" * 5000])
def test_a_bandwidth_that_fits_into_no_message_is_none(text: str) -> None:
    with pytest.raises(UserError, match=r"^--bandwidth: .* is none; allowed: bytes a second"):
        parse_bandwidth(text)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["vm1"], "Missing argument 'HOST'"),
        (["vm1", "beta", "--cancel"], "--cancel goes with nothing else"),
        (["vm1", "--cancel", "--bandwidth", "1M"], "--cancel goes with nothing else"),
        (["vm1", "--bandwidth", "1M", "--detach"], "--detach needs HOST"),
        (["vm1", "beta", "--downtime-limit", "-1"], "-1 is not in the range"),
        (["vm1", "beta", "--downtime-limit", str(1 << 64)], "is not in the range"),
    ],
)
def test_a_wrong_command_line_is_refused_before_anything_is_asked(arguments: list[str], problem: str) -> None:
    command: click.Command = migrate
    done = CliRunner().invoke(command, arguments)

    assert done.exit_code == 2
    assert problem in done.output
