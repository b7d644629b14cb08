"""Two hosts with a secure VM each: eight processes, who is linked to whom, and what each logged and recorded."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import trio

from deploy.api import RunningCluster, Vm, cluster, processes_of
from deploy.trace.reader import FrameReader, SeenFrame
from protocol.errors import UserError
from protocol.geometry import PAGE_BYTES
from protocol.links import LINK_KINDS, name_of
from protocol.ucalls import UV_RETURN
from protocol.wire import MessageKind, decode
from tests.cluster.vm_files import PROMPT, console_until

VM_OF = {"alpha": "vm1", "beta": "vm2"}
MEMORY_BYTES = 64 << 20
N_PAGES = MEMORY_BYTES // PAGE_BYTES

_HOST = '[hosts.{host}]\nsecure_memory = "128M"\n'
_VM = """
[vms.{vm}]
host = "{host}"
memory = "64M"
secure = {secure}
[vms.{vm}.guest]
boot = "kernel"
image = "@state/{vm}.image"
initrd = "@state/{vm}.initrd"
esm_blob = "@state/{vm}.blob"
command_line = "{command_line}"
workload = "{workload}"
"""


def vm_text(vm: str, host: str, *, secure: bool = True, workload: str = "prompt") -> str:
    """The part of a cluster file that describes one VM; a normal one does not try to turn secure."""
    values = {"secure": str(secure).lower(), "command_line": "svm=on" if secure else "svm=off"}
    return _VM.format(vm=vm, host=host, workload=workload, **values)


def cluster_text(hosts: dict[str, str], *vms: str) -> str:
    """A cluster file: `hosts` maps each host to its secure VM, `vms` are further entries of `vm_text`."""
    secure = [vm_text(vm, host) for host, vm in hosts.items()]
    return "".join(['make = "demo"\n', *(_HOST.format(host=host) for host in hosts), *secure, *vms])


@asynccontextmanager
async def running_hosts(
    directory: Path,
    text: str | None = None,
    *,
    record: bool = False,
    debug: bool = False,
    name: str | None = None,
    service_module: str | None = None,
) -> AsyncIterator[RunningCluster]:
    """The cluster of `text` (two hosts by default), every VM at its prompt."""
    file = _write_cluster_file(directory, text or cluster_text(VM_OF))
    state_dir = directory / "own-state"
    async with cluster(
        file, state_dir=state_dir, record=record, debug=debug, name=name, service_module=service_module
    ) as running:
        for vm in await vm_names(running):
            await at_prompt(running.vm(vm))
        yield running


def _write_cluster_file(directory: Path, text: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "cluster.toml"
    file.write_text(text)
    return file


async def vm_names(running: RunningCluster) -> list[str]:
    """All VMs of the cluster."""
    return [vm.name for host in (await running.status()).hosts for vm in host.vms]


async def at_prompt(vm: Vm, since: int = 0) -> None:
    """Returns when the kernel of `vm` shows its first prompt after character `since`."""
    await console_until(vm, f"{PROMPT}\r\n> ", since=since)


async def pids(running: RunningCluster) -> dict[str, int]:
    """The pid of each target."""
    return {row.target: row.pid for row in processes_of(await running.status())}


def children_of(pid: int) -> set[int]:
    """The processes that `pid` started and that have not ended."""
    found = set()
    for entry in os.listdir("/proc"):
        state = _state_and_parent(int(entry)) if entry.isdecimal() else None
        if state is not None and state[0] != "Z" and state[1] == pid:
            found.add(int(entry))
    return found


def templates_of(launcher_pid: int) -> set[int]:
    """Those that others are forked from; none where each has loaded by itself."""
    return {pid for pid in children_of(launcher_pid) if _is_template(pid)}


def members_of(launcher_pid: int) -> set[int]:
    """The processes of the machine that the launcher has."""
    return {pid for pid in children_of(launcher_pid) if not _is_template(pid)}


def _is_template(pid: int) -> bool:
    return any(name in command_line(pid) for name in (b"services.template", b"pefbox template"))


def is_alive(pid: int) -> bool:
    """Whether the process exists and any of its threads has not ended: they hold its files and memory until then."""
    try:
        return process_state(pid) not in (None, "Z") or len(os.listdir(f"/proc/{pid}/task")) > 1
    except FileNotFoundError:
        return False


def process_state(pid: int) -> str | None:
    """The state letter of proc(5), `T` for a stopped process; None when there is none."""
    state = _state_and_parent(pid)
    return state[0] if state is not None else None


def command_line(pid: int) -> bytes:
    """As in proc(5); empty when there is no such process."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def _state_and_parent(pid: int) -> tuple[str, int] | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return fields[0], int(fields[1])


def peers_of(target: str, host: str) -> list[str]:
    """Every process that has a link to `target` of `host`, whose VM is that of VM_OF."""
    owner, _, role = target.partition("/")
    vm = VM_OF[host] if owner == host else owner
    owners = {"ultravisor": host, "kvm": host, "guest": vm, "qemu": vm}
    ends = [(kind.upper.value, kind.lower.value) for kind in LINK_KINDS.values()]
    found = [other for pair in ends if role in pair for other in pair if other != role]
    return [f"{owners[other]}/{other}" for other in found]


def log_lines(running: RunningCluster, target: str) -> list[dict[str, Any]]:
    """What a process logged; a line that is being written comes with the next call."""
    text = running.process(target).log()
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


class OpenCalls:
    """The calls that one process has sent to a peer and that were not answered, out of its record.

    A record is written about twice a second: the reply to a call that looks open may not be in it yet.
    """

    def __init__(self, running: RunningCluster, caller: str, callee: str) -> None:
        self.caller = caller
        self._reader = FrameReader(running.paths.trace_file(caller))
        roles = {caller.partition("/")[2], callee.partition("/")[2]}
        self._kind = next(k.name for k in LINK_KINDS.values() if {k.upper.value, k.lower.value} == roles)
        self._owners = {caller.partition("/")[0], callee.partition("/")[0]}
        self._open: dict[tuple[str, int], tuple[str, int]] = {}

    def names(self, since_ns: int = 0) -> set[str]:
        """Names of those sent at `since_ns` of the monotonic clock or later."""
        for entry in self._reader.read():
            owner, _, kind = entry.link.partition(":")
            if owner in self._owners and kind.startswith(f"{self._kind}."):
                self._note(entry)
        return {name for name, sent_ns in self._open.values() if sent_ns >= since_ns}

    def _note(self, entry: SeenFrame) -> None:
        link, direction, envelope = entry.link, entry.direction, decode(entry.frame)
        if direction == "out" and envelope.kind is MessageKind.CALL:
            self._open[link, envelope.correlation] = (name_of(envelope.number), entry.t_ns)
        elif direction == "in" and envelope.kind is MessageKind.REPLY:
            self._open.pop((link, envelope.correlation), None)
        elif direction == "in" and envelope.number == UV_RETURN.number:
            registers = msgspec.msgpack.decode(envelope.body)
            self._open.pop((link, registers[1]), None)


async def until(holds: Callable[[], bool], what: str, seconds: float = 5.0) -> None:
    """Returns as soon as `holds`; raises UserError that names `what` after `seconds`."""
    with trio.move_on_after(seconds):
        while True:
            if holds():
                return
            await trio.sleep(0.01)
    raise UserError(f"{what}: not within {seconds:g} s")
