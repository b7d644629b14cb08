"""The model kernel's balloon over qemu's real board in one process: saved and loaded at every safe point, or moved."""

from __future__ import annotations

import io
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio

from protocol.geometry import PAGE_BYTES
from protocol.startup import DeviceEntry
from services.guest.model.image import build_image
from services.guest.model.state import MAX_STATE_BYTES, Balloon, decode_state
from services.guest.model.virtqueue import ANSWER_LIMIT_NS, QueueError
from services.qemu.virtio_balloon import VirtioBalloon
from services.qemu.virtqueue import Chain, Virtqueue
from shared.boot_partition import build_boot_partition, write_disk
from shared.virtio import DeviceStatus
from shared.vring import RING_IDX, USED_ELEM, used_entry
from tests.cluster.board_world import RAM_BYTES, BoardWorld, SavedWorld

DEVICES = [DeviceEntry(kind="virtio-rng"), DeviceEntry(kind="virtio-balloon")]
HALF = RAM_BYTES // 2
N_PAGES = HALF // PAGE_BYTES
MAX_EXITS_A_STEP = 85
MAX_STEPS = 50_000
RELOAD_PROBABILITY = 0.3


def balloon_of(world: BoardWorld) -> VirtioBalloon:
    assert world.board.balloon is not None
    return world.board.balloon


@asynccontextmanager
async def prompt_world(disk: Path) -> AsyncIterator[BoardWorld]:
    """At the prompt, normal."""
    with disk.open("w+b") as file:
        write_disk(file, build_boot_partition(build_image("prompt"), b"initrd", "svm=off"), data=io.BytesIO(b"d"))
    async with running(BoardWorld(disk, access_platform=False, devices=DEVICES)) as world:
        await world.power_on()
        await until(world, lambda: world.console.endswith("\n> "))
        yield world


@asynccontextmanager
async def running(world: BoardWorld) -> AsyncIterator[BoardWorld]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.board.run)
        yield world
        nursery.cancel_scope.cancel()
    world.close()


async def until(world: BoardWorld, done: Callable[[], bool], chance: random.Random | None = None) -> None:
    """Run until `done`, with a new engine at some safe points; no step may be too long, no state too large."""
    n_exits = 0
    for _ in range(MAX_STEPS):
        if done():
            return
        assert not world.crash, world.crash
        await world.step()
        n_exits += 1
        assert n_exits <= MAX_EXITS_A_STEP
        if world.engine.at_safe_point:
            n_exits = 0
            if chance is not None and chance.random() < RELOAD_PROBABILITY:
                assert len(world.reload_kernel()) <= MAX_STATE_BYTES
    raise AssertionError(f"not done: {world.console[-400:]}")


async def until_actual(world: BoardWorld, n_bytes: int, chance: random.Random | None = None) -> None:
    balloon_of(world).set_target(n_bytes)
    await until(world, lambda: balloon_of(world).actual_bytes == n_bytes, chance)


async def ask(world: BoardWorld, line: str) -> str:
    world.console, world.typed = "", line.encode() + b"\r"
    world.xics.set_irq(world.console_source, True)
    await until(world, lambda: world.console.endswith("\n> "))
    return world.console.split("\r\n")[-2]


async def test_it_follows_its_target_when_the_kernel_is_loaded_anew_on_the_way(tmp_path: Path) -> None:
    chance = random.Random(3)
    async with prompt_world(tmp_path / "disk") as world:
        for _ in range(2):
            await until_actual(world, HALF, chance)
            assert await ask(world, "balloon") == f"ok target {N_PAGES} actual {N_PAGES} pages"
            await until_actual(world, RAM_BYTES, chance)
            assert " balloon=0" in await ask(world, "pages")
        discarded = [gfn for gfns in world.port.discarded for gfn in gfns]
        assert len(discarded) == 2 * N_PAGES


async def test_an_inflated_balloon_goes_on_in_another_world(tmp_path: Path) -> None:
    async with prompt_world(tmp_path / "disk") as world:
        await until_actual(world, HALF)
        free = (await ask(world, "pages")).split()[1]
        await until(world, lambda: world.engine.at_safe_point)
        saved = msgspec.msgpack.encode(world.save())

    async with running(BoardWorld(tmp_path / "disk", access_platform=False, devices=DEVICES)) as other:
        other.load(msgspec.msgpack.decode(saved, type=SavedWorld), bytes(world.ram))
        assert balloon_of(other).actual_bytes == HALF
        assert await ask(other, "balloon") == f"ok target {N_PAGES} actual {N_PAGES} pages"
        assert (await ask(other, "pages")).split()[1] == free
        await until_actual(other, RAM_BYTES)
        assert " balloon=0" in await ask(other, "pages")


async def test_every_answer_of_a_device_comes_by_an_interrupt(tmp_path: Path) -> None:
    """Also the second and later ones: a driver that does not ask again hears nothing until its limit is over."""
    async with prompt_world(tmp_path / "disk") as world:
        began_ns = world.clock.ns
        for _ in range(3):
            assert (await ask(world, "rng 64")).startswith("ok 64 ")
        await until_actual(world, HALF)
        assert world.clock.ns - began_ns < ANSWER_LIMIT_NS


async def test_a_device_that_gave_up_is_given_up_and_its_pages_are_never_used(tmp_path: Path) -> None:
    async with prompt_world(tmp_path / "disk") as world:
        await until_actual(world, HALF)
        balloon_of(world).fail("for a test")
        await until(world, lambda: "balloon: the device needs a reset" in world.console)

        assert balloon_of(world).status & DeviceStatus.NEEDS_RESET
        assert await ask(world, "balloon") == "error the device needs a reset"
        assert f" balloon={N_PAGES}" in await ask(world, "pages")
        assert (await ask(world, "hash")).startswith("ok ")


LIES = {
    QueueError.NO_ANSWER: (0, 0, 0),
    QueueError.BAD_ID: (1, 9, 0),
    QueueError.NOT_A_HEAD: (1, 1, 0),
    QueueError.USED_LENGTH: (1, 0, 4),
    QueueError.INDEX_JUMP: (1000, 0, 0),
}
"""By what the driver calls it: used index, head and length that it finds; its first request has head 0."""


@pytest.mark.parametrize("error", LIES)
async def test_a_device_that_lies_is_given_up_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: QueueError
) -> None:
    async def never(_self: VirtioBalloon, _queue: Virtqueue, _chain: Chain) -> None:
        await trio.lowlevel.checkpoint()

    monkeypatch.setattr(VirtioBalloon, "handle", never)
    async with prompt_world(tmp_path / "disk") as world:
        balloon_of(world).set_target(HALF)
        await until(world, lambda: world.engine.at_safe_point and bool(state_of(world).submitted_ns))
        index, head, n_bytes = LIES[error]
        used = state_of(world).inflate.used
        world.memory.store(used + used_entry(0), USED_ELEM.pack(head, n_bytes))
        world.memory.store_u16(used + RING_IDX, index)

        await until(world, lambda: f"balloon: {error.value}" in world.console)

        assert await ask(world, "balloon") == f"error {error.value}"
        assert " balloon=16" in await ask(world, "pages")


def state_of(world: BoardWorld) -> Balloon:
    return decode_state(world.engine.save()).balloon
