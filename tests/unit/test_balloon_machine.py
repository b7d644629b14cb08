"""The machine between a balloon and kvm, and between a balloon and its monitor."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest
import structlog
import trio

from protocol import messages as m
from protocol.codes import HCode
from protocol.errors import PeerGone
from protocol.geometry import PAGE_BYTES
from protocol.startup import DeviceEntry
from services.qemu.board import Board
from services.qemu.machine import Machine
from services.qemu.qmp import CommandFailed, ErrorClass, MonitorEvents
from services.qemu.testing import TestRam, board_entry
from services.runtime.link import Link
from shared.virtio import DeviceStatus

MEMORY_BYTES = 64 * PAGE_BYTES


class PlayedKvm:
    """kvm's end: notes the frames that it is to take; `codes` are its answers in turn, H_SUCCESS after them."""

    def __init__(self, *codes: int) -> None:
        self.asked: list[list[int]] = []
        self.codes = list(codes)
        self.gone = False

    async def call(self, message: Any, body: m.PagesBody, _cause: int) -> m.Status:  # noqa: ANN401
        """As Link.call."""
        assert message is m.PAGES_DISCARD
        if self.gone:
            raise PeerGone("alpha/kvm", "stopped")
        self.asked.append(body.gfns)
        return m.Status(self.codes.pop(0) if self.codes else HCode.H_SUCCESS)


def machine_of(kvm: PlayedKvm, nursery: trio.Nursery, *devices: DeviceEntry) -> tuple[Machine, MonitorEvents]:
    events = MonitorEvents()
    machine = Machine(cast(Link, kvm), events, nursery, structlog.wrap_logger(structlog.ReturnLogger()))
    entry = board_entry([], list(devices), memory_bytes=MEMORY_BYTES)
    machine.board = Board(entry, TestRam(MEMORY_BYTES).accessor, {}, machine)
    return machine, events


BALLOON = DeviceEntry(kind="virtio-balloon")


async def test_frames_are_asked_for_in_messages_that_kvm_takes(nursery: trio.Nursery) -> None:
    kvm = PlayedKvm()
    machine, _ = machine_of(kvm, nursery, BALLOON)

    assert await machine.discard(list(range(600))) == HCode.H_SUCCESS

    assert [len(gfns) for gfns in kvm.asked] == [m.MAX_PAGES, m.MAX_PAGES, 600 - 2 * m.MAX_PAGES]
    assert [gfn for gfns in kvm.asked for gfn in gfns] == list(range(600))


async def test_the_first_refusal_ends_it(nursery: trio.Nursery) -> None:
    kvm = PlayedKvm(HCode.H_SUCCESS, HCode.H_PERMISSION)
    machine, _ = machine_of(kvm, nursery, BALLOON)

    assert await machine.discard(list(range(1000))) == HCode.H_PERMISSION

    assert len(kvm.asked) == 2


async def test_a_kvm_that_is_stopped_may_be_asked_again(nursery: trio.Nursery) -> None:
    kvm = PlayedKvm()
    kvm.gone = True
    machine, _ = machine_of(kvm, nursery, BALLOON)

    assert await machine.discard([1]) == HCode.H_BUSY


async def test_the_monitor_sets_and_reads_the_balloon(nursery: trio.Nursery) -> None:
    machine, events = machine_of(PlayedKvm(), nursery, DeviceEntry(kind="virtio-rng"), BALLOON)
    lines: list[bytes] = []
    events.subscribe(lines.append)
    assert machine.board is not None
    assert machine.board.balloon is not None

    await machine.set_balloon(MEMORY_BYTES // 2)
    assert await machine.balloon() == MEMORY_BYTES
    machine.board.balloon.write_config(4, (16).to_bytes(4, "little"))

    assert machine.board.balloon.target_bytes == MEMORY_BYTES // 2
    assert await machine.balloon() == MEMORY_BYTES - PAGE_BYTES
    assert [json.loads(line)["event"] for line in lines] == ["BALLOON_CHANGE"]
    assert json.loads(lines[0])["data"] == {"actual": MEMORY_BYTES - PAGE_BYTES}


async def test_without_a_balloon_the_monitor_says_so_as_qemu_does(nursery: trio.Nursery) -> None:
    machine, _ = machine_of(PlayedKvm(), nursery, DeviceEntry(kind="virtio-rng"))

    for refused in (machine.set_balloon(1), machine.balloon()):
        with pytest.raises(CommandFailed) as failure:
            await refused
        assert failure.value.error_class is ErrorClass.DEVICE_NOT_ACTIVE
        assert failure.value.description == "No balloon device has been activated"


async def test_a_balloon_that_has_stopped_takes_no_target_and_says_why(nursery: trio.Nursery) -> None:
    machine, _ = machine_of(PlayedKvm(), nursery, BALLOON)
    assert machine.board is not None
    balloon = machine.board.balloon
    assert balloon is not None
    balloon.fail("the VM is secure")

    with pytest.raises(CommandFailed, match="The balloon device has stopped: the VM is secure"):
        await machine.set_balloon(MEMORY_BYTES // 2)

    assert balloon.status & DeviceStatus.NEEDS_RESET
    assert balloon.target_bytes == MEMORY_BYTES
