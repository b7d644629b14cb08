"""How the owner of a forked launcher learns its end."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.launcher_process import KILLED, ForkedLauncher, decode_status, encode_status

STATUSES = st.integers(-64, 255)


@given(STATUSES)
def test_a_status_comes_back_as_it_was_told(status: int) -> None:
    assert decode_status(encode_status(status)) == status


@given(st.binary(max_size=8).filter(lambda data: len(data) != 4))
def test_what_is_no_status_is_that_of_one_who_was_killed(data: bytes) -> None:
    assert decode_status(data) == KILLED


@pytest.fixture
def sleeping() -> Iterator[subprocess.Popen[bytes]]:
    """In the place of a launcher."""
    with subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]) as process:
        yield process
        process.kill()


def forked(process: subprocess.Popen[bytes]) -> tuple[ForkedLauncher, int]:
    """It, and the end of the pipe where its status is told."""
    status_fd, told_fd = os.pipe()
    return ForkedLauncher(process.pid, os.pidfd_open(process.pid), status_fd), told_fd


def test_it_runs_until_it_has_ended_whatever_was_told(sleeping: subprocess.Popen[bytes]) -> None:
    launcher, told_fd = forked(sleeping)
    os.write(told_fd, encode_status(3))
    os.close(told_fd)
    assert launcher.poll() is None

    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(launcher.wait) for _ in range(4)]
        sleeping.kill()

    assert {future.result() for future in waiting} == {3}
    assert launcher.poll() == 3
    with launcher.end_fd() as fd:
        assert os.read(fd, 8)


@pytest.mark.parametrize("is_held", [False, True])
def test_one_that_ended_without_a_word_was_killed(sleeping: subprocess.Popen[bytes], is_held: bool) -> None:
    """Also while another process still has the pipe, which it forked just before."""
    launcher, told_fd = forked(sleeping)
    if not is_held:
        os.close(told_fd)
    sleeping.kill()
    assert launcher.wait() == KILLED
    if is_held:
        os.close(told_fd)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_reaches_it_and_after_its_end_nobody(
    sleeping: subprocess.Popen[bytes], number: signal.Signals
) -> None:
    launcher, told_fd = forked(sleeping)
    send = launcher.terminate if number is signal.SIGTERM else launcher.kill

    send()

    assert sleeping.wait() == -number
    send()
    os.close(told_fd)
    assert launcher.poll() == KILLED
    send()


@pytest.mark.parametrize("send", [ForkedLauncher.terminate, ForkedLauncher.kill])
def test_one_that_was_waited_for_by_its_parent_hears_no_more(
    sleeping: subprocess.Popen[bytes], send: Callable[[ForkedLauncher], None]
) -> None:
    launcher, told_fd = forked(sleeping)
    sleeping.kill()
    sleeping.wait()
    send(launcher)
    os.close(told_fd)
    assert launcher.wait() == KILLED


def test_many_open_files_are_no_hindrance(sleeping: subprocess.Popen[bytes]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2048:
        pytest.skip("this machine allows few open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (2048, hard))
    taken: list[int] = []
    try:
        while not taken or taken[-1] < 1100:
            taken.append(os.eventfd(0))
        launcher, told_fd = forked(sleeping)
        os.close(told_fd)
        sleeping.kill()
        assert launcher.wait() == KILLED
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
