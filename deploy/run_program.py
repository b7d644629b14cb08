"""`pefbox run`: one bare-metal program as the kernel of a temporary cluster of one host and one VM."""

from __future__ import annotations

import secrets
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import trio

from deploy.api import RunningCluster, cluster
from deploy.boot_parts import BootParts, parts_blob, read_program_file
from deploy.files import told_by_line
from deploy.trace.counts import count_calls
from protocol.errors import UserError
from protocol.geometry import PAGE_BYTES
from services.runtime.first_error import first_error_nursery
from shared.boot_partition import command_line_fault
from shared.elf_program import Program
from shared.terminal_text import one_line

STATUS_TIMEOUT = 124
STATUS_FAILED = 125
STATUS_INTERRUPTED = 130

_HOST, _VM = "host", "program"
_KVM, _QEMU, _GUEST = f"{_HOST}/kvm", f"{_VM}/qemu", f"{_VM}/guest"
_READ_SECONDS = 0.05
_ANSWER_SECONDS = 2.0
_END_SECONDS = 5.0
_MAX_STATUS = 255
_RUNNING_STATES = ("prelaunch", "running", "paused")

Out = Callable[[bytes], None]
"""Takes what the program writes to its terminal, as it comes."""


class RunOrder(BootParts, frozen=True, kw_only=True):
    """What to run. `time` is the VM's clock; `timeout_seconds` None lets it run for ever."""

    secure: bool = False
    memory_bytes: int = 64 << 20
    time: str = "instructions"
    timeout_seconds: float | None = None
    count_calls: bool = False


class RunReport(msgspec.Struct, kw_only=True):
    """How it ended.

    `outcome` is exited, failed, timeout or interrupted; `exit_status` what the command ends with; `seconds` how long
    the VM ran; `instructions` None where the processor does not count them; `trail` the same for two runs whose calls
    came at the same instructions. Calls are counted when that was ordered.
    """

    exit_status: int
    outcome: str
    reason: str = ""
    secure: bool = False
    seconds: float | None = None
    instructions: int | None = None
    trail: str | None = None
    hypercalls: dict[str, int] = {}
    ultracalls: dict[str, int] = {}
    output: str = ""


class _QemuStatus(msgspec.Struct):
    state: str
    exit_status: int | None = None
    run_seconds: float | None = None
    panic: str | None = None


def check_program(path: Path, memory_bytes: int) -> Program:
    """The program in the file; raises UserError with the one line that says what is wrong with it."""
    program = read_program_file(path)
    if program.end > memory_bytes:
        room = f"the VM has {memory_bytes >> 20} MiB of memory"
        raise UserError(f"{path}: ends at {program.end:#x}, but {room}; give it more with --memory")
    return program


def run_program(order: RunOrder, out: Out) -> RunReport:
    """Run it to its end, everything cleaned up; raises UserError for what cannot be started."""
    program = check_program(order.program, order.memory_bytes)
    _check_texts(order)
    if order.initrd is not None:
        with told_by_line():
            order.initrd.open("rb").close()
    with tempfile.TemporaryDirectory(prefix="pefbox-run-") as directory:
        state_dir = Path(directory)
        blob = program_blob(program, order, state_dir) if order.secure else None
        cluster_file = state_dir / "run.toml"
        cluster_file.write_text(cluster_text(order, blob))
        return trio.run(_run, order, cluster_file, state_dir, out)


def _check_texts(order: RunOrder) -> None:
    """What the cluster file of a run takes; raises UserError."""
    fault = command_line_fault(order.command_line)
    if fault is not None:
        raise UserError(f"--append: {fault}")
    for path in (str(path.absolute()) for path in (order.program, order.initrd) if path is not None):
        try:
            path.encode()
        except UnicodeEncodeError:
            raise UserError(f"{one_line(path)}: is no UTF-8 text") from None


def cluster_text(order: RunOrder, blob: Path | None) -> str:
    """The cluster file of a run."""
    secure_bytes = order.memory_bytes if blob is not None else PAGE_BYTES
    lines = [
        f"[hosts.{_HOST}]",
        f"secure_memory = {secure_bytes}",
        f"[vms.{_VM}]",
        f"host = {_quoted(_HOST)}",
        f"memory = {order.memory_bytes}",
        f"time = {_quoted(order.time)}",
        f"[vms.{_VM}.guest]",
        'kernel = "machine"',
        'boot = "program"',
        f"image = {_quoted(str(order.program.absolute()))}",
        f"command_line = {_quoted(order.command_line)}",
    ]
    if order.initrd is not None:
        lines.append(f"initrd = {_quoted(str(order.initrd.absolute()))}")
    if blob is not None:
        lines.append(f"esm_blob = {_quoted(str(blob))}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A TOML basic string; JSON's escapes are TOML's."""
    return msgspec.json.encode(text).decode()


def program_blob(program: Program, order: RunOrder, state_dir: Path) -> Path:
    """The file with the ESM blob for the program, made for this run's host."""
    blob = state_dir / "program.esm"
    blob.write_bytes(parts_blob(order, program, state_dir, [_HOST]))
    return blob


async def _run(order: RunOrder, cluster_file: Path, state_dir: Path, out: Out) -> RunReport:
    report = RunReport(exit_status=STATUS_INTERRUPTED, outcome="interrupted")
    name = f"run-{secrets.token_hex(3)}"
    async with first_error_nursery() as nursery:
        await nursery.start(_cancel_on_signal, nursery.cancel_scope)
        async with cluster(cluster_file, name=name, state_dir=state_dir, record=order.count_calls) as running:
            await _Run(running, order, out, report).follow()
        nursery.cancel_scope.cancel()
    return report


async def _cancel_on_signal(
    scope: trio.CancelScope, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """The first Ctrl-C ends the run in good order; further ones change nothing, the end is under way."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        async for _ in signals:
            scope.cancel()


class _Run:
    """One run: the terminal is read until the VM has ended, then what is known of it is collected."""

    def __init__(self, running: RunningCluster, order: RunOrder, out: Out, report: RunReport) -> None:
        self._running = running
        self._order = order
        self._out = out
        self._report = report
        self._printed = bytearray()
        self._since = 0

    async def follow(self) -> None:
        """Fill the report."""
        try:
            ended = False
            with trio.move_on_after(self._order.timeout_seconds or float("inf")):
                await self._until_end()
                ended = True
            if not ended:
                self._set(STATUS_TIMEOUT, "timeout", f"still running after {self._order.timeout_seconds:g} s")
        finally:
            with trio.move_on_after(_END_SECONDS, shield=True):
                await self._collect()
            self._report.output = self._printed.decode(errors="replace")

    async def _until_end(self) -> None:
        while True:
            if await self._read(_READ_SECONDS):
                continue
            if await self._has_ended():
                break
        while await self._read(0):
            pass

    async def _read(self, wait_seconds: float) -> bool:
        """Take what was printed; whether there was something."""
        arguments = {"vm": _VM, "since": self._since, "wait_s": wait_seconds}
        try:
            answer = await self._running.process(_KVM).query("console.read", arguments, wait_seconds + _ANSWER_SECONDS)
        except UserError:
            # Its kvm is gone; what became of the VM is in the status.
            return False
        data, following = answer["data"], answer["next"]
        lost = following - len(data) - self._since
        if lost > 0:
            data = f"[{lost} bytes were printed faster than read]\n".encode() + data
        self._since = following
        self._printed += data
        if data:
            self._out(data)
        return bool(data)

    async def _has_ended(self) -> bool:
        try:
            status = msgspec.convert(
                await self._running.process(_QEMU).query("vm.status", {}, _ANSWER_SECONDS), _QemuStatus
            )
        except UserError:
            return await self._has_failed()
        self._report.seconds = status.run_seconds
        if status.state in _RUNNING_STATES:
            return await self._has_failed() if status.state != "running" else False
        if status.state == "shutdown":
            await self._exited(status.exit_status)
        else:
            reason = status.panic or (await self._running.vm(_VM).row()).reason or status.state
            self._set(STATUS_FAILED, "failed", reason)
        return True

    async def _has_failed(self) -> bool:
        row = await self._running.vm(_VM).row()
        if row.state == "failed":
            self._set(STATUS_FAILED, "failed", row.reason)
        return row.state == "failed"

    async def _exited(self, exit_status: int | None) -> None:
        status = exit_status or 0
        # A process has 8 bits for it; what is not 0 stays so.
        self._set(status if status <= _MAX_STATUS else status & _MAX_STATUS or 1, "exited")
        if self._order.secure and not self._report.secure:
            last = (await self._running.vm(_VM).row()).last_esm or {}
            self._report.secure = last.get("outcome") == "secure"
            if not self._report.secure:
                self._set(STATUS_FAILED, "failed", f"UV_ESM was refused: {last.get('reason', 'it was not called')}")

    async def _collect(self) -> None:
        guest = self._running.process(_GUEST)
        try:
            status = await guest.query("vm.status", {}, _ANSWER_SECONDS)
            self._report.instructions = status.get("instructions")
            self._report.trail = status.get("trail")
            if self._order.count_calls:
                await guest.query("record", {"on": False}, _ANSWER_SECONDS)
        except UserError:
            # Dead, or it does not answer: its record has what it wrote until then.
            self._report.instructions = self._report.trail = None
        if self._order.count_calls:
            counts = count_calls(self._running.paths.trace_file(_GUEST))
            self._report.hypercalls, self._report.ultracalls = counts

    def _set(self, exit_status: int, outcome: str, reason: str = "") -> None:
        self._report.exit_status, self._report.outcome, self._report.reason = exit_status, outcome, reason
