"""The source's side of a migration in qemu, against a played destination, kvm and machine."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from typing import cast

import pytest
import trio
import trio.testing

from protocol import ucalls as u
from protocol.declare import Call
from protocol.errors import PefboxError
from protocol.geometry import PAGE_BYTES
from services.qemu.migration.channel import KEY_BYTES, BulkChannel, End
from services.qemu.migration.hello import hello_of
from services.qemu.migration.kvm_port import KvmPort, StepRefused
from services.qemu.migration.machine import MovableMachine
from services.qemu.migration.parameters import MigrationParameters
from services.qemu.migration.source import SourceMigration
from services.qemu.migration.status import MigrationStatus
from services.qemu.migration.stream import MAX_PAYLOAD_BYTES, Frame, FrameKind
from shared.host_view import HostState
from shared.stream_buffer import StreamBuffer, make_stream_buffer
from tests.unit.ultravisor_rig import MEMORY_BYTES, vm_entry

N_PAGES = MEMORY_BYTES // PAGE_BYTES
MAX_REASON_CHARS = 400


class PlayedMachine:
    """A machine all of whose memory has content."""

    can_move = None

    def __init__(self, *, secure: bool) -> None:
        self.secure = secure
        self.vm = vm_entry()
        self.ram = memoryview(bytearray(b"\1" * MEMORY_BYTES))
        self.host_view = memoryview(bytearray([HostState.PRESENT] * N_PAGES))

    def touched(self) -> bytearray:
        """As MovableMachine."""
        return bytearray(b"\1" * N_PAGES)


class PlayedKvm:
    """kvm and the ultravisor behind it; nothing is written meanwhile. `refused` are codes by step."""

    def __init__(self) -> None:
        self.refused: dict[Call, str] = {}

    async def ucall(self, call: Call, *_args: int) -> list[int]:
        """As KvmPort."""
        if call in self.refused:
            raise StepRefused(call.name, self.refused[call])
        return [0] * len(call.results)

    async def written(self, _n_pages: int) -> list[int]:
        """As KvmPort."""
        return []


class Rig:
    """One migration, and its destination's end of the channel."""

    def __init__(self, stream: StreamBuffer, parameters: MigrationParameters, *, secure: bool = False) -> None:
        ours, theirs = socket.socketpair()
        key = os.urandom(KEY_BYTES)
        self.destination = BulkChannel(theirs, key, End.DESTINATION)
        self.machine, self.kvm = PlayedMachine(secure=secure), PlayedKvm()
        self.said: list[MigrationStatus] = []
        self.failure: PefboxError | None = None
        self.migration = SourceMigration(
            cast(MovableMachine, self.machine),
            cast(KvmPort, self.kvm),
            stream,
            BulkChannel(ours, key, End.SOURCE),
            parameters,
            self.said.append,
        )

    async def run(self) -> None:
        """As MigrationControl does."""
        try:
            await self.migration.run()
        except PefboxError as error:
            self.failure = error

    async def greet(self) -> None:
        """As a destination that takes the VM."""
        assert (await self.destination.receive()).kind is FrameKind.HELLO
        await self.destination.send(FrameKind.HELLO, hello_of(self.machine.vm, secure=self.machine.secure).encode())

    async def next(self) -> Frame:
        """What comes."""
        return await self.destination.receive()


@pytest.fixture
async def stream() -> AsyncIterator[StreamBuffer]:
    buffer = make_stream_buffer("vm1")
    made = StreamBuffer(os.dup(buffer.fd))
    buffer.close()
    yield made
    made.close()


async def test_a_limit_that_is_raised_counts_for_what_waits_under_the_old_one(stream: StreamBuffer) -> None:
    rig = Rig(stream, MigrationParameters(max_bandwidth=1))
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.run)
            await rig.greet()
            # At a byte a second what follows these pages would come in days.
            assert (await rig.next()).kind is FrameKind.PAGES
            await trio.testing.wait_all_tasks_blocked()
            rig.migration.set_parameters(MigrationParameters(max_bandwidth=0))
            assert (await rig.next()).kind is FrameKind.PAGES
            nursery.cancel_scope.cancel()
    rig.destination.close()


async def test_the_reason_of_a_destination_that_gives_up_is_cut_short(stream: StreamBuffer) -> None:
    rig = Rig(stream, MigrationParameters(), secure=True)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.run)
            await rig.greet()
            assert (await rig.next()).kind is FrameKind.HANDSHAKE
            await rig.destination.send(FrameKind.FAILED, b"x" * MAX_PAYLOAD_BYTES)
            assert (await rig.next()).kind is FrameKind.FAILED
    assert rig.failure is not None
    assert str(rig.failure).startswith("the destination: xxx")
    assert len(str(rig.failure)) < MAX_REASON_CHARS
    rig.destination.close()


async def test_a_vm_that_is_reset_meanwhile_is_said_to_be(stream: StreamBuffer) -> None:
    rig = Rig(stream, MigrationParameters(), secure=True)
    rig.kvm.refused = {u.UV_EXPORT_ANSWER: "U_STATE"}
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.run)
            await rig.greet()
            assert (await rig.next()).kind is FrameKind.HANDSHAKE
            await rig.destination.send(FrameKind.HANDSHAKE, b"answer")
            assert (await rig.next()).kind is FrameKind.FAILED
    assert str(rig.failure) == "the VM was reset, or turns secure, meanwhile (UV_EXPORT_ANSWER was refused: U_STATE)"
    rig.destination.close()
