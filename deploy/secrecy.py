"""What keeps the memory of a process with secret keys to itself, where nothing else of it is confined."""

from __future__ import annotations

import ctypes
import resource

_PR_SET_DUMPABLE = 4


def protect_secrets(*, dumpable: bool) -> None:
    """No core files, and, unless it is to be `dumpable`, nobody of this user reads its memory or traces it.

    Said either way: what it was forked from may have been protected.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, int(dumpable), 0, 0, 0)
