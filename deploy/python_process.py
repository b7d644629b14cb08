"""Starting a module of this checkout in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def start_module(module: str, arguments: Sequence[str], passed_fd: int, output_fd: int) -> int:
    """Start `python -m module arguments` with one file and this standard output and error; its pid. Raises OSError.

    The caller waits for its end (waitid(2)). A module that ends with its parent (PR_SET_PDEATHSIG) ends with the thread
    that calls this: the launcher's main thread, then.
    """
    popen = subprocess.Popen(
        [sys.executable, "-P", "-m", module, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=output_fd,
        stderr=output_fd,
        pass_fds=(passed_fd,),
        start_new_session=True,
        cwd="/",
        env=child_environment(os.environ),
    )
    # Its exit status is the caller's to take: `subprocess` must not look for it.
    popen.returncode = 0
    return popen.pid


@contextmanager
def new_output(path: Path) -> Iterator[int]:
    """A new file for what a process writes to standard error, open meanwhile. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def last_words(errors: IO[bytes]) -> str:
    """The last line of what a process wrote to standard error; empty when that is nothing."""
    errors.seek(0)
    return errors.read().decode(errors="replace").strip().rpartition("\n")[2]


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` with this checkout first on Python's path: `-P` keeps the caller's directory off it."""
    root = str(Path(__file__).resolve().parent.parent)
    path = environment.get("PYTHONPATH")
    return {**environment, "PYTHONPATH": f"{root}{os.pathsep}{path}" if path else root}
