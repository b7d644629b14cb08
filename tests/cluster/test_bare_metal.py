"""Our bare-metal programs, big and little endian, as `pefbox run` runs them on a real cluster.

Each prints a line a check and ends with the number of those that failed.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from deploy.api import cluster
from deploy.cluster_file import parse_cluster
from deploy.run_dirs import running_clusters
from deploy.run_program import RunOrder, check_program, cluster_text, program_blob
from tests.guest.build import ENDIANS, build_program
from tests.needs import need_cross_compilers

pytestmark = pytest.mark.cross

CHECKS = {"interrupts": 100, "mmu": 90, "clock": 15, "hypercalls": 15, "ultracalls": 15, "floating": 35}
"""Programs, and how many checks they make at least: one that stops early is not good."""
TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True)
class Ran:
    """What came of `pefbox run`."""

    status: int
    report: dict[str, Any] = field(default_factory=dict)
    errors: str = ""

    @property
    def lines(self) -> list[str]:
        return str(self.report["output"]).splitlines()


def program(name: str, endian: str) -> Path:
    need_cross_compilers()
    return build_program(name, endian)


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "deploy.cli", "run", *words]


def run(path: Path, *words: str) -> Ran:
    words = (str(path), "--json", "--timeout", str(TIMEOUT_SECONDS), *words)
    result = subprocess.run(command(*words), capture_output=True, text=True)
    return Ran(result.returncode, json.loads(result.stdout) if result.stdout else {}, result.stderr)


def failed(ran: Ran) -> list[str]:
    """The lines of checks that did not hold, and what follows them."""
    return [line for line in ran.lines if not line.startswith("ok ")]


SECURE = [
    ("interrupts", "le"),
    ("mmu", "be"),
    ("clock", "le"),
    ("hypercalls", "be"),
    ("ultracalls", "be"),
    ("ultracalls", "le"),
    ("floating", "le"),
]
"""What a secure VM runs: the byte order matters to the calls of its own, the rest takes turns."""


@pytest.mark.parametrize(
    ("name", "endian", "secure"),
    [*((name, endian, False) for name in CHECKS for endian in ENDIANS), *((*pair, True) for pair in SECURE)],
)
def test_every_check_of_a_program_holds(name: str, endian: str, secure: bool) -> None:
    ran = run(program(name, endian), *(("--secure", "--append", "secure") if secure else ()))

    assert failed(ran) == []
    assert (ran.status, ran.report["exit_status"], ran.errors) == (0, 0, "")
    assert len(ran.lines) >= CHECKS[name]
    assert ran.report["secure"] is secure
    assert ran.report["ultracalls"].get("UV_ESM", 0) >= secure


def test_the_report_counts_what_the_program_did() -> None:
    ran = run(program("hello", "be"))

    assert ran.lines == ["hello from bare metal", "big-endian", "normal"]
    assert ran.report["hypercalls"] == {"H_PUT_TERM_CHAR": 4, "H_RTAS": 1}
    assert ran.report["instructions"] > 1000
    assert 0 < ran.report["seconds"] < TIMEOUT_SECONDS


def test_the_terminal_comes_on_standard_output_and_the_exit_status_is_the_programs() -> None:
    path = program("hello", "le")

    result = subprocess.run(command(str(path), "--append", "status-7"), capture_output=True, text=True)

    assert result.stdout == "hello from bare metal\nlittle-endian\nnormal\n"
    assert (result.returncode, result.stderr) == (7, "")


@pytest.mark.parametrize(
    ("word", "status", "outcome", "reason"),
    [
        ("crash", 125, "failed", "which is no memory"),
        ("os-term", 125, "failed", "gave up on purpose"),
        ("power-off", 0, "exited", ""),
        ("large-status", 1, "exited", ""),
    ],
)
def test_how_a_program_ends_is_told(word: str, status: int, outcome: str, reason: str) -> None:
    ran = run(program("misbehave", "be"), "--append", word)

    assert (ran.status, ran.report["outcome"]) == (status, outcome)
    assert reason in ran.report["reason"]
    assert ran.lines == ["misbehaving"]
    assert ran.errors.count("\n") == bool(reason)


def test_long_output_comes_whole() -> None:
    ran = run(program("misbehave", "le"), "--append", "flood finish")

    assert ran.status == 0
    assert ran.lines[1:] == ["a line of sixty-three characters that nobody will want to read"] * 200


@pytest.mark.parametrize("word", ["spin", "idle"])
def test_a_program_without_end_is_ended_by_the_timeout(word: str) -> None:
    started = time.monotonic()

    ran = run(program("misbehave", "be"), "--append", word, "--timeout", "1")

    assert (ran.status, ran.report["outcome"], ran.report["reason"]) == (124, "timeout", "still running after 1 s")
    assert ran.lines == ["misbehaving"]
    assert time.monotonic() - started < TIMEOUT_SECONDS


def test_an_interrupt_ends_it_and_leaves_nothing() -> None:
    others = set(running_clusters())
    process = subprocess.Popen(
        command(str(program("misbehave", "be")), "--append", "spin"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"misbehaving\n"
    (name,) = {name for name in running_clusters() if name.startswith("run-")} - others

    process.send_signal(signal.SIGINT)
    process.communicate()

    assert process.returncode == 130
    assert name not in running_clusters()
    assert not list(Path("/dev/shm").glob(f"pefbox-{name}-*"))


async def test_a_vm_whose_blob_does_not_fit_never_starts_its_program(tmp_path: Path) -> None:
    order = RunOrder(program=program("hello", "be"), secure=True, command_line="measured")
    blob = program_blob(check_program(order.program, order.memory_bytes), order, tmp_path)
    text = cluster_text(RunOrder(program=order.program, secure=True, command_line="another"), blob)
    (tmp_path / "run.toml").write_text(text)

    async with cluster(tmp_path / "run.toml", state_dir=tmp_path) as running:
        row = await running.vm("program").wait_state("off")
        status = await running.vm("program").qemu.query("vm.status")
        output, _ = await running.vm("program").console_read()

    assert (status["exit_status"], output) == (125, b"")
    assert row.last_esm["outcome"] == "refused"
    assert "boot" in row.last_esm["reason"]


def test_the_cluster_file_of_a_run_takes_any_text(tmp_path: Path) -> None:
    order = RunOrder(program=tmp_path / 'a "quoted" \\ \u2603.elf', command_line='say="x y" \\ #1')

    cluster = parse_cluster(cluster_text(order, None), "run.toml", tmp_path, "run")

    assert cluster.vms[0].guest.command_line == order.command_line
    assert cluster.vms[0].guest.image == str(order.program)
