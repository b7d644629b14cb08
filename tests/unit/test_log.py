"""The JSON lines of a process: what a peer can have it write, and that one that cannot be written is lost alone."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from services.runtime.line_limit import BURST_LINES
from services.runtime.log import Limiter, Log, open_log


class Written:
    """A log and what stands in it; `now` is in seconds."""

    def __init__(self, path: Path) -> None:
        self.now = 5.0
        self._path = path
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self.log: Log = open_log(fd, "vm1/qemu", Limiter(lambda: self.now))
        os.close(fd)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._path.read_text().splitlines()]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    return Written(tmp_path / "log")


def test_s5_a_peer_that_repeats_itself_does_not_fill_the_disk(written: Written) -> None:
    for attempt in range(BURST_LINES + 7):
        written.log.warning("device fault", device="disk0", reason=f"attempt {attempt}")
    assert len(written.lines()) == BURST_LINES

    written.now += 1
    written.log.warning("device fault", device="disk0", reason="later")

    assert written.lines()[-1]["left_out_before"] == 7


def test_one_vm_link_or_event_takes_nothing_from_another(written: Written) -> None:
    for _ in range(BURST_LINES + 1):
        written.log.bind(vm="vm1").warning("refused")

    written.log.bind(vm="vm2").warning("refused")
    written.log.bind(vm="vm1").error("VM failed")
    written.log.bind(link="alpha-kvm").warning("refused")

    assert len(written.lines()) == BURST_LINES + 3
    assert "left_out_before" not in written.lines()[-1]


@contextmanager
def room_for(n_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond `n_bytes` meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_line_that_a_full_disk_does_not_take_is_lost() -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        open_log(fd, "alpha/kvm").info("started")
    finally:
        os.close(fd)


def test_line_after_one_that_was_cut_stands_alone(tmp_path: Path) -> None:
    path = tmp_path / "log"
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        log = open_log(fd, "alpha/kvm")
        with room_for(20):
            log.info("cut")
            log.info("lost")
        log.info("whole", secret=b"guest")
    finally:
        os.close(fd)

    cut, whole = path.read_text().splitlines()
    assert len(cut) == 20
    entry = json.loads(whole)
    assert (entry["event"], entry["process"], entry["secret"]) == ("whole", "alpha/kvm", "<5 bytes>")
