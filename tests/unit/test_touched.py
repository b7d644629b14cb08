"""Which pages of a memory file were ever touched: found out without touching any."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from protocol.errors import HostFault
from protocol.geometry import PAGE_BYTES, PAGE_SHIFT
from services.ultravisor.secure_memory import SecretMemory
from shared.memfd import SealedMemory
from shared.touched import data_ranges, touch, touched_in_file, touched_in_locked

N_PAGES = 64


def secret() -> SecretMemory:
    try:
        return SecretMemory(N_PAGES * PAGE_BYTES)
    except HostFault as fault:
        pytest.skip(str(fault))


def ordinary() -> SealedMemory:
    return SealedMemory("touched", N_PAGES * PAGE_BYTES, others_write=True)


@pytest.mark.parametrize(
    ("make", "touched"),
    [
        (ordinary, lambda memory: touched_in_file(memory.fd, N_PAGES)),
        (secret, lambda memory: touched_in_locked(memory.buffer)),
    ],
    ids=["file", "locked"],
)
def test_a_page_is_touched_by_a_store_to_any_byte_and_by_nothing_else(
    make: Callable[[], SealedMemory | SecretMemory], touched: Callable[[SealedMemory | SecretMemory], bytearray]
) -> None:
    memory = make()
    assert touched(memory) == bytearray(N_PAGES)

    for gfn, offset in ((3, 0), (4, PAGE_BYTES - 1), (N_PAGES - 1, 4096)):
        memory.buffer[gfn * PAGE_BYTES + offset] = 1

    assert [gfn for gfn, mark in enumerate(touched(memory)) if mark] == [3, 4, N_PAGES - 1]
    memory.close()


def test_a_hole_that_was_punched_is_untouched_again() -> None:
    memory = ordinary()
    memory.buffer[5 * PAGE_BYTES] = memory.buffer[9 * PAGE_BYTES] = 1
    os.pwrite(memory.fd, b"x", 7 * PAGE_BYTES)

    assert [gfn for gfn, mark in enumerate(touched_in_file(memory.fd, N_PAGES)) if mark] == [5, 7, 9]
    memory.close()


def test_a_page_that_is_punched_while_one_looks_is_no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = ordinary()
    memory.buffer[5 * PAGE_BYTES] = memory.buffer[9 * PAGE_BYTES] = 1
    look = os.lseek
    punched: list[int] = []

    def punched_between(fd: int, at: int, how: int) -> int:
        if how == os.SEEK_HOLE and not punched:
            punched.append(at)
            return at
        return look(fd, at, how)

    monkeypatch.setattr(os, "lseek", punched_between)
    ranges = list(data_ranges(memory.fd, N_PAGES * PAGE_BYTES))

    assert punched == [5 * PAGE_BYTES]
    assert [start >> PAGE_SHIFT for start, _ in ranges] == [5, 9]
    assert all(n_bytes > 0 for _, n_bytes in ranges)
    memory.close()


def test_secret_pages_behind_one_that_was_written_are_made_too() -> None:
    memory = secret()
    memory.buffer[2 * PAGE_BYTES] = 1

    touch(memory.buffer, range(2, 6))

    assert [gfn for gfn, mark in enumerate(touched_in_locked(memory.buffer)) if mark] == [2, 3, 4, 5]
    memory.close()


def test_touching_secret_pages_makes_them_and_keeps_what_they_hold() -> None:
    memory = secret()
    memory.buffer[5 * PAGE_BYTES + 7] = 0x5A

    for run in (range(2, 3), range(5, 6), range(9, 12)):
        touch(memory.buffer, run)

    assert [gfn for gfn, mark in enumerate(touched_in_locked(memory.buffer)) if mark] == [2, 5, 9, 10, 11]
    assert memory.buffer[5 * PAGE_BYTES + 7] == 0x5A
    assert not any(memory.buffer[2 * PAGE_BYTES : 3 * PAGE_BYTES])
    memory.close()
