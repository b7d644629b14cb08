"""The destination's side of a migration in qemu, against a played source, kvm and machine: when the VM runs here."""

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
from services.qemu.migration.destination import ArrivalFailed, ArrivalStatus, DestinationMigration
from services.qemu.migration.hello import hello_of
from services.qemu.migration.kvm_port import KvmPort, StepRefused
from services.qemu.migration.machine import MovableMachine
from services.qemu.migration.stream import FrameKind, parts_of
from shared.stream_buffer import StreamBuffer, make_stream_buffer
from tests.unit.ultravisor_rig import MEMORY_BYTES, vm_entry

WORD = 11
"""Bytes of whatever the ultravisor says."""


class PlayedMachine:
    """A machine that runs as soon as it has arrived."""

    is_running = True

    def __init__(self) -> None:
        self.vm = vm_entry()
        self.ram = memoryview(bytearray(MEMORY_BYTES))
        self.host_view = memoryview(bytearray(MEMORY_BYTES // PAGE_BYTES))
        self.arrivals: list[bool] = []

    async def make_windows(self, _state: bytes) -> None:
        """As MovableMachine."""

    async def load_devices(self, _state: bytes) -> None:
        """As MovableMachine."""

    def arrived(self, *, running: bool) -> None:
        """As MovableMachine."""
        self.arrivals.append(running)


class PlayedKvm:
    """kvm and the ultravisor behind it: `refused` are codes by step."""

    def __init__(self) -> None:
        self.orders: list[str] = []
        self.refused: dict[Call, str] = {}

    async def ucall(self, call: Call, *_args: int) -> list[int]:
        """As KvmPort."""
        self.orders.append(call.name)
        if call in self.refused:
            raise StepRefused(call.name, self.refused[call])
        return [1 if call is u.UV_IMPORT_RECORD else WORD][: len(call.results)]

    async def load(self, _offset: int, _n_bytes: int) -> None:
        """As KvmPort."""
        self.orders.append("load")

    async def go_on(self) -> None:
        """As KvmPort."""
        self.orders.append("go_on")


class Rig:
    """One arrival of a secure VM, and its source's end of the channel."""

    def __init__(self, stream: StreamBuffer) -> None:
        ours, theirs = socket.socketpair()
        key = os.urandom(KEY_BYTES)
        self.source = BulkChannel(theirs, key, End.SOURCE)
        self.machine, self.kvm = PlayedMachine(), PlayedKvm()
        self.said: list[ArrivalStatus] = []
        self.failure: Exception | None = None
        self.arrival = DestinationMigration(
            cast(MovableMachine, self.machine),
            cast(KvmPort, self.kvm),
            stream,
            BulkChannel(ours, key, End.DESTINATION),
            self.said.append,
        )

    async def run(self) -> None:
        """As MigrationControl does."""
        try:
            await self.arrival.run()
        except PefboxError as error:
            self.failure = error

    async def until_ready(self, nursery: trio.Nursery) -> None:
        """Begin it, and send everything up to the right to run."""
        nursery.start_soon(self.run)
        source = self.source
        await source.send(FrameKind.HELLO, hello_of(self.machine.vm, secure=True).encode())
        assert (await source.receive()).kind is FrameKind.HELLO
        await source.send(FrameKind.HANDSHAKE, b"offer")
        assert (await source.receive()).kind is FrameKind.HANDSHAKE
        await source.send(FrameKind.HANDSHAKE, b"confirm")
        await source.send(FrameKind.RECORD, b"all of it")
        for name in ("devices", "kvm"):
            for part in parts_of(name, b"state"):
                await source.send(FrameKind.STATE, part)
        assert (await source.receive()).kind is FrameKind.RECORD


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    buffer = make_stream_buffer("vm1")
    stream = StreamBuffer(os.dup(buffer.fd))
    buffer.close()
    made = Rig(stream)
    yield made
    made.source.close()
    stream.close()


async def test_it_runs_when_its_ultravisor_has_taken_the_token(rig: Rig) -> None:
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            await rig.until_ready(nursery)
            await rig.source.send(FrameKind.STATEMENT, b"token")
            assert (await rig.source.receive()).kind is FrameKind.STATEMENT
        await rig.arrival.has_started()

    assert rig.said[-1] is ArrivalStatus.COMPLETED
    assert rig.machine.arrivals == [True]
    assert rig.kvm.orders.count("go_on") == 1
    assert "UV_IMPORT_ABANDON" not in rig.kvm.orders


async def test_s6_a_token_that_its_ultravisor_refuses_lets_it_not_run(rig: Rig) -> None:
    rig.kvm.refused[u.UV_IMPORT_TOKEN] = "U_STATE"
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            await rig.until_ready(nursery)
            await rig.source.send(FrameKind.STATEMENT, b"token")
            assert [(await rig.source.receive()).kind for _ in range(2)] == [FrameKind.STATEMENT, FrameKind.FAILED]
            nursery.cancel_scope.cancel()

    assert rig.said[-1] is ArrivalStatus.FAILED
    assert rig.machine.arrivals == []


async def test_it_runs_when_an_operator_brought_the_token_while_it_waits(rig: Rig) -> None:
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            await rig.until_ready(nursery)
            await trio.testing.wait_all_tasks_blocked()

            await rig.arrival.has_started()

    assert rig.failure is None
    assert rig.said[-1] is ArrivalStatus.COMPLETED
    assert rig.machine.arrivals == [True]
    assert rig.kvm.orders[-1] == "go_on"


async def test_it_runs_when_an_operator_brought_the_token_after_it_gave_up(rig: Rig) -> None:
    """Its ultravisor could not give up: a start may have been stored there."""
    rig.kvm.refused[u.UV_IMPORT_ABANDON] = "U_PERMISSION"
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            await rig.until_ready(nursery)
            rig.source.close()
        await rig.arrival.has_started()

    assert rig.said[-2:] == [ArrivalStatus.FAILED, ArrivalStatus.COMPLETED]
    assert rig.machine.arrivals == [True]


async def test_nothing_runs_of_a_vm_that_did_not_come_as_a_whole(rig: Rig) -> None:
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.run)
            with pytest.raises(ArrivalFailed, match="as a whole"):
                await rig.arrival.has_started()
            nursery.cancel_scope.cancel()

    assert rig.machine.arrivals == []
