"""What a kvm that lies, stays silent or floods cannot do to the ultravisor and to a secure VM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import trio
import trio.testing
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

from protocol import hcalls as h
from protocol import messages as m
from protocol import ucalls as u
from protocol.codes import HCode, UCode
from protocol.errors import PeerGone
from protocol.geometry import PAGE_BYTES, PAGE_SHIFT
from services.testing.image import PlayedImage
from tests.unit.ultravisor_rig import (
    LPID,
    MEMORY_BYTES,
    Registers,
    Served,
    UltravisorRig,
    answering,
    played_image,
    ultravisor_rig,
)

KERNEL = b"a small kernel" * 10_000
FREE_GFN = 20
AnyMessage = m.Message[Any, Any]


@pytest.fixture(scope="module")
def image(key: RSAPrivateKey) -> PlayedImage:
    return played_image(key, KERNEL, {"crypttab": b"a key"})


@pytest.fixture
def rig(nursery: trio.Nursery, key: RSAPrivateKey) -> Iterator[UltravisorRig]:
    with ultravisor_rig(nursery, key) as made:
        yield made


async def test_s7_a_kvm_that_falls_silent_while_many_pages_come_in_ends_the_switch_only(
    image: PlayedImage, key: RSAPrivateKey, autojump_clock: object
) -> None:
    async with trio.open_nursery() as nursery:
        with ultravisor_rig(nursery, key) as rig:
            rig.load(image)
            rig.kvm.lies[h.H_SVM_PAGE_IN.number] = _obey_then_silence(rig, 3)

            code = await rig.esm(image)

            assert code == UCode.U_PARAMETER
            assert rig.partition.svm is None
            assert rig.account.used_bytes == 0
            assert rig.partition.last_esm is not None
            assert "did not answer H_SVM_PAGE_IN" in rig.partition.last_esm.reason


def _obey_then_silence(rig: UltravisorRig, n: int) -> Served:
    served = 0

    async def serve(args: Registers) -> Registers | None:
        nonlocal served
        served += 1
        if served <= n:
            return await rig.kvm.obey(h.H_SVM_PAGE_IN.number)(args)
        return None

    return serve


async def test_s7_a_share_that_kvm_half_refused_and_only_pretends_to_take_back_ends_the_vm(
    rig: UltravisorRig, image: PlayedImage
) -> None:
    await rig.secure(image)

    async def lie(args: Registers) -> Registers:
        gpa, flags, _ = args
        if flags == h.H_PAGE_IN_SHARED and gpa >> PAGE_SHIFT == FREE_GFN:
            await rig.kvm.page_in(FREE_GFN)
            return [HCode.H_SUCCESS]
        return [HCode.H_PARAMETER if flags == h.H_PAGE_IN_SHARED else HCode.H_SUCCESS]

    rig.kvm.lies[h.H_SVM_PAGE_IN.number] = lie

    assert await rig.share(FREE_GFN, 2) == UCode.U_STATE

    assert rig.partition.svm is None
    assert rig.notices == [("vm-failed", "vm1", "hypervisor-kept-shared-page")]


async def test_a_share_that_finds_kvm_busy_all_the_time_is_to_be_tried_again(
    image: PlayedImage, key: RSAPrivateKey, autojump_clock: object
) -> None:
    async with trio.open_nursery() as nursery:
        with ultravisor_rig(nursery, key) as rig:
            await rig.secure(image)
            rig.kvm.lies[h.H_SVM_PAGE_IN.number] = answering(HCode.H_BUSY)

            assert await rig.share(FREE_GFN, 2) == UCode.U_RETRY

            assert rig.state(FREE_GFN) == rig.state(FREE_GFN + 1) == "SECURE"


async def test_s5_taking_a_frame_away_twice_during_a_share_changes_nothing(
    rig: UltravisorRig, image: PlayedImage
) -> None:
    await rig.secure(image)
    codes: list[int] = []

    async def take_away_twice(_args: Registers) -> Registers:
        await rig.kvm.page_in(FREE_GFN)
        codes.extend([await rig.kvm.page_inval(FREE_GFN), await rig.kvm.page_inval(FREE_GFN)])
        return [HCode.H_SUCCESS]

    rig.kvm.lies[h.H_SVM_PAGE_IN.number] = take_away_twice

    assert await rig.share(FREE_GFN) == UCode.U_SUCCESS

    assert codes == [UCode.U_SUCCESS, UCode.U_SUCCESS]
    assert rig.state(FREE_GFN) == "SHARED_INV"


async def test_s5_no_memory_slot_is_added_to_a_running_secure_vm(rig: UltravisorRig, image: PlayedImage) -> None:
    await rig.secure(image)

    assert await rig.kvm.ucall(u.UV_REGISTER_MEM_SLOT, LPID, MEMORY_BYTES, 1 << PAGE_SHIFT, 0, 7) == UCode.U_PARAMETER
    assert rig.account.used_bytes == MEMORY_BYTES


async def test_s7_no_memory_slot_is_taken_from_a_switch_that_has_taken_pages_in(
    rig: UltravisorRig, image: PlayedImage
) -> None:
    codes: list[int] = []

    async def drop_the_slot_first(_args: Registers) -> Registers:
        codes.append(await rig.kvm.ucall(u.UV_UNREGISTER_MEM_SLOT, LPID, 0))
        return [HCode.H_SUCCESS]

    rig.kvm.lies[h.H_SVM_INIT_DONE.number] = drop_the_slot_first

    await rig.secure(image)

    assert codes == [UCode.U_STATE]
    assert rig.account.used_bytes == MEMORY_BYTES


async def test_no_switch_begins_while_the_secure_vm_of_before_is_being_ended(
    rig: UltravisorRig, image: PlayedImage, nursery: trio.Nursery
) -> None:
    await rig.secure(image)
    lets_go = rig.guest.held[m.SVM_ENDED.number] = trio.Event()
    nursery.start_soon(rig.kvm.terminate)
    await trio.testing.wait_all_tasks_blocked()
    rig.kvm.frames.clear()

    assert await rig.esm(image) == UCode.U_RETRY

    assert not rig.kvm.frames
    lets_go.set()
    await rig.partition.ended.wait()
    assert rig.account.used_bytes == 0
    await rig.secure(image)


async def test_s1_files_of_the_blob_are_for_the_running_secure_vm_only(rig: UltravisorRig, image: PlayedImage) -> None:
    seen: list[int] = []
    call = rig.guest.call

    async def read_a_file(message: AnyMessage, body: m.Body, _cause: int = 0) -> m.Status:
        if message is m.SVM_START:
            seen.append(await _read_file(rig))
        return await call(message, body, _cause)

    rig.guest.call = read_a_file  # type: ignore[method-assign]
    await rig.secure(image)

    assert seen == [len(b"a key")], "the first instruction of the secure VM may ask for a file"

    await rig.kvm.terminate()
    assert await _read_file(rig) == UCode.U_PERMISSION


async def _read_file(rig: UltravisorRig) -> int:
    name = int.from_bytes(b"crypttab", "big")
    return await rig.ucall(u.UV_ESMB_GET_FILE, 0, name, *[0] * 7)


async def test_the_account_is_not_credited_while_a_guest_holds_the_memory(
    image: PlayedImage, key: RSAPrivateKey, autojump_clock: object
) -> None:
    async with trio.open_nursery() as nursery:
        with ultravisor_rig(nursery, key) as rig:
            await rig.secure(image)
            call = rig.guest.call

            async def never_lets_go(message: AnyMessage, body: m.Body, _cause: int = 0) -> m.Status:
                if message is m.SVM_ENDED:
                    await trio.sleep_forever()
                return await call(message, body, _cause)

            rig.guest.call = never_lets_go  # type: ignore[method-assign]

            await rig.kvm.terminate()
            assert rig.account.used_bytes == MEMORY_BYTES

            rig.partition.guest_is_gone()
            await trio.testing.wait_all_tasks_blocked()
            assert rig.account.used_bytes == 0


async def test_s5_a_flood_of_refused_shares_does_not_fill_the_audit_log(rig: UltravisorRig, image: PlayedImage) -> None:
    await rig.secure(image)

    for _ in range(5000):
        await rig.share(1 << 40)

    assert len(rig.audited("share")) < 2000
    assert rig.audited("esm")


def _ignore_invalidations(rig: UltravisorRig) -> None:
    call = rig.guest.call

    async def ignore(message: AnyMessage, body: m.Body, _cause: int = 0) -> m.Status:
        if message is m.MAP_INVALIDATE:
            raise PeerGone("vm1/guest", "stopped")
        return await call(message, body, _cause)

    rig.guest.call = ignore  # type: ignore[method-assign]


async def test_l1_a_guest_that_is_stopped_in_an_unshare_keeps_its_shared_page(
    rig: UltravisorRig, image: PlayedImage
) -> None:
    await rig.secure(image)
    assert await rig.share(FREE_GFN) == UCode.U_SUCCESS
    rig.write(FREE_GFN, b"from the host".ljust(PAGE_BYTES))
    call = rig.guest.call
    _ignore_invalidations(rig)

    assert await rig.unshare(FREE_GFN) == UCode.U_RETRY

    assert rig.partition.secure
    assert rig.state(FREE_GFN) == "SHARED"
    assert rig.read(FREE_GFN).startswith(b"from the host")

    rig.guest.call = call  # type: ignore[method-assign]
    assert await rig.unshare(FREE_GFN) == UCode.U_SUCCESS
    assert rig.state(FREE_GFN) == "SECURE"


async def test_s7_a_frame_given_before_the_guest_acknowledged_is_taken_back(
    rig: UltravisorRig, image: PlayedImage
) -> None:
    await rig.secure(image)
    rig.page(FREE_GFN)[:5] = b"inner"
    call = rig.guest.call

    async def give_early(message: AnyMessage, body: m.Body, _cause: int = 0) -> m.Status:
        if message is m.MAP_INVALIDATE:
            await rig.kvm.page_in(FREE_GFN)
            raise PeerGone("vm1/guest", "stopped")
        return await call(message, body, _cause)

    rig.guest.call = give_early  # type: ignore[method-assign]

    assert await rig.share(FREE_GFN) == UCode.U_RETRY

    assert rig.state(FREE_GFN) == "SECURE"
    assert bytes(rig.page(FREE_GFN)[:5]) == b"inner"
