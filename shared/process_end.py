"""Ending a Python process at once."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import NoReturn


def leave(status: int = 0) -> NoReturn:
    """End this process in good order, with exit status `status`.

    The interpreter is not torn down, object by object: that takes a fourth of what its start does, and gives back
    nothing that the end of a process does not. Functions registered with `atexit` do not run.
    """
    for stream in (sys.stdout, sys.stderr):
        # One that was closed when the process began is None; one that takes nothing more has nobody to tell.
        if stream is not None:
            with suppress(OSError):
                stream.flush()
    os._exit(status)
