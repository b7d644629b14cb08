"""The host's accessor of guest RAM, while the guest takes its pages back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from protocol.errors import GuestFault
from protocol.geometry import PAGE_BYTES
from shared.guest_ram import GuestRam
from shared.host_view import HostState

VALUE = 0x1234
RAW = VALUE.to_bytes(2, "little")

Store = Callable[[GuestRam], Awaitable[None]]


class Race:
    """One frame that its guest takes back after each of the first `n_taken` stores, punched as kvm does."""

    def __init__(self, n_taken: int) -> None:
        self.frame = bytearray(PAGE_BYTES)
        self.n_taken, self.n_wanted = n_taken, 0
        self._present = True
        self.ram = GuestRam(memoryview(self.frame), self, self._want)  # type: ignore[arg-type]

    def __getitem__(self, gfn: int) -> HostState:
        """The host view as kvm's next step leaves it."""
        if self._present and self.n_taken and any(self.frame):
            self.n_taken -= 1
            self._present = False
            self.frame[:] = bytes(PAGE_BYTES)
        return HostState.PRESENT if self._present else HostState.ABSENT

    async def _want(self, gfns: list[int]) -> None:
        assert gfns == [0]
        self.n_wanted += 1
        self._present = True


async def _write(ram: GuestRam) -> None:
    await ram.write(0, RAW)


async def _store(ram: GuestRam) -> None:
    await ram.store_u16(0, VALUE)


@pytest.mark.parametrize("store", [_write, _store])
@pytest.mark.parametrize("n_taken", [0, 1, 3])
async def test_a_store_to_a_frame_that_the_guest_takes_meanwhile_is_made_again(store: Store, n_taken: int) -> None:
    race = Race(n_taken)

    await store(race.ram)

    assert race.frame[:2] == RAW
    assert race.n_wanted == n_taken


@pytest.mark.parametrize("store", [_write, _store])
async def test_a_guest_that_takes_its_page_back_for_ever_ends_the_access(store: Store) -> None:
    race = Race(1_000_000)

    with pytest.raises(GuestFault, match="do not stay present"):
        await store(race.ram)


def test_a_store_that_may_not_wait_says_that_the_frame_was_taken() -> None:
    assert not Race(1).ram.write_now(0, RAW)
    assert not Race(1).ram.store_u16_now(0, VALUE)
    assert Race(0).ram.write_now(0, RAW)
    assert Race(0).ram.store_u16_now(0, VALUE)
