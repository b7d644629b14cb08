"""Forking under a subreaper: what becomes of what the new process does, and of one that cannot be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.template import NO_PROCESS, decode_pid, encode_pid

CHECKOUT = Path(__file__).parents[2]
SUBREAPER = """
import ctypes, os, sys
from services.template.forking import fork_for_launcher

ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
reaper = os.getpid()

def become():
    assert os.getppid() == reaper
    {become}

between = os.fork()
if between == 0:
    pid = fork_for_launcher(become)
    os._exit(0 if pid else 99)
status = os.waitstatus_to_exitcode(os.waitpid(between, 0)[1])
if status:
    sys.exit(status)
_, status = os.waitpid(-1, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""
LIMITED = """
import os
fork, left = os.fork, {n_forks}

def limited():
    global left
    if not left:
        raise BlockingIOError
    left -= 1
    return fork()

os.fork = limited
"""


def forked(become: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """How a process ended that did this, forked after `before` was run."""
    script = before + SUBREAPER.format(become=become)
    return subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("become", "status", "said"),
    [
        ("sys.exit(3)", 3, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit('gone')", 1, "gone\n"),
        ("os._exit(0)", 0, ""),
        ("raise ValueError('broken')", 1, "ValueError: broken"),
        ("raise ExceptionGroup('both', [ValueError('one'), KeyError('two')])", 1, "KeyError: 'two'"),
    ],
)
def test_a_fork_ends_as_a_program_does(become: str, status: int, said: str) -> None:
    done = forked(become)
    assert done.returncode == status
    assert said in done.stderr
    assert bool(said) == bool(done.stderr)


@pytest.mark.parametrize("n_forks", [1, 2])
def test_without_room_for_a_process_there_is_none(n_forks: int) -> None:
    done = forked("pass", LIMITED.format(n_forks=n_forks))
    assert done.returncode == 99


@given(st.integers(1, 2**22))
def test_a_pid_comes_back_as_it_was_sent(pid: int) -> None:
    assert decode_pid(encode_pid(pid)) == pid


@given(st.binary(max_size=16).filter(lambda data: len(data) != 4))
def test_what_is_no_answer_names_no_process(data: bytes) -> None:
    assert decode_pid(data) == NO_PROCESS
