"""Frames that a normal VM's balloon gives back: gone, unmapped, zero at the next touch; those of a secure VM stay."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import messages as m
from protocol.codes import HCode
from protocol.geometry import PAGE_BYTES, gpa_of
from protocol.hcalls import H_SVM_INIT_ABORT, H_SVM_INIT_DONE, H_SVM_INIT_START
from services.kvm.page_state import KvmState
from services.kvm.uvmem import Switch
from shared.host_view import HostState
from tests.unit.kvm_rig import KvmRig, kvm_rig
from tests.unit.ultravisor_rig import N_PAGES

CONTENT = bytes([0x5A]) * PAGE_BYTES


@pytest.fixture
async def rig() -> AsyncIterator[KvmRig]:
    with kvm_rig() as it:
        await it.start()
        it.memory.ram[:] = CONTENT * N_PAGES
        yield it


async def discard(rig: KvmRig, *gfns: int) -> int:
    return int((await rig.qemu.deliver(m.PAGES_DISCARD, m.PagesBody(list(gfns)))).code)


async def touch(rig: KvmRig, gfn: int) -> int:
    return int((await rig.guest.deliver(m.MAP_FAULT, m.MapFaultBody(0, gfn, m.Access.READ))).code)


def frame(rig: KvmRig, gfn: int) -> bytes:
    return bytes(rig.memory.ram[gpa_of(gfn) : gpa_of(gfn) + PAGE_BYTES])


def used_bytes(rig: KvmRig) -> int:
    """What the RAM segment really takes of the host's memory."""
    return os.fstat(rig.ram_fd).st_blocks * 512


async def test_a_discarded_frame_is_gone_for_the_host_and_for_the_guest(rig: KvmRig) -> None:
    assert await touch(rig, 5) == HCode.H_SUCCESS
    before = used_bytes(rig)

    assert await discard(rig, 5, 7, 6) == HCode.H_SUCCESS

    assert used_bytes(rig) == before - 3 * PAGE_BYTES
    for gfn in (5, 6, 7):
        assert rig.memory.state(gfn) is KvmState.DISCARDED
        assert rig.memory.host_view[gfn] == HostState.ABSENT
        assert rig.memory.map[gfn] == 0
        assert rig.vm.dirty.own[gfn]
    assert rig.guest.calls[-1] == ("MAP_INVALIDATE", m.InvalidateBody([m.Range(5, 3)]))
    assert frame(rig, 4) == frame(rig, 8) == CONTENT
    assert rig.memory.page_counts()["discarded"] == 3


async def test_the_guests_next_touch_finds_zeros_and_maps_no_discarded_neighbour(rig: KvmRig) -> None:
    await discard(rig, 5, 6)

    assert await touch(rig, 5) == HCode.H_SUCCESS

    assert rig.memory.map[5] != 0
    assert rig.memory.map[6] == 0
    assert (rig.memory.state(5), rig.memory.state(6)) == (KvmState.NORMAL, KvmState.DISCARDED)
    assert frame(rig, 5) == bytes(PAGE_BYTES)


async def test_the_hosts_own_touch_brings_a_zeroed_frame(rig: KvmRig) -> None:
    await discard(rig, 5, 6)

    status = await rig.qemu.deliver(m.PAGES_WANTED, m.PagesBody([5]))
    of_kvm = await rig.vm.ram.read(gpa_of(6), 16)

    assert status.code == HCode.H_SUCCESS
    assert [rig.memory.host_view[gfn] for gfn in (5, 6)] == [HostState.PRESENT] * 2
    assert of_kvm == bytes(16)
    assert frame(rig, 5) == bytes(PAGE_BYTES)


async def test_discarding_twice_is_as_once(rig: KvmRig) -> None:
    assert await discard(rig, 5, 5) == HCode.H_SUCCESS
    assert await discard(rig, 5) == HCode.H_SUCCESS

    assert rig.memory.in_state(KvmState.DISCARDED) == [5]


@pytest.mark.parametrize("gfn", [N_PAGES, N_PAGES + 1, 1 << 20])
async def test_a_frame_outside_ram_is_refused_with_all_that_came_with_it(rig: KvmRig, gfn: int) -> None:
    assert await discard(rig, 5, gfn) == HCode.H_PARAMETER

    assert not rig.memory.in_state(KvmState.DISCARDED)
    assert frame(rig, 5) == CONTENT


async def test_a_frame_outside_the_slots_is_refused(rig: KvmRig) -> None:
    await rig.qemu.deliver(m.MEMSLOT_SET, m.MemslotBody(0, 0, gpa_of(4)))

    assert await discard(rig, 4) == HCode.H_PARAMETER


async def test_pages_of_a_secure_vm_are_not_the_hosts_to_discard(rig: KvmRig) -> None:
    """S1's other side: what the ultravisor keeps for the guest, its host cannot take from it."""
    await rig.secure()
    rig.guest.calls.clear()
    rig.ultravisor.calls.clear()

    assert await discard(rig, 5) == HCode.H_PERMISSION

    assert rig.memory.state(5) is KvmState.SECURE
    assert (rig.guest.calls, rig.ultravisor.calls) == ([], [])


async def test_while_the_vm_turns_secure_nothing_is_discarded(rig: KvmRig) -> None:
    await rig.hcall(H_SVM_INIT_START)

    assert await discard(rig, 5) == HCode.H_BUSY

    assert rig.memory.state(5) is KvmState.NORMAL
    assert frame(rig, 5) == CONTENT


async def test_what_was_discarded_before_is_an_ordinary_page_of_the_vm_that_turns_secure(rig: KvmRig) -> None:
    await discard(rig, 5)

    await rig.hcall(H_SVM_INIT_START)
    assert rig.memory.state(5) is KvmState.NORMAL
    await rig.hcall(H_SVM_INIT_DONE)

    assert rig.memory.in_state(KvmState.SECURE) == list(range(N_PAGES))


async def test_what_was_discarded_is_there_after_a_switch_that_failed(rig: KvmRig) -> None:
    await discard(rig, 5)

    await rig.hcall(H_SVM_INIT_START)
    await rig.hcall(H_SVM_INIT_ABORT)

    assert await touch(rig, 5) == HCode.H_SUCCESS
    assert frame(rig, 5) == bytes(PAGE_BYTES)


async def test_a_guest_that_does_not_let_go_keeps_its_frames(rig: KvmRig) -> None:
    rig.guest.codes[m.MAP_INVALIDATE.number] = HCode.H_HARDWARE

    assert await discard(rig, 5) == HCode.H_BUSY

    assert rig.memory.state(5) is KvmState.NORMAL
    assert rig.memory.host_view[5] == HostState.PRESENT
    assert frame(rig, 5) == CONTENT
    assert await touch(rig, 5) == HCode.H_SUCCESS


async def test_a_vm_that_turns_secure_meanwhile_keeps_its_frames(rig: KvmRig, monkeypatch: pytest.MonkeyPatch) -> None:
    acknowledge = rig.guest.call

    async def turn_secure(message: Any, body: Any, cause: int = 0) -> m.Status:  # noqa: ANN401
        if rig.vm.secure.switch is Switch.NONE:
            await rig.secure()
        return await acknowledge(message, body, cause)

    monkeypatch.setattr(rig.guest, "call", turn_secure)

    assert await discard(rig, 5) == HCode.H_BUSY

    assert rig.memory.state(5) is KvmState.SECURE
    assert rig.memory.host_view[5] == HostState.ABSENT
    assert not rig.memory.busy


async def test_a_machine_that_is_reset_meanwhile_keeps_its_frames(rig: KvmRig, monkeypatch: pytest.MonkeyPatch) -> None:
    acknowledge, frames = rig.guest.call, list[bytes]()

    async def reset_and_touch(message: Any, body: Any, cause: int = 0) -> m.Status:  # noqa: ANN401
        if not frames:
            frames.append(b"")
            await rig.qemu.deliver(m.VM_RESET, m.Empty())
            assert await touch(rig, 5) == HCode.H_SUCCESS
        return await acknowledge(message, body, cause)

    monkeypatch.setattr(rig.guest, "call", reset_and_touch)

    assert await discard(rig, 5, 6) == HCode.H_BUSY

    assert not rig.memory.busy
    assert rig.memory.map[5] != 0
    assert [rig.memory.host_view[gfn] for gfn in (5, 6)] == [HostState.PRESENT] * 2
    assert frame(rig, 5) == frame(rig, 6) == CONTENT


async def test_a_touch_while_a_frame_goes_comes_again(rig: KvmRig, monkeypatch: pytest.MonkeyPatch) -> None:
    acknowledge, codes = rig.guest.call, list[int]()

    async def touched(message: Any, body: Any, cause: int = 0) -> m.Status:  # noqa: ANN401
        codes.append(await touch(rig, 5))
        return await acknowledge(message, body, cause)

    monkeypatch.setattr(rig.guest, "call", touched)

    assert await discard(rig, 5) == HCode.H_SUCCESS

    assert codes == [HCode.H_BUSY]
    assert await touch(rig, 5) == HCode.H_SUCCESS


async def test_a_reset_gives_all_frames_back(rig: KvmRig) -> None:
    await discard(rig, 5)

    await rig.qemu.deliver(m.VM_RESET, m.Empty())

    assert rig.memory.in_state(KvmState.NORMAL) == list(range(N_PAGES))
    assert frame(rig, 4) == CONTENT


DISCARDS = st.tuples(st.just("discard"), st.lists(st.integers(0, N_PAGES + 2), min_size=1, max_size=8))
TOUCHES = st.tuples(st.sampled_from(["touch", "want"]), st.integers(0, N_PAGES - 1).map(lambda gfn: [gfn]))


@given(orders=st.lists(st.one_of(DISCARDS, TOUCHES), max_size=20))
async def test_whatever_is_ordered_map_view_and_content_agree(orders: list[tuple[str, list[int]]]) -> None:
    gone, zeroed = set[int](), set[int]()
    with kvm_rig() as rig:
        await rig.start()
        rig.memory.ram[:] = CONTENT * N_PAGES
        for order, gfns in orders:
            if order == "discard":
                if await discard(rig, *gfns) == HCode.H_SUCCESS:
                    gone.update(gfns)
                    zeroed.update(gfns)
                else:
                    assert max(gfns) >= N_PAGES
            elif order == "touch":
                assert await touch(rig, gfns[0]) == HCode.H_SUCCESS
                gone.difference_update(gfns)
            else:
                assert (await rig.qemu.deliver(m.PAGES_WANTED, m.PagesBody(gfns))).code == HCode.H_SUCCESS
                gone.difference_update(gfns)

        assert rig.memory.in_state(KvmState.DISCARDED) == sorted(gone)
        for gfn in range(N_PAGES):
            assert rig.memory.host_view[gfn] == (HostState.ABSENT if gfn in gone else HostState.PRESENT)
            assert not (gfn in gone and rig.memory.map[gfn])
            assert frame(rig, gfn) == (bytes(PAGE_BYTES) if gfn in zeroed else CONTENT)
