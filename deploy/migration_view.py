"""A migration for people: how far it is, and how it ended."""

from __future__ import annotations

from typing import Any

from deploy.cli_support import printable
from protocol.geometry import PAGE_BYTES

_MIB = 1 << 20
_MS_A_SECOND = 1000
_PAGES = "_pages"


def headline(facts: dict[str, Any]) -> str:
    """Which VM, from where to where, what is being done."""
    status = "" if facts["status"] in ("none", facts["phase"]) else f" ({facts['status']})"
    reason = f": {facts['reason']}" if facts["reason"] else ""
    way = f"{facts['source']} -> {facts['host']}"
    return printable(f"{facts['vm']}  {way}  {facts['phase']}{status}  {facts['seconds']:.1f} s{reason}")


def progress_lines(facts: dict[str, Any]) -> list[str]:
    """What the source's qemu says of it; a fact that it does not give is left out."""
    progress = facts["progress"]
    lines = [_amounts(progress), _pages(progress), _rates(progress), _times(progress)]
    return [printable(f"  {'  '.join(parts)}") for parts in lines if parts]


def _amounts(progress: dict[str, Any]) -> list[str]:
    parts = []
    if "round" in progress:
        parts.append(f"round {progress['round']}")
    if _is_number(progress, "transferred_bytes"):
        parts.append(f"{mebibytes(progress['transferred_bytes'])} sent")
    if _is_number(progress, "remaining_bytes"):
        total = f" of {mebibytes(progress['total_bytes'])}" if _is_number(progress, "total_bytes") else ""
        parts.append(f"{mebibytes(progress['remaining_bytes'])}{total} remain")
    return parts


def _pages(progress: dict[str, Any]) -> list[str]:
    kinds = [f"{name.removesuffix(_PAGES)} {n}" for name, n in progress.items() if name.endswith(_PAGES)]
    return ["pages", *kinds] if kinds else []


def _rates(progress: dict[str, Any]) -> list[str]:
    parts = []
    if _is_number(progress, "bytes_per_second"):
        parts.append(f"{mebibytes(progress['bytes_per_second'])}/s")
    if _is_number(progress, "dirty_pages_per_second"):
        n_bytes = progress["dirty_pages_per_second"] * PAGE_BYTES
        parts.append(f"written by the guest {mebibytes(n_bytes)}/s")
    if progress.get("converges") is False:
        parts.append("does not converge: raise --bandwidth or --downtime-limit, or cancel")
    return parts


def _times(progress: dict[str, Any]) -> list[str]:
    parts = []
    if _is_number(progress, "downtime_ms"):
        parts.append(f"downtime {progress['downtime_ms']} ms")
    elif _is_number(progress, "expected_downtime_ms"):
        parts.append(f"expected downtime {progress['expected_downtime_ms']} ms")
    return parts


def result_line(facts: dict[str, Any]) -> str:
    """How it ended, in one line."""
    if facts["phase"] == "in-doubt":
        return f"{facts['vm']}: nobody knows where it runs: pefbox recover {facts['vm']}"
    if facts["phase"] != "done":
        return printable(f"{facts['vm']} stays on {facts['source']}: {facts['reason'] or facts['phase']}")
    progress = facts["progress"]
    parts = [f"{facts['seconds']:.1f} s"]
    parts += [f"downtime {progress['downtime_ms']} ms"] if _is_number(progress, "downtime_ms") else []
    parts += [mebibytes(progress["transferred_bytes"])] if _is_number(progress, "transferred_bytes") else []
    return f"{facts['vm']} runs on {facts['host']}: {', '.join(parts)}"


def mebibytes(n_bytes: float) -> str:
    """In MiB, with one digit of fraction below ten."""
    n_mib = n_bytes / _MIB
    return f"{n_mib:.1f} MiB" if 0 < n_mib < 10 else f"{n_mib:.0f} MiB"


def _is_number(progress: dict[str, Any], name: str) -> bool:
    return isinstance(progress.get(name), int | float) and not isinstance(progress[name], bool)
