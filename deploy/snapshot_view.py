"""A snapshot or restore for people: how far it is, and how it ended."""

from __future__ import annotations

from typing import Any

from deploy.cli_support import printable
from deploy.migration_view import mebibytes
from deploy.snapshot_job import SnapshotKind, SnapshotPhase

Facts = dict[str, Any]


def progress_lines(facts: Facts) -> list[str]:
    """Which VM and file, what is being done, how much of it is."""
    progress = facts["progress"]
    arrow = "->" if facts["kind"] == SnapshotKind.SAVE else "<-"
    lines = [f"{facts['vm']} {arrow} {facts['file']}  {facts['phase']}  {facts['seconds']:.1f} s"]
    if isinstance(progress.get("bytes"), int):
        lines.append(f"  {mebibytes(progress['bytes'])}{_how_much(progress)}")
    return [printable(line) for line in lines]


def _how_much(progress: Facts) -> str:
    """A snapshot's length is known when it is written; until then its pages say how far it is."""
    total_bytes, pages, total_pages = (progress.get(name) for name in ("total_bytes", "pages", "total_pages"))
    if isinstance(total_bytes, int):
        return f" of {mebibytes(total_bytes)}"
    if isinstance(pages, int) and isinstance(total_pages, int):
        return f", {pages} of {total_pages} pages"
    return ""


def result_line(facts: Facts) -> str:
    """How it ended, in one line."""
    vm, file, saves = facts["vm"], facts["file"], facts["kind"] == SnapshotKind.SAVE
    if facts["phase"] == SnapshotPhase.IN_DOUBT:
        return printable(f"{vm} is off: {facts['reason']}")
    if facts["phase"] != SnapshotPhase.DONE:
        what = f"was not saved in {file}" if saves else f"was not restored from {file}, and is off"
        return printable(f"{vm} {what}: {facts['reason'] or facts['phase']}")
    n_bytes = facts["progress"].get("bytes")
    parts = [f"{facts['seconds']:.1f} s", *([mebibytes(n_bytes)] if isinstance(n_bytes, int) else [])]
    what = f"is saved in {file}, and off" if saves else f"goes on out of {file}"
    return printable(f"{vm} {what}: {', '.join(parts)}")
