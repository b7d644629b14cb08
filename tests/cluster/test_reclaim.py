"""The host takes frames of shared pages of a running secure VM away (`page.reclaim`, UV_PAGE_INVAL)."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from protocol.geometry import PAGE_BYTES, gpa_of
from tests.cluster.svm_rig import N_PAGES, Rig, svm_rig

ZERO_SUM = f"ok {hashlib.sha256(bytes(PAGE_BYTES)).hexdigest()}"


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with svm_rig(tmp_path) as running:
        yield running


async def test_a_shared_frame_is_the_hosts_to_take_and_the_guests_again_at_its_next_touch(rig: Rig) -> None:
    gfn = await rig.free_gfn()
    await rig.ask(f"share {gfn}")
    await rig.ask(f"fill {gfn} 0xbb")
    ram = rig.ram()

    for _ in range(3):
        assert await rig.move("reclaim", gfn) == {"H_SUCCESS": 1}
        assert await rig.page_state(gfn) == ("SHARED_INV", "SHARED")
        assert not any(ram[gpa_of(gfn) : gpa_of(gfn) + PAGE_BYTES])

        assert await rig.ask(f"sum {gfn}") == ZERO_SUM
        assert await rig.page_state(gfn) == ("SHARED", "SHARED")
        ram[gpa_of(gfn)] = 0x11
        assert await rig.ask(f"touch {gfn}") == "ok 0x11"
        assert await rig.ask(f"fill {gfn} 0xbb") == "ok"
        assert ram[gpa_of(gfn) : gpa_of(gfn) + 4] == b"\xbb" * 4


async def test_a_page_without_frame_can_be_taken_back_and_shared_again(rig: Rig) -> None:
    gfn = await rig.free_gfn()
    await rig.ask(f"share {gfn}")
    await rig.move("reclaim", gfn)

    assert await rig.ask(f"unshare {gfn}") == "ok"

    assert await rig.page_state(gfn) == ("SECURE", "SECURE")
    assert await rig.ask(f"sum {gfn}") == ZERO_SUM
    assert await rig.move("reclaim", gfn) == {"H_PARAMETER": 1}
    await rig.ask(f"fill {gfn} 0xc3")
    assert await rig.ask(f"share {gfn}") == "ok"
    assert await rig.ask(f"sum {gfn}") == ZERO_SUM


async def test_only_what_is_shared_is_taken(rig: Rig) -> None:
    """S1: a reclaim of everything private changes nothing."""
    gfn = await rig.free_gfn() - 1
    await rig.ask(f"fill {gfn} 0xc3")
    before = await rig.ask(f"sum {gfn}")
    await rig.ask(f"fill {gfn + 1} 0xd7")
    await rig.move("out", gfn + 1)

    assert await rig.move("reclaim", gfn, 2) == {"H_PARAMETER": 2}

    assert await rig.page_state(gfn) == ("SECURE", "SECURE")
    assert await rig.page_state(gfn + 1) == ("PAGED_OUT", "PAGED_OUT")
    assert await rig.ask(f"sum {gfn}") == before


async def test_the_ultravisors_pages_are_asked_for_again_and_the_rtas_page_is_not_missed(rig: Rig) -> None:
    states = {gfn: (await rig.page_state(gfn))[0] for gfn in range(N_PAGES)}
    bounce = [gfn for gfn, state in states.items() if state == "SHARED_IMPLICIT"]
    (rtas,) = [gfn for gfn, state in states.items() if state == "PSEUDO_SHARED"]
    before = await rig.ask(f"sum {rtas}")

    assert await rig.move("reclaim", bounce[0], len(bounce)) == {"H_SUCCESS": len(bounce)}
    assert await rig.move("reclaim", rtas) == {"H_SUCCESS": 1}

    assert {(await rig.page_state(gfn))[0] for gfn in bounce} == {"SHARED_IMPLICIT_INV"}
    assert await rig.page_state(rtas) == ("PSEUDO_SHARED_INV", "SHARED")
    assert await rig.ask(f"sum {rtas}") == before
    since = await rig.console_end()
    await rig.vm.console_write(b"reboot\r")
    assert "secure=1" in await rig.booted(since)
