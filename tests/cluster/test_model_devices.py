"""The model kernel's commands for devices beside the disk, saved and loaded at every safe point on the way."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from protocol.startup import PLATFORM_OFFER, DeviceEntry, IommuDomain
from services.guest.model.image import build_image
from services.guest.model.state import MAX_STATE_BYTES, Phase
from services.guest.model.virtqueue import ANSWER_LIMIT_NS, QueueError
from services.qemu.edu import Edu
from shared.boot_partition import build_boot_partition, write_disk
from tests.cluster.board_world import BoardWorld

MAX_EXITS_A_STEP = 100
DEVICES = [
    DeviceEntry(kind="virtio-rng", offer=PLATFORM_OFFER),
    DeviceEntry(kind="edu", name="shared"),
    DeviceEntry(kind="edu", name="own", iommu_domain=IommuDomain.OWN),
]
BUS, OWN = 0x80000000, 0x80000008
RING_IO_PAGES = 16
MAX_STEPS = 50_000


@asynccontextmanager
async def prompt_world(disk: Path, devices: list[DeviceEntry], command_line: str) -> AsyncIterator[BoardWorld]:
    with disk.open("w+b") as file:
        write_disk(file, build_boot_partition(build_image("prompt"), b"initrd", command_line), data=io.BytesIO(b"d"))
    world = BoardWorld(disk, access_platform=False, devices=devices)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.board.run)
        await world.power_on()
        yield world
        nursery.cancel_scope.cancel()
    world.close()


async def until_prompt(world: BoardWorld) -> None:
    """Run to the next prompt, with a new engine at each safe point; no step may be too long, no state too large."""
    n_exits = 0
    for _ in range(MAX_STEPS):
        if world.console.endswith("\n> "):
            return
        assert not world.crash, world.crash
        await world.step()
        n_exits += 1
        assert n_exits <= MAX_EXITS_A_STEP
        if world.engine.at_safe_point:
            n_exits = 0
            assert len(world.reload_kernel()) <= MAX_STATE_BYTES
    raise AssertionError(f"no prompt: {world.console[-400:]}")


async def ask(world: BoardWorld, line: str) -> str:
    world.console, world.typed = "", line.encode() + b"\r"
    world.xics.set_irq(world.console_source, True)
    await until_prompt(world)
    return world.console.split("\r\n")[-2]


@pytest.mark.parametrize("command_line", ["svm=off", "svm=on"], ids=["normal", "secure"])
async def test_every_command_ends_the_same_when_the_kernel_is_loaded_anew_at_each_safe_point(
    tmp_path: Path, command_line: str
) -> None:
    async with prompt_world(tmp_path / "disk", DEVICES, command_line) as world:
        await until_prompt(world)

        for _ in range(2):
            assert (await ask(world, "rng 4096")).startswith("ok 4096 ")
            for line, liobn in (("edu 4096", BUS), ("edu 1 100", OWN)):
                assert (await ask(world, line)).endswith(f" of liobn {liobn:#x}")
            assert (await ask(world, "edu 1 4096 0")).startswith("error other bytes came back")
        assert len((await ask(world, "dma")).split(";")) == 4
        assert world.secure is (command_line == "svm=on")


async def test_a_device_is_lent_and_taken_back_when_the_kernel_is_loaded_anew_at_each_safe_point(
    tmp_path: Path,
) -> None:
    async with prompt_world(tmp_path / "disk", DEVICES[:1], "svm=off") as world:
        await until_prompt(world)

        for _ in range(2):
            assert (await ask(world, "vfio")).startswith("ok own buffer filled, canary intact")
            assert (await ask(world, "rng 4096")).startswith("ok 4096 ")
        table = world.tces.get(BUS)
        assert table is not None
        assert len(table.nonzero()) == RING_IO_PAGES, "the kernel's own ring and nothing else"


async def test_an_interrupt_that_is_lost_costs_time_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with prompt_world(tmp_path / "disk", DEVICES, "svm=off") as world:
        await until_prompt(world)
        monkeypatch.setattr(world.board.functions[2], "interrupt", lambda: None)

        began_ns = world.clock.ns
        assert (await ask(world, "edu 0 64")).startswith("ok 64 bytes came back")
        assert world.clock.ns - began_ns > ANSWER_LIMIT_NS


async def test_an_edu_that_never_ends_a_transfer_is_given_up_and_the_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never_ends(_: Edu) -> None:
        await trio.lowlevel.checkpoint()

    async with prompt_world(tmp_path / "disk", DEVICES, "svm=off") as world:
        await until_prompt(world)
        monkeypatch.setattr(Edu, "_transfer", never_ends)

        assert (await ask(world, "edu 0 64")).startswith(f"error {QueueError.NO_ANSWER}, by 0x1")
        assert await ask(world, "edu 0 64") == f"error {QueueError.NO_ANSWER}"
        monkeypatch.undo()
        assert (await ask(world, "edu 1 64")).startswith("ok 64 bytes came back")
        assert (await ask(world, "rng 64")).startswith("ok 64 ")


async def test_an_interrupt_that_comes_as_the_kernel_is_entered_is_taken_by_the_kernel(tmp_path: Path) -> None:
    """The line stays up until somebody accepts, and is told of once: whoever forgets it never hears anything again."""
    async with prompt_world(tmp_path / "disk", [], "svm=off") as world:
        raised = told = False
        for _ in range(MAX_STEPS):
            entering = world.engine._kernel.state.phase is Phase.BOOT_ENTER and not world.engine.at_safe_point
            if entering and not raised:
                raised = True
                world.xics.set_irq(world.console_source, True)
            level = world.xics.line(0)
            if level != told:
                told = level
                world.engine.set_line(level)
            await world.serve_one()
            if raised and not world.xics.line(0):
                return
        raise AssertionError("the interrupt was never accepted")
