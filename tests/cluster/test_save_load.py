"""save() and load() of the model kernel over qemu's real board: at any safe point, in this process or a new one."""

from __future__ import annotations

import hashlib
import io
import random
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
import trio

from protocol.errors import GuestFault
from services.guest.model.disk_load import block_content
from services.guest.model.image import build_image
from services.guest.model.state import MAX_STATE_BYTES
from shared.boot_partition import build_boot_partition, write_disk
from tests.cluster.board_world import BoardWorld, Outcome, choose, continue_saved

N_IN_PROCESS = 1000
N_FRESH = 10
DISK_OPS = 1600
DATA_BYTES = 1 << 20
MARKER_BYTES = 16
SEED = 11
PATHS = ["quirk", "iommu"]


@dataclass
class Run:
    """A run to its end: outcome, disk, safe points passed, and the states that were loaded."""

    outcome: Outcome
    disk_sha256: str
    n_safe_points: int
    states: list[bytes] = field(default_factory=list)


def data_content() -> bytes:
    return random.Random(SEED).randbytes(DATA_BYTES)


def make_disk(path: Path, n_operations: int) -> None:
    image = build_image("disk", {"disk_ops": n_operations})
    boot = build_boot_partition(image, b"initrd", "svm=on")
    with path.open("w+b") as disk:
        write_disk(disk, boot, data=io.BytesIO(data_content()))


@asynccontextmanager
async def world_on(disk: Path, path: str, n_operations: int = DISK_OPS) -> AsyncIterator[BoardWorld]:
    make_disk(disk, n_operations)
    world = BoardWorld(disk, access_platform=path == "iommu")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.board.run)
        await world.power_on()
        yield world
        nursery.cancel_scope.cancel()
    world.close()


async def run_to_end(world: BoardWorld, at_safe_point: Callable[[int], bytes | None]) -> Run:
    """Run; `at_safe_point(number)` is called at each and may return a state that was loaded there."""
    n_safe_points, states = 0, []
    while not world.done:
        assert not world.crash, world.crash
        await world.step()
        if world.engine.at_safe_point:
            state = at_safe_point(n_safe_points)
            n_safe_points += 1
            if state is not None:
                states.append(state)
    return Run(world.outcome(), sha256_of(world.disk), n_safe_points, states)


def sha256_of(disk: Path) -> str:
    return hashlib.sha256(disk.read_bytes()).hexdigest()


async def straight_run(disk: Path, path: str, n_operations: int = DISK_OPS) -> Run:
    async with world_on(disk, path, n_operations) as world:
        return await run_to_end(world, lambda _: None)


def planted_markers() -> set[bytes]:
    """Pieces of what the guest keeps in RAM: disk content that it read, blocks that it wrote."""
    contents = [data_content()]
    contents += [block_content(generation)[:32] for generation in range(1, DISK_OPS + 1)]
    pieces = (content[at : at + MARKER_BYTES] for content in contents for at in range(0, len(content), MARKER_BYTES))
    return {piece for piece in pieces if len(set(piece)) > MARKER_BYTES // 2}


def markers_in(data: bytes, markers: set[bytes], step: int = 1) -> set[bytes]:
    return {data[at : at + MARKER_BYTES] for at in range(0, len(data) - MARKER_BYTES + 1, step)} & markers


@pytest.mark.parametrize("path", PATHS)
async def test_a_run_that_is_saved_and_loaded_a_thousand_times_ends_the_same(tmp_path: Path, path: str) -> None:
    plain = await straight_run(tmp_path / "plain.img", path)
    assert plain.outcome.answer.split()[1] == plain.disk_sha256
    chosen = choose(SEED, plain.n_safe_points, N_IN_PROCESS)

    async with world_on(tmp_path / "saved.img", path) as world:
        run = await run_to_end(world, lambda number: world.reload_kernel() if number in chosen else None)
        markers = planted_markers()
        assert len(markers_in(world.private.tobytes(), markers, step=MARKER_BYTES)) > len(markers) // 2

    assert len(run.states) == N_IN_PROCESS
    assert run.outcome == plain.outcome
    assert run.disk_sha256 == plain.disk_sha256
    assert max(map(len, run.states)) <= MAX_STATE_BYTES
    assert not set().union(*(markers_in(state, markers) for state in run.states))


@pytest.mark.parametrize("path", PATHS)
async def test_a_fresh_process_goes_on_from_state_and_ram(tmp_path: Path, path: str) -> None:
    plain = await straight_run(tmp_path / "plain.img", path, 200)
    chosen = choose(SEED + 1, plain.n_safe_points, N_FRESH // 2)
    places: list[Path] = []

    async with world_on(tmp_path / "saved.img", path, 200) as world:

        def save_to_files(number: int) -> bytes | None:
            if number in chosen:
                places.append(save_world(world, tmp_path / f"at{number}"))
            return None

        await run_to_end(world, save_to_files)

    assert len(places) == N_FRESH // 2
    for place in places:
        outcome = await trio.to_thread.run_sync(run_in_fresh_process, place, path)
        assert outcome == plain.outcome
        assert sha256_of(place / "disk") == plain.disk_sha256


def save_world(world: BoardWorld, directory: Path) -> Path:
    """The world, its RAM and its disk as files."""
    directory.mkdir()
    (directory / "world").write_bytes(msgspec.msgpack.encode(world.save()))
    (directory / "ram").write_bytes(world.ram)
    shutil.copy(world.disk, directory / "disk")
    return directory


def run_in_fresh_process(directory: Path, path: str) -> Outcome:
    command = [sys.executable, "-m", "tests.cluster.board_world", str(directory), path]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, timeout=60, check=True)
    return msgspec.json.decode(done.stdout, type=Outcome)


async def test_the_state_without_the_ram_under_it_does_not_end_the_same(tmp_path: Path) -> None:
    plain = await straight_run(tmp_path / "plain.img", "quirk", 200)
    async with world_on(tmp_path / "saved.img", "quirk", 200) as world:
        place = await save_at(world, plain.n_safe_points * 3 // 4, tmp_path / "wiped")
    with (place / "ram").open("r+b") as ram:
        n_bytes = ram.seek(0, 2)
        ram.truncate(0)
        ram.truncate(n_bytes)

    with trio.fail_after(60):
        assert await ends_otherwise(place, plain)


async def save_at(world: BoardWorld, number: int, directory: Path) -> Path:
    """Save at safe point `number`, and stop there."""
    n_passed = 0
    while n_passed <= number:
        await world.step()
        n_passed += world.engine.at_safe_point
    return save_world(world, directory)


async def ends_otherwise(place: Path, plain: Run) -> bool:
    """Whether the run that goes on from `place` fails, or ends with another outcome."""
    outcome = None
    try:
        outcome = await continue_saved(place, access_platform=False)
    except* (AssertionError, GuestFault):
        outcome = None
    return outcome != plain.outcome
