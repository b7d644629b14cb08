"""A snapshot in qemu, against a played kvm and machine: what is done in which order, and who goes on when it fails."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, cast

import msgspec
import pytest
import trio
import trio.testing

from protocol import ucalls as u
from protocol.declare import Call
from protocol.errors import UserError
from protocol.geometry import PAGE_BYTES
from services.qemu.migration.kvm_port import KvmPort, StepRefused
from services.qemu.migration.machine import MovableMachine
from services.qemu.snapshot.control import SnapshotControl, SnapshotPlace
from shared.host_view import HostState
from shared.snapshot_file import BadSnapshot, read_head
from shared.stream_buffer import StreamBuffer, make_stream_buffer
from tests.unit.ultravisor_rig import LOG, MEMORY_BYTES, N_PAGES, vm_entry

SHARED_GFN = 7
N_RECORDS = 3
"""The end of the first epoch, one of pages, and the last one."""
ENDS = ("saved", "restored", "failed", "cancelled", "in-doubt")


class PlayedMachine:
    """A secure VM with one shared page, or a normal one. It notes what is done to it, as kvm does."""

    can_move = None
    is_running = runs_here = True

    def __init__(self, done: list[str], *, secure: bool, restoring: bool) -> None:
        self.vm = vm_entry(restoring=restoring)
        self.ram = memoryview(bytearray(MEMORY_BYTES))
        view = bytearray([HostState.ABSENT if secure else HostState.PRESENT] * N_PAGES)
        if secure:
            view[SHARED_GFN] = HostState.SHARED
        self.ram[SHARED_GFN * PAGE_BYTES] = 7
        self.host_view = memoryview(view)
        self.secure = secure
        self.done = done

    def touched(self) -> bytearray:
        return bytearray([1] * N_PAGES)

    @asynccontextmanager
    async def orders(self) -> AsyncIterator[None]:
        yield

    def write_page(self, gfn: int, content: bytes | memoryview) -> None:
        self.ram[gfn * PAGE_BYTES : (gfn + 1) * PAGE_BYTES] = content

    def save_devices(self) -> bytes:
        self.done.append("save_devices")
        return b"devices"

    async def hold_devices(self) -> None:
        self.done.append("hold_devices")

    async def make_windows(self, state: bytes) -> None:
        assert state == b"devices"

    async def load_devices(self, _state: bytes) -> None:
        self.done.append("load_devices")

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        """Orders that need no more than to be noted: switching, stays, left, arrived, release_devices."""
        return lambda **_: self.done.append(name)


class PlayedKvm:
    """kvm and the ultravisor behind it: `refused` are codes by step, each used once."""

    def __init__(self, done: list[str]) -> None:
        self.done = done
        self.refused: dict[Call, list[str]] = {}
        self.freezes = True
        self._pages_left = True

    async def ucall(self, call: Call, *_args: int) -> list[int]:
        self.done.append(call.name)
        if self.refused.get(call):
            code = self.refused[call].pop(0)
            raise StepRefused(call.name, code, may_succeed=code == "U_RETRY")
        if call is u.UV_EXPORT_PAGES:
            n_bytes, self._pages_left = 9 if self._pages_left else 0, not self._pages_left
            return [n_bytes, 1, 2, 0]
        if call is u.UV_EXPORT_STATE:
            return [9, 0]
        if call is u.UV_IMPORT_RECORD:
            return [int(self.done.count(call.name) == N_RECORDS)]
        return ([9] + [0] * len(call.results))[: len(call.results)]

    async def written(self, _n_pages: int) -> list[int]:
        return []

    async def save(self, _offset: int, _room: int) -> int:
        self.done.append("save")
        return 3

    async def freeze(self) -> None:
        self.done.append("freeze")
        if not self.freezes:
            raise StepRefused("VM_FREEZE", "H_STATE")

    async def load(self, _offset: int, _n_bytes: int) -> None:
        self.done.append("load")

    async def go_on(self) -> None:
        self.done.append("go_on")


class Rig:
    """A machine and what steers its snapshots."""

    def __init__(self, nursery: trio.Nursery, stream: StreamBuffer, *, secure: bool, restoring: bool = False) -> None:
        self.done: list[str] = []
        self.kvm = PlayedKvm(self.done)
        self.machine = PlayedMachine(self.done, secure=secure, restoring=restoring)
        self.control = SnapshotControl(nursery, LOG)
        self.queries = self.control.queries()
        machine, kvm = cast(MovableMachine, self.machine), cast(KvmPort, self.kvm)
        self.control.place = SnapshotPlace(machine, kvm, stream, {}, "alpha", lambda: self.done.append("told"))

    async def order(self, what: str) -> dict[str, Any]:
        answer: dict[str, Any] = await self.queries[f"snapshot.{what}"]({})
        return answer

    async def begin(self, what: str, fd: int) -> None:
        self.control.take_file(os.dup(fd))
        await self.order(what)

    async def until(self, *statuses: str) -> dict[str, Any]:
        # By the real clock: that of a test may jump ahead while a thread writes the file.
        end = time.monotonic() + 5
        while time.monotonic() < end:
            facts = await self.order("status")
            if facts["status"] in statuses:
                return facts
            await trio.to_thread.run_sync(time.sleep, 0.001)
        raise trio.TooSlowError


@pytest.fixture
def stream() -> Iterator[StreamBuffer]:
    made = make_stream_buffer("vm1")
    buffer = StreamBuffer(os.dup(made.fd))
    made.close()
    yield buffer
    buffer.close()


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("snapshot", os.MFD_CLOEXEC)
    yield made
    os.close(made)


async def test_a_secure_vm_stands_still_before_it_is_written_and_ends_when_its_file_is_safe(
    nursery: trio.Nursery, stream: StreamBuffer, fd: int
) -> None:
    rig = Rig(nursery, stream, secure=True)
    await rig.begin("save", fd)
    await rig.until("written")
    assert rig.done == [
        "switching", "UV_SAVE_BEGIN", "UV_EXPORT_STOP", "hold_devices", "UV_EXPORT_PAGES", "UV_EXPORT_PAGES",
        "save", "save_devices", "UV_EXPORT_STATE",
    ]  # fmt: skip
    assert read_head(fd).secure
    await rig.order("commit")
    facts = await rig.until(*ENDS)
    assert (facts["status"], rig.done[-2:]) == ("saved", ["UV_SAVE_COMMIT", "left"])
    assert facts["pages"] == 4


@pytest.mark.parametrize("secure", [True, False])
async def test_what_was_saved_is_restored(nursery: trio.Nursery, stream: StreamBuffer, fd: int, secure: bool) -> None:
    rig = Rig(nursery, stream, secure=secure)
    await rig.begin("save", fd)
    await rig.until("written")
    await rig.order("commit")
    assert (await rig.until(*ENDS))["status"] == "saved"

    other = Rig(nursery, stream, secure=secure, restoring=True)
    other.machine.ram[:] = bytes(MEMORY_BYTES)
    await other.begin("restore", fd)
    facts = await other.until(*ENDS)
    assert (facts["status"], facts["reason"]) == ("restored", "")
    assert other.machine.ram[SHARED_GFN * PAGE_BYTES] == 7
    assert other.done[-3:] == ["arrived", "told", "go_on"]
    assert ("UV_RESTORE_START" in other.done) is secure
    assert other.done.index("load") < other.done.index("load_devices") < other.done.index("arrived")


@pytest.mark.parametrize("secure", [True, False])
async def test_a_vm_whose_snapshot_is_cancelled_goes_on(
    nursery: trio.Nursery, stream: StreamBuffer, fd: int, secure: bool
) -> None:
    rig = Rig(nursery, stream, secure=secure)
    await rig.begin("save", fd)
    await rig.until("written")
    await rig.order("cancel")
    assert (await rig.until(*ENDS))["status"] == "cancelled"
    assert rig.done[-3:] == ["UV_EXPORT_CANCEL" if secure else "go_on", "release_devices", "stays"]
    with pytest.raises(UserError, match="the snapshot is cancelled"):
        await rig.order("commit")


async def test_a_commit_that_is_refused_leaves_the_vm_running_as_soon_as_its_ultravisor_lets_it(
    nursery: trio.Nursery, stream: StreamBuffer, fd: int, autojump_clock: trio.testing.MockClock
) -> None:
    rig = Rig(nursery, stream, secure=True)
    rig.kvm.refused = {u.UV_SAVE_COMMIT: ["U_PERMISSION"], u.UV_EXPORT_CANCEL: ["U_RETRY", "U_RETRY"]}
    await rig.begin("save", fd)
    await trio.testing.wait_all_tasks_blocked()
    await rig.until("written")
    await rig.order("commit")
    with pytest.raises(UserError, match="too late"):
        await rig.order("cancel")
    facts = await rig.until(*ENDS)
    assert (facts["status"], facts["reason"]) == ("failed", "UV_SAVE_COMMIT was refused: U_PERMISSION")
    assert rig.done[-5:] == [*["UV_EXPORT_CANCEL"] * 3, "release_devices", "stays"]


async def test_s6_a_commit_of_which_nobody_knows_is_no_failure(
    nursery: trio.Nursery, stream: StreamBuffer, fd: int
) -> None:
    rig = Rig(nursery, stream, secure=True)
    rig.kvm.refused = {u.UV_SAVE_COMMIT: ["U_STATE"], u.UV_EXPORT_CANCEL: ["U_STATE"]}
    await rig.begin("save", fd)
    await rig.until("written")
    await rig.order("commit")
    assert (await rig.until(*ENDS))["status"] == "in-doubt"


async def test_a_vm_that_just_turns_secure_is_not_saved(nursery: trio.Nursery, stream: StreamBuffer, fd: int) -> None:
    rig = Rig(nursery, stream, secure=False)
    rig.kvm.freezes = False
    await rig.begin("save", fd)
    facts = await rig.until(*ENDS)
    assert (facts["status"], facts["reason"]) == ("failed", "the VM just starts, or turns secure: try again")
    assert rig.done[-3:] == ["go_on", "release_devices", "stays"]


async def test_a_restore_that_is_refused_gives_everything_up(
    nursery: trio.Nursery, stream: StreamBuffer, fd: int
) -> None:
    rig = Rig(nursery, stream, secure=True)
    await rig.begin("save", fd)
    await rig.until("written")
    for call in (u.UV_RESTORE_BEGIN, u.UV_IMPORT_RECORD, u.UV_IMPORT_READY, u.UV_RESTORE_START):
        other = Rig(nursery, stream, secure=True, restoring=True)
        other.kvm.refused = {call: ["U_PERMISSION"]}
        await other.begin("restore", fd)
        facts = await other.until(*ENDS)
        assert (facts["status"], facts["reason"]) == ("failed", f"{call.name} was refused: U_PERMISSION")
        assert other.done[-1] == "UV_IMPORT_ABANDON"
        assert "arrived" not in other.done


async def test_a_machine_of_other_settings_does_not_go_on(nursery: trio.Nursery, stream: StreamBuffer, fd: int) -> None:
    rig = Rig(nursery, stream, secure=False)
    await rig.begin("save", fd)
    await rig.until("written")
    other = Rig(nursery, stream, secure=False, restoring=True)
    other.machine.vm = msgspec.structs.replace(other.machine.vm, time="instructions")
    await other.begin("restore", fd)
    assert (await other.until(*ENDS))["reason"] == "not here as in the snapshot: time: wall"


async def test_a_page_that_was_damaged_is_found_before_the_vm_goes_on(
    nursery: trio.Nursery, stream: StreamBuffer, fd: int
) -> None:
    rig = Rig(nursery, stream, secure=False)
    await rig.begin("save", fd)
    await rig.until("written")
    content = os.pread(fd, os.fstat(fd).st_size, 0)
    os.pwrite(fd, b"\x08", content.index(b"\x07" + bytes(PAGE_BYTES - 1)))
    other = Rig(nursery, stream, secure=False, restoring=True)
    await other.begin("restore", fd)
    assert "damaged" in (await other.until(*ENDS))["reason"]
    assert other.done == []


async def test_what_is_out_of_turn_is_refused(nursery: trio.Nursery, stream: StreamBuffer, fd: int) -> None:
    rig = Rig(nursery, stream, secure=False)
    with pytest.raises(UserError, match="no file was given"):
        await rig.order("save")
    with pytest.raises(UserError, match="does not wait for a snapshot"):
        await rig.begin("restore", fd)
    with pytest.raises(UserError, match="the snapshot is none"):
        await rig.order("commit")
    waiting = Rig(nursery, stream, secure=False, restoring=True)
    with pytest.raises(BadSnapshot):
        await waiting.begin("restore", fd)
    await rig.begin("save", fd)
    rig.control.take_file(os.dup(fd))
    with pytest.raises(UserError, match="a snapshot is under way"):
        await rig.order("save")
    await rig.until("written")
    rig.control.place = None
    await rig.order("commit")
    await rig.until("saved")
    with pytest.raises(UserError, match="no devices yet"):
        await rig.order("save")
