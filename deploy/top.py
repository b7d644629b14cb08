"""`pefbox top`: the tree of a cluster with rates and depths, from two looks at it.

A frame is lines of text, each cut to the terminal's width: columns that do not fit are left out, the least important
first, and of a tree that is too high the processes of VMs are left out, then whatever is last. Everything that a colour
says a word says, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
from rich.console import Group
from rich.text import Text

from deploy.process_usage import Usage
from deploy.tables import STATE_STYLES, ago, mebibytes, migration_facts

_NS_PER_S = 1e9
_NAME_WIDTH = 24
_MIN_NAME_WIDTH = 20
_LEAST_NAME_WIDTH = 8
"""Where there is hardly room for the state."""
_UNKNOWN = "-"


class ProcessRates(msgspec.Struct, frozen=True, kw_only=True):
    """One process. Rates are None until there are two looks, everything is where it did not answer."""

    target: str
    pid: int
    state: str
    calls_per_second: float | None = None
    open_calls: int | None = None
    serving: int | None = None
    queued: int | None = None
    refused: int | None = None
    cpu_percent: float | None = None
    resident_bytes: int | None = None


class VmRates(msgspec.Struct, frozen=True, kw_only=True):
    """One VM: calls of its guest, exits to its qemu, what its pages are."""

    name: str
    state: str
    secure: bool
    since: float
    reason: str
    calls_per_second: float | None
    exits_per_second: float | None
    pages: dict[str, int | None]
    migration: dict[str, Any] | None
    processes: list[ProcessRates]


class HostRates(msgspec.Struct, frozen=True, kw_only=True):
    """One host; `account` is the ultravisor's, of secure memory."""

    name: str
    account: dict[str, Any]
    processes: list[ProcessRates]
    vms: list[VmRates]


class Frame(msgspec.Struct, frozen=True, kw_only=True):
    """What is shown at once. `seconds` lie between the two looks; 0 for the first."""

    cluster: str
    healthy: bool
    recording: bool
    seconds: float
    hosts: list[HostRates]


@dataclass(frozen=True, slots=True)
class Look:
    """What the launcher answered, and what the kernel says of each process."""

    activity: dict[str, Any]
    usage: dict[int, Usage]


def make_frame(look: Look, before: Look | None) -> Frame:
    """Rates between two looks."""
    status = look.activity["status"]
    rates = _Rates(look, before)
    return Frame(
        cluster=status["cluster"],
        healthy=status["healthy"],
        recording=status["recording"],
        seconds=rates.seconds,
        hosts=[
            HostRates(
                name=host["name"],
                account=host["account"],
                processes=[rates.process(row) for row in host["processes"]],
                vms=[rates.vm(host["name"], vm) for vm in host["vms"]],
            )
            for host in status["hosts"]
        ],
    )


class _Rates:
    """Differences of counters by the time between two looks."""

    def __init__(self, look: Look, before: Look | None) -> None:
        self._look, self._before = look, before
        earlier_ns = look.activity["monotonic_ns"] if before is None else before.activity["monotonic_ns"]
        self.seconds: float = (look.activity["monotonic_ns"] - earlier_ns) / _NS_PER_S

    def process(self, row: dict[str, Any]) -> ProcessRates:
        """One process of the status."""
        target, pid = row["target"], row["pid"]
        links = self._look.activity["links"].get(target)
        usage = self._look.usage.get(pid)
        facts: dict[str, Any] = {"target": target, "pid": pid, "state": row["state"]}
        if links is not None:
            totals = {name: sum(link[name] for link in links.values()) for name in _TOTALS}
            facts |= totals | {"calls_per_second": self._calls(target, None)}
        if usage is not None:
            facts |= {"resident_bytes": usage.resident_bytes, "cpu_percent": self._cpu_percent(pid, usage)}
        return ProcessRates(**facts)

    def vm(self, host: str, row: dict[str, Any]) -> VmRates:
        """One VM of the status."""
        return VmRates(
            name=row["name"],
            state=row["state"],
            secure=row["secure"],
            since=row["since"],
            reason=row["reason"],
            calls_per_second=self._calls(f"{row['name']}/guest", None),
            exits_per_second=self._calls(f"{host}/kvm", f"{row['name']}/qemu"),
            pages=row["pages"],
            migration=row["migration"],
            processes=[self.process(process) for process in (*row["processes"], *row["arriving"])],
        )

    def _calls(self, target: str, peer: str | None) -> float | None:
        """Calls a second of a process, to one peer or all. A process that began anew has made what it made since."""
        if self._before is None or self.seconds <= 0:
            return None
        now, then = (look.activity["links"].get(target) for look in (self._look, self._before))
        if now is None:
            return None
        made = 0
        for link_id, link in now.items():
            if peer is None or link["peer"] == peer:
                earlier = (then or {}).get(link_id, {}).get("calls", 0)
                made += link["calls"] - (earlier if earlier <= link["calls"] else 0)
        return made / self.seconds

    def _cpu_percent(self, pid: int, usage: Usage) -> float | None:
        earlier = None if self._before is None else self._before.usage.get(pid)
        if earlier is None or self.seconds <= 0:
            return None
        return 100 * max(0.0, usage.cpu_seconds - earlier.cpu_seconds) / self.seconds


_TOTALS = ("open_calls", "serving", "queued", "refused")


# -- lines ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Column:
    title: str
    width: int
    field: str


_COLUMNS = (
    _Column("STATE", 12, "state"),
    _Column("CALLS/S", 9, "calls_per_second"),
    _Column("CPU %", 6, "cpu_percent"),
    _Column("OPEN", 6, "open_calls"),
    _Column("QUEUED", 7, "queued"),
    _Column("RSS MIB", 8, "resident_bytes"),
    _Column("SERVING", 8, "serving"),
    _Column("REFUSED", 8, "refused"),
)
"""The most important first."""


def render(frame: Frame, width: int, height: int | None = None) -> Group:
    """The frame as lines of at most `width` characters, at most `height` of them."""
    lines = list(_lines(frame, width, with_processes=True))
    if height is not None and len(lines) > height:
        lines = list(_lines(frame, width, with_processes=False))
    if height is not None and len(lines) > max(height, 1):
        left_out = len(lines) - max(height, 1) + 1
        lines = [*lines[: max(height - 1, 0)], Text(f"... {left_out} more lines: make the terminal higher")]
    for line in lines:
        line.truncate(max(width, 1), overflow="ellipsis")
        line.no_wrap = True
    return Group(*lines)


def _lines(frame: Frame, width: int, *, with_processes: bool) -> Iterator[Text]:
    columns, name_width = _fitting(width)
    health = "healthy" if frame.healthy else "not healthy yet"
    recording = ", recording" if frame.recording else ""
    yield Text(f"cluster {frame.cluster}  {health}{recording}", style="bold")
    titles = "".join(f"{column.title:>{column.width}}" for column in columns)
    yield Text(f"{'':{name_width}}{titles}", style="dim")
    for host in frame.hosts:
        yield _host_line(host)
        for process in host.processes:
            yield _process_line(process, columns, name_width, indent=2)
        for vm in host.vms:
            yield from _vm_lines(vm)
            if with_processes:
                for process in vm.processes:
                    yield _process_line(process, columns, name_width, indent=4)


def _fitting(width: int) -> tuple[list[_Column], int]:
    """As many columns as there is room for, and what is left for names."""
    columns: list[_Column] = []
    least = max(_LEAST_NAME_WIDTH, min(_MIN_NAME_WIDTH, width - _COLUMNS[0].width))
    room = width - least
    for column in _COLUMNS:
        if column.width > room:
            break
        columns.append(column)
        room -= column.width
    return columns, min(_NAME_WIDTH, least + max(room, 0))


def _host_line(host: HostRates) -> Text:
    used, total = host.account.get("used_bytes"), host.account.get("total_bytes")
    line = Text.assemble(("host ", ""), (host.name, "bold"))
    if isinstance(used, int) and isinstance(total, int):
        line.append(f"  secure memory {mebibytes(used)} of {mebibytes(total)}")
    return line


def _vm_lines(vm: VmRates) -> Iterator[Text]:
    kind = "secure" if vm.secure else "normal"
    rates = f"  calls/s {_number(vm.calls_per_second)}  exits/s {_number(vm.exits_per_second)}"
    line = Text.assemble("  vm ", (vm.name, "bold"), f"  {kind}  ", _state(vm.state), f" {ago(vm.since)}{rates}")
    if vm.reason:
        line.append(f"  {vm.reason}", style="red" if vm.state == "failed" else "")
    yield line
    pages = "  ".join(f"{name} {_number(count)}" for name, count in vm.pages.items())
    yield Text(f"    pages  {pages}")
    if vm.migration is not None:
        yield Text(f"    {migration_facts(vm.migration)}", style="cyan")


def _process_line(process: ProcessRates, columns: list[_Column], name_width: int, *, indent: int) -> Text:
    name = f"{'':{indent}}{process.target}"
    line = Text(f"{name:<{name_width}}"[:name_width])
    for column in columns:
        value = _cell(process, column.field)
        style = STATE_STYLES.get(process.state, "") if column.field == "state" else ""
        line.append(f"{value:>{column.width}}", style=style)
    return line


def _cell(process: ProcessRates, field: str) -> str:
    value = getattr(process, field)
    if field == "resident_bytes" and value is not None:
        return str(value >> 20)
    return value if isinstance(value, str) else _number(value)


def _state(state: str) -> Text:
    return Text(state, style=STATE_STYLES.get(state, ""))


def _number(value: float | None) -> str:
    if value is None:
        return _UNKNOWN
    return str(value) if isinstance(value, int) else f"{value:.1f}" if value < 100 else f"{value:.0f}"
