"""The JSON lines of a process: one that cannot be written is lost, and nothing else."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.runtime.log import open_log


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
