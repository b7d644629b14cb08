"""What the kernel says of a process: processor time and memory. Source: proc(5), `/proc/PID/stat`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_UTIME, _STIME, _RSS = 11, 12, 21
"""Fields behind the name, which is in parentheses and may hold anything."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Since the process began; memory that it shares counts, too."""

    cpu_seconds: float
    resident_bytes: int


def usage_of(pids: Iterable[int]) -> dict[int, Usage]:
    """Of those processes that exist."""
    found = ((pid, _usage(pid)) for pid in pids)
    return {pid: usage for pid, usage in found if usage is not None}


def _usage(pid: int) -> Usage | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        fields = text.rpartition(")")[2].split()
        ticks = int(fields[_UTIME]) + int(fields[_STIME])
        return Usage(ticks / os.sysconf("SC_CLK_TCK"), int(fields[_RSS]) * os.sysconf("SC_PAGE_SIZE"))
    except (OSError, IndexError, ValueError):
        return None
