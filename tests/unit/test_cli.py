"""The `pefbox` command without a cluster: help, mistakes, exit statuses, and what it prints of logs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

from deploy.cli import COMMANDS, pefbox
from deploy.cli_balloon import target_of
from deploy.cli_support import printable
from deploy.cli_vm import hex_lines
from deploy.logs_view import LogReader, as_text, in_order, log_files
from deploy.tables import balloon_facts, link_line
from protocol.errors import UserError


def run(*arguments: str, runtime: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        env={"XDG_RUNTIME_DIR": str(runtime), "XDG_STATE_HOME": str(runtime), "PATH": "/usr/bin:/bin"},
        cwd=Path(__file__).parents[2],
    )


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_can_be_imported_and_explains_itself(name: str) -> None:
    command = pefbox.get_command(click.Context(pefbox), name)

    assert command is not None
    assert command.help


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["status"], 1, "pefbox: no cluster runs; start one with: pefbox up CLUSTER.toml\n"),
        (["status", "--cluster", "x"], 1, 'pefbox: no cluster "x" runs\n'),
        (["up", "/nowhere.toml"], 1, "pefbox: /nowhere.toml: No such file or directory\n"),
        (["down"], 0, ""),
        (["clean"], 0, ""),
        (["stauts"], 2, 'Error: no command "stauts", did you mean "status"?\n'),
        (["logs"], 2, "Error: Missing argument 'TARGET'.\n"),
        (["page", "vm1", "0x10000000000000000"], 1, "has more than 64 bits\n"),
        (["demo", "--json", "/nowhere/report.json"], 1, "pefbox: --json: /nowhere is no directory\n"),
        (["trace", "show", "/nowhere"], 1, "pefbox: /nowhere: there is no such file or directory\n"),
        (["trace", "show", "--call", "H_CEDEE"], 1, "or page, interrupt, request, migration\n"),
        (["trace", "stats", "--result", "H_BUZY"], 1, "or a number that has no name\n"),
        (["trace", "show", "--since", "soon"], 1, "a number with ms, s, m or h, such as 10s\n"),
        (["trace", "show", "--cause", "x"], 1, "a number as `trace show` prints it, decimal or 0x...\n"),
        (["trace", "export", "--format", "mermaid"], 1, "`pefbox trace show` prints the ids\n"),
        (["link", "alpha"], 2, "Error: Missing argument 'HOST'.\n"),
        (["link", "alpha", "beta", "--latency", "x"], 2, "'--latency': 'x' is not a valid float.\n"),
        (["link", "alpha", "beta", "--bandwidth", "x"], 1, "such as 64M/s; 0: no limit\n"),
    ],
)
def test_mistake_is_one_line_with_its_exit_status(
    arguments: list[str], status: int, message: str, tmp_path: Path
) -> None:
    result = run(*arguments, runtime=tmp_path)

    assert result.returncode == status
    assert result.stderr.endswith(message)
    assert "Traceback" not in result.stderr


def test_a_link_is_one_line_of_what_it_does() -> None:
    plain = {"between": ["alpha", "beta"], "latency_ms": 0.0, "jitter_ms": 0.0, "loss": 0.0, "down": False}
    shaped = {"latency_ms": 50.0, "jitter_ms": 2.5, "loss": 0.01, "down": True}

    assert link_line({**plain, "bandwidth_bytes_per_second": 0}) == "link alpha - beta  up"
    assert link_line({**plain, **shaped, "bandwidth_bytes_per_second": 8 << 20}) == (
        "link alpha - beta  down  latency 50 ms  jitter 2.5 ms  bandwidth 8 MiB/s  loss 0.01"
    )


def test_doctor_prints_json_and_no_colour_into_a_pipe(tmp_path: Path) -> None:
    as_json, as_text = run("doctor", "--json", runtime=tmp_path), run("doctor", runtime=tmp_path)

    assert {finding["name"] for finding in json.loads(as_json.stdout)} >= {"Python", "/dev/shm", "Landlock"}
    assert "\x1b" not in as_text.stdout


def test_logs_of_several_processes_come_in_order_of_time(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.mkdir()
    (log / "vm1.guest.log").write_text('{"timestamp":"2026-01-01T00:00:02Z","event":"b"}\n{"timest')
    (log / "vm1.qemu.log").write_text('{"timestamp":"2026-01-01T00:00:01Z","event":"a","n":1}\n')

    entries = in_order([LogReader(path) for path in log_files(tmp_path, "vm1")])

    assert [entry["event"] for entry in entries] == ["a", "b"]
    assert as_text(entries[0]).endswith("a n=1")
    assert log_files(tmp_path, "vm1/qemu") == [log / "vm1.qemu.log"]
    with pytest.raises(UserError, match="there are: vm1/guest, vm1/qemu"):
        log_files(tmp_path, "vm2")


def test_ctrl_c_while_a_command_still_loads_ends_it_without_a_word() -> None:
    program = """
import os, signal, sys
from deploy.entry import main

class CtrlC:
    def find_spec(self, name, path, target=None):
        if name == "click":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, CtrlC())
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)

    assert (done.stdout, done.stderr, done.returncode) == ("", "", -signal.SIGINT)


@pytest.mark.parametrize("arguments", [("--help",), ("doctor",)])
def test_output_that_a_full_disk_does_not_take_is_one_line(arguments: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "deploy.cli", *arguments], stdout=full, stderr=subprocess.PIPE, text=True, timeout=30
        )

    assert done.stderr == "pefbox: cannot write the output: No space left on device\n"
    assert done.returncode == 1


def test_whoever_reads_no_further_ends_a_command_without_a_word() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "deploy.cli", "--help"], stdout=writing, stderr=subprocess.PIPE, text=True, timeout=30
    )
    os.close(writing)

    assert (done.stderr, done.returncode) == ("", 1)


def test_a_command_without_an_output_does_its_work() -> None:
    command = f"exec {sys.executable} -m deploy.cli doctor --json >&-"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, timeout=30)

    assert (done.stderr, done.returncode) == ("", 0)


def test_a_balloon_s_size_is_one_that_the_vm_can_have() -> None:
    assert target_of("64M", "vm1", 64 << 20) == 64 << 20
    assert target_of("1048577", "vm1", 64 << 20) == 1048577
    for size, problem in {
        "": '"" is no size',
        "-1": '"-1" is no size',
        "1.5M": "no size; allowed: bytes, or a text such as 128M",
        "0": "0 is not possible; vm1 can have up to 64 MiB",
        "65M": "65M is not possible; vm1 can have up to 64 MiB",
    }.items():
        with pytest.raises(UserError, match=re.escape(problem)):
            target_of(size, "vm1", 64 << 20)


def test_a_balloon_that_does_nothing_says_why() -> None:
    facts = {"actual_bytes": 64 << 20, "target_bytes": 33 << 19, "discarded_bytes": 0, "reason": "it is stopped"}

    assert balloon_facts(facts) == "actual 64 MiB  target 16.5 MiB  discarded 0 MiB  it is stopped"


def test_text_of_a_guest_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[31m\x9bb\tc\n") == "a?[31m?b\tc\n"


def test_bytes_are_shown_in_rows_of_sixteen() -> None:
    assert hex_lines(b"A" * 17) == [
        "0000  41 41 41 41 41 41 41 41 41 41 41 41 41 41 41 41  AAAAAAAAAAAAAAAA",
        "0010  41                                               A",
    ]
