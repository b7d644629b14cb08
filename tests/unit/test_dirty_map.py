"""Dirty maps: read and clear without losing a store, and maps of hostile peers."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from typing import Any, cast

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from protocol import messages as m
from protocol.codes import HCode
from protocol.errors import HostFault, PeerGone
from services.kvm.dirty import DEVICE_MAP, GUEST_MAP, DirtyPages
from services.runtime.link import Link
from shared.dirty_map import DirtyMap
from shared.gfn_ranges import invalidations_of, runs_of
from shared.memfd import SealedMemory

N_PAGES = 64
ALL = range(N_PAGES)


class Writer:
    """A guest or qemu: its map, and how it answers an invalidation."""

    def __init__(self, name: str) -> None:
        self.memory = SealedMemory(name, N_PAGES, others_write=True)
        self.asked: list[list[int]] = []
        self.code = HCode.H_SUCCESS
        self.gone = False
        self.stores_meanwhile: list[int] = []

    async def call(self, message: Any, body: m.InvalidateBody, _cause: int) -> m.Status:  # noqa: ANN401
        assert message is m.MAP_INVALIDATE
        await trio.lowlevel.checkpoint()
        if self.gone:
            raise PeerGone("vm1/guest", "gone")
        self.asked.append([gfn for part in body.ranges for gfn in range(part.gfn, part.gfn + part.n)])
        self.store(*self.stores_meanwhile)
        return m.Status(self.code)

    def store(self, *gfns: int) -> None:
        for gfn in gfns:
            self.memory.buffer[gfn] = 1

    def fd(self) -> int:
        return os.dup(self.memory.fd)


class Rig:
    def __init__(self) -> None:
        self.guest, self.qemu = Writer("guest"), Writer("qemu")
        self.secure = False
        self.pages = DirtyPages(N_PAGES, cast(Link, self.guest), cast(Link, self.qemu), lambda: self.secure)
        assert self.pages.take_map(GUEST_MAP, self.guest.fd())
        assert self.pages.take_map(DEVICE_MAP, self.qemu.fd())

    def close(self) -> None:
        self.pages.close()
        for writer in (self.guest, self.qemu):
            writer.memory.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    it = Rig()
    yield it
    it.close()


# -- the map ----------------------------------------------------------------------------------------------------------


def test_marks_are_taken_once_and_only_in_the_range() -> None:
    memory = SealedMemory("dirty", N_PAGES, others_write=True)
    dirty = DirtyMap(os.dup(memory.fd), N_PAGES)
    memory.buffer[3], memory.buffer[9], memory.buffer[40] = 1, 0xFF, 1

    assert dirty.take(range(32)) == [3, 9]
    assert dirty.take(ALL) == [40]
    assert dirty.take(ALL) == []
    dirty.put_back([40])
    assert dirty.take(ALL) == [40]

    dirty.close()
    memory.close()


def _file(n_bytes: int, seals: int) -> int:
    fd = os.memfd_create("hostile", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, n_bytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


@pytest.mark.parametrize(
    ("n_bytes", "seals"),
    [
        (N_PAGES - 1, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW),
        (N_PAGES + 1, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW),
        (N_PAGES, fcntl.F_SEAL_GROW),
        (N_PAGES, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE),
    ],
    ids=["short", "long", "not sealed against shrinking", "not writable"],
)
def test_a_map_that_could_harm_its_reader_is_refused_and_closed(n_bytes: int, seals: int) -> None:
    fd = _file(n_bytes, seals)

    with pytest.raises(HostFault):
        DirtyMap(fd, N_PAGES)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_file_that_is_no_memory_file_is_refused() -> None:
    with pytest.raises(HostFault):
        DirtyMap(os.open("/dev/null", os.O_RDWR), N_PAGES)


def test_an_invalidation_names_no_more_ranges_than_it_may() -> None:
    gfns = range(0, 4 * m.MAX_INVALIDATION_RANGES, 2)

    bodies = list(invalidations_of(gfns))

    assert [len(body.ranges) for body in bodies] == [m.MAX_INVALIDATION_RANGES] * 2
    assert [part.gfn for body in bodies for part in body.ranges] == list(gfns)


@given(st.lists(st.integers(0, 50)), st.integers(1, 5))
def test_runs_are_the_same_gfns_in_order_and_none_is_too_long(gfns: list[int], longest: int) -> None:
    runs = runs_of(gfns, longest)

    assert [gfn for run in runs for gfn in run] == sorted(set(gfns))
    assert all(1 <= len(run) <= longest for run in runs)


# -- kvm --------------------------------------------------------------------------------------------------------------


async def test_what_guest_devices_and_kvm_wrote_is_collected_once(rig: Rig) -> None:
    rig.guest.store(1, 5)
    rig.qemu.store(5, 7)
    rig.pages.own[9] = 1

    assert await rig.pages.collect(ALL) == [1, 5, 7, 9]
    assert await rig.pages.collect(ALL) == []
    assert rig.guest.asked == rig.qemu.asked == [[1, 5, 7, 9]]


async def test_a_store_between_clear_and_acknowledgement_is_dirty_again(rig: Rig) -> None:
    rig.guest.store(1)
    rig.guest.stores_meanwhile = [1, 2]

    assert await rig.pages.collect(ALL) == [1]
    rig.guest.stores_meanwhile = []
    assert await rig.pages.collect(ALL) == [1, 2]


@pytest.mark.parametrize("how", ["refuses", "is gone"])
async def test_marks_come_back_when_a_writer_does_not_acknowledge(rig: Rig, how: str) -> None:
    rig.guest.store(1)
    rig.qemu.store(2)
    rig.pages.own[3] = 1
    rig.qemu.code = HCode.H_PARAMETER if how == "refuses" else HCode.H_SUCCESS
    rig.guest.gone = how == "is gone"

    with pytest.raises(HostFault, match="acknowledge"):
        await rig.pages.collect(ALL)

    rig.qemu.code, rig.guest.gone = HCode.H_SUCCESS, False
    assert await rig.pages.collect(ALL) == [1, 2, 3]


async def test_the_marks_of_a_secure_guest_are_not_kvms(rig: Rig) -> None:
    rig.guest.store(1)
    rig.qemu.store(2)
    rig.secure = True

    assert await rig.pages.collect(ALL) == [2]
    assert not rig.guest.asked
    rig.secure = False
    assert await rig.pages.collect(ALL) == [1]


def test_a_map_is_taken_once_and_nothing_under_another_name(rig: Rig) -> None:
    fd = rig.guest.fd()

    assert not rig.pages.take_map(GUEST_MAP, fd)
    assert not rig.pages.take_map("host-view", fd)
    os.close(fd)


async def test_without_a_map_nothing_is_called_clean() -> None:
    pages = DirtyPages(N_PAGES, cast(Link, None), cast(Link, None), lambda: False)

    with pytest.raises(HostFault, match=GUEST_MAP):
        await pages.collect(ALL)
