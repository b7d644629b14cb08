"""UV_ESM step by step, against a kvm that obeys and one that lies."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Awaitable, Callable, Iterator

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

from protocol import hcalls as h
from protocol.codes import HCode, UCode
from protocol.geometry import PAGE_BYTES, gpa_of
from protocol.messages import SVM_START
from protocol.ucalls import UV_ESM, UV_UNSHARE_ALL_PAGES
from services.testing.image import FDT_GFN, INITRD_GFN, KERNEL_GFN, RTAS_GFN, PlayedImage
from services.ultravisor import page_requests
from services.ultravisor.esm import BOUNCE_PAGES
from shared.esm_digest import RTAS_TEXT
from shared.fdt_reader import read_fdt
from shared.partition_map import MapKind, kind_of
from tests.unit.ultravisor_rig import (
    MEMORY_BYTES,
    N_PAGES,
    Registers,
    UltravisorRig,
    answering,
    played_image,
    silence,
    ultravisor_rig,
)

KERNEL = b"a small kernel" * 1000
FREE_GFN = 20


@pytest.fixture(scope="module")
def image(key: RSAPrivateKey) -> PlayedImage:
    return played_image(key, KERNEL, {"crypttab": b"a key"})


@pytest.fixture
def rig(nursery: trio.Nursery, key: RSAPrivateKey) -> Iterator[UltravisorRig]:
    with ultravisor_rig(nursery, key) as made:
        yield made


async def expect_refusal(rig: UltravisorRig, image: PlayedImage, reason: str) -> None:
    """The switch is refused, RAM is byte for byte as it was, the account is empty, the reason is the operator's."""
    before, held_before = rig.ram(), _secure_memory_files()

    assert await rig.esm(image) == UCode.U_PARAMETER

    assert rig.ram() == before
    assert rig.partition.svm is None
    assert rig.account.used_bytes == 0
    with trio.fail_after(2):
        # The system takes its time to zero it.
        while not _secure_memory_files() <= held_before:  # noqa: ASYNC110
            await trio.sleep(0.005)
    assert rig.partition.last_esm is not None
    assert (rig.partition.last_esm.outcome, rig.partition.last_esm.reason) == ("refused", reason)
    assert rig.audited("esm-refused") == [{"reason": reason}]
    assert not rig.notices
    assert SVM_START.name not in [name for name, _ in rig.guest.calls]


def _secure_memory_files() -> set[int]:
    """Inode numbers of the secure memory that this process holds: what other tests left is not collected yet."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        # One may be closed while we look.
        with contextlib.suppress(FileNotFoundError):
            name = os.readlink(f"/proc/self/fd/{fd}")
            if "secretmem" in name or "pefbox-secure" in name:
                found.add(os.stat(f"/proc/self/fd/{fd}").st_ino)
    return found


# -- an honest host ---------------------------------------------------------------------------------------------------


async def test_a_measured_image_starts_as_a_secure_vm(rig: UltravisorRig, image: PlayedImage) -> None:
    await rig.secure(image)

    assert rig.partition.secure
    assert rig.account.used_bytes == MEMORY_BYTES
    (start,) = [body for name, body in rig.guest.calls if name == SVM_START.name]
    assert start.pc == image.kbase  # type: ignore[attr-defined]
    assert start.gprs == {3: image.fdt_gpa, 4: image.kbase, 5: 0}  # type: ignore[attr-defined]
    (line,) = rig.audited("esm")
    assert line["kernel_bytes"] == len(KERNEL)


async def test_only_what_was_measured_is_taken_from_the_host(rig: UltravisorRig, image: PlayedImage) -> None:
    await rig.secure(image)

    assert bytes(rig.page(RTAS_GFN)) == RTAS_TEXT.ljust(PAGE_BYTES, b"\0")
    assert bytes(rig.page(KERNEL_GFN)) == KERNEL.ljust(PAGE_BYTES, b"\0")
    initrd = image.parts[gpa_of(INITRD_GFN)]
    assert bytes(rig.page(INITRD_GFN)) == initrd.ljust(PAGE_BYTES, b"\0")
    assert not any(rig.page(FREE_GFN))


async def test_of_the_rtas_area_guest_and_hypervisor_each_have_a_page_of_their_own(
    rig: UltravisorRig, image: PlayedImage
) -> None:
    """S1, S2: the hypervisor's page is zero and stays so, whatever the guest writes into its own."""
    await rig.secure(image)
    assert rig.state(RTAS_GFN) == "PSEUDO_SHARED"
    rig.page(RTAS_GFN)[0x1000:0x1006] = b"secret"
    assert not any(rig.read(RTAS_GFN))

    assert await rig.kvm.page_out(RTAS_GFN) == UCode.U_SUCCESS
    assert not any(rig.read(RTAS_GFN))
    assert await rig.kvm.page_inval(RTAS_GFN) == UCode.U_SUCCESS
    assert rig.state(RTAS_GFN) == "PSEUDO_SHARED_INV"
    assert await rig.fault(RTAS_GFN) == HCode.H_SUCCESS
    assert await rig.kvm.page_in(RTAS_GFN) == UCode.U_SUCCESS
    assert rig.state(RTAS_GFN) == "PSEUDO_SHARED"
    assert bytes(rig.page(RTAS_GFN)[0x1000:0x1006]) == b"secret"

    assert await rig.share(RTAS_GFN) == UCode.U_SUCCESS
    assert await rig.unshare(RTAS_GFN) == UCode.U_P2
    assert await rig.ucall(UV_UNSHARE_ALL_PAGES) == UCode.U_SUCCESS
    assert rig.state(RTAS_GFN) == "PSEUDO_SHARED"
    assert not any(rig.read(RTAS_GFN))


async def test_a_hypervisor_that_does_not_share_the_rtas_area_gets_no_secure_vm(
    rig: UltravisorRig, image: PlayedImage
) -> None:
    rig.load(image)
    obey = rig.kvm.obey(h.H_SVM_PAGE_IN.number)

    async def refuse_rtas(args: Registers) -> Registers | None:
        shared = args[1] == h.H_PAGE_IN_SHARED
        return [HCode.H_PARAMETER] if shared and args[0] == gpa_of(RTAS_GFN) else await obey(args)

    rig.kvm.lies[h.H_SVM_PAGE_IN.number] = refuse_rtas
    await expect_refusal(rig, image, "hypervisor: H_SVM_PAGE_IN of the RTAS area returned H_PARAMETER")


@pytest.mark.parametrize("flags", [h.H_PAGE_IN_SHARED, h.H_PAGE_IN_NONSHARED])
async def test_a_page_that_the_host_just_touches_does_not_refuse_the_switch(
    rig: UltravisorRig, image: PlayedImage, flags: int
) -> None:
    rig.load(image)
    obey = rig.kvm.obey(h.H_SVM_PAGE_IN.number)
    touched: set[int] = set()

    async def busy_once(args: Registers) -> Registers | None:
        if args[1] == flags and args[0] not in touched:
            touched.add(args[0])
            return [HCode.H_BUSY]
        return await obey(args)

    rig.kvm.lies[h.H_SVM_PAGE_IN.number] = busy_once

    assert await rig.esm(image) == UCode.U_SUCCESS
    assert len(touched) > 1


async def test_the_bounce_pages_are_zero_shared_implicitly_and_reserved_in_the_tree(
    rig: UltravisorRig, image: PlayedImage
) -> None:
    await rig.secure(image)

    bounce = [gfn for gfn in range(N_PAGES) if rig.state(gfn) == "SHARED_IMPLICIT"]
    tree = read_fdt(bytes(rig.page(FDT_GFN)))
    assert bounce == list(range(N_PAGES - BOUNCE_PAGES, N_PAGES))
    assert (gpa_of(bounce[0]), BOUNCE_PAGES * PAGE_BYTES) in tree.reservations
    assert all(not any(rig.read(gfn)) for gfn in bounce)


async def test_the_guest_keeps_its_rtas_page_when_the_host_takes_its_own_away(
    rig: UltravisorRig, image: PlayedImage
) -> None:
    rig.load(image)
    _while(rig, h.H_SVM_INIT_DONE.number, lambda: rig.kvm.page_inval(RTAS_GFN))

    assert await rig.esm(image) == UCode.U_SUCCESS

    svm = rig.partition.svm
    assert svm is not None
    assert rig.state(RTAS_GFN) == "PSEUDO_SHARED_INV"
    assert kind_of(svm.map[RTAS_GFN]) is MapKind.SECURE
    assert await rig.kvm.page_in(RTAS_GFN) == UCode.U_SUCCESS
    assert rig.state(RTAS_GFN) == "PSEUDO_SHARED"
    assert bytes(rig.page(RTAS_GFN)) == RTAS_TEXT.ljust(PAGE_BYTES, b"\0")


@pytest.mark.parametrize(
    ("kbase", "fdt", "code"),
    [
        (0, gpa_of(FDT_GFN), UCode.U_P2),
        (MEMORY_BYTES, gpa_of(FDT_GFN), UCode.U_P2),
        (gpa_of(KERNEL_GFN), 0, UCode.U_P3),
        (gpa_of(KERNEL_GFN), (1 << 64) - 8, UCode.U_P3),
        (0, 0, UCode.U_P2),
    ],
)
async def test_an_address_that_cannot_be_is_refused_before_the_host_hears_of_it(
    rig: UltravisorRig, kbase: int, fdt: int, code: UCode
) -> None:
    assert await rig.ucall(UV_ESM, kbase, fdt) == code

    assert not rig.kvm.frames
    assert rig.account.used_bytes == 0


async def test_missing_registers_are_a_parameter_error(rig: UltravisorRig) -> None:
    assert await rig.ucall(UV_ESM, gpa_of(1)) == UCode.U_PARAMETER


async def test_a_second_switch_is_told_to_retry(rig: UltravisorRig, image: PlayedImage) -> None:
    rig.load(image)
    codes: list[int] = []

    async def switch() -> None:
        codes.append(await rig.esm(image))

    async with trio.open_nursery() as callers:
        callers.start_soon(switch)
        callers.start_soon(switch)

    assert sorted(codes) == [UCode.U_RETRY, UCode.U_SUCCESS]
    assert await rig.esm(image) == UCode.U_RETRY
    assert rig.partition.secure


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gfn", "reason"),
    [(RTAS_GFN, "rtas digest differs"), (KERNEL_GFN, "kernel digest differs")],
)
async def test_a_changed_part_is_refused_and_every_page_goes_back(
    rig: UltravisorRig, image: PlayedImage, gfn: int, reason: str
) -> None:
    rig.load(image.with_byte_changed(gpa_of(gfn)))

    await expect_refusal(rig, image, reason)


async def test_a_vm_larger_than_the_free_secure_memory_is_refused(
    nursery: trio.Nursery, key: RSAPrivateKey, image: PlayedImage
) -> None:
    with ultravisor_rig(nursery, key, secure_memory_bytes=MEMORY_BYTES - PAGE_BYTES) as rig:
        rig.load(image)

        await expect_refusal(rig, image, "hypervisor: memory slots not registered; is secure memory exhausted?")


@pytest.mark.parametrize(
    ("number", "code", "reason"),
    [
        (h.H_SVM_INIT_START.number, HCode.H_AUTHORITY, "hypervisor: H_SVM_INIT_START returned H_AUTHORITY"),
        (h.H_SVM_INIT_START.number, 12345, "hypervisor: H_SVM_INIT_START returned 12345"),
        (h.H_SVM_INIT_START.number, HCode.H_SUCCESS, "hypervisor: registered no memory slot"),
        (h.H_SVM_PAGE_IN.number, HCode.H_PARAMETER, "hypervisor: did not give the page of gfn 0x9"),
        (h.H_SVM_PAGE_IN.number, HCode.H_SUCCESS, "hypervisor: did not give the page of gfn 0x9"),
        (h.H_SVM_INIT_DONE.number, HCode.H_STATE, "hypervisor: H_SVM_INIT_DONE returned H_STATE"),
    ],
)
async def test_a_hypervisor_that_refuses_or_lies_ends_the_switch_only(
    rig: UltravisorRig, image: PlayedImage, number: int, code: int, reason: str
) -> None:
    rig.load(image)
    rig.kvm.lies[number] = answering(code)

    await expect_refusal(rig, image, reason)


async def test_after_the_first_refused_page_no_other_is_asked_for(
    rig: UltravisorRig, key: RSAPrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_requests, "MAX_OPEN_PAGE_INS", 1)
    image = played_image(key, bytes(range(256)) * (3 * PAGE_BYTES // 256), {})
    rig.load(image)
    obey = rig.kvm.obey(h.H_SVM_PAGE_IN.number)

    async def refuse_kernel(args: Registers) -> Registers | None:
        return [HCode.H_PARAMETER] if args[0] == image.kbase else await obey(args)

    rig.kvm.lies[h.H_SVM_PAGE_IN.number] = refuse_kernel
    await expect_refusal(rig, image, f"hypervisor: did not give the page of gfn {KERNEL_GFN:#x}")

    asked = [args[2] for number, _, args in rig.kvm.frames if number == h.H_SVM_PAGE_IN.number]
    assert asked[-1] == image.kbase
    assert not {gpa_of(KERNEL_GFN + 1), gpa_of(KERNEL_GFN + 2)} & set(asked)


async def test_a_hypervisor_that_never_answers_is_given_up_with_its_name(
    image: PlayedImage, key: RSAPrivateKey, autojump_clock: object
) -> None:
    async with trio.open_nursery() as nursery:
        with ultravisor_rig(nursery, key) as rig:
            rig.load(image)
            rig.kvm.lies[h.H_SVM_INIT_START.number] = silence

            await expect_refusal(rig, image, "hypervisor: alpha/kvm did not answer H_SVM_INIT_START within 15 s")

            asked = [cookie for number, cookie, _ in rig.kvm.frames if number == h.H_SVM_INIT_START.number]
            assert len(asked) == 3
            assert len(set(asked)) == 1


# -- a host that changes its mind between measurement and start ------------------------------------------------------


def _while(rig: UltravisorRig, number: int, act: Callable[[], Awaitable[object]]) -> trio.Event:
    """Have kvm do `act` while it serves the first hypercall `number`, and obey all the same; set when it has."""
    done = trio.Event()

    async def serve(args: Registers) -> Registers | None:
        del rig.kvm.lies[number]
        await act()
        result = await rig.kvm.obey(number)(args)
        done.set()
        return result

    rig.kvm.lies[number] = serve
    return done


async def test_a_measured_page_cannot_be_replaced_before_the_start(rig: UltravisorRig, image: PlayedImage) -> None:
    rig.load(image)
    codes: list[int] = []

    async def replace_the_kernel() -> None:
        codes.append(await rig.kvm.page_out(KERNEL_GFN))
        rig.write(KERNEL_GFN, b"evil" * (PAGE_BYTES // 4))
        codes.append(await rig.kvm.page_in(KERNEL_GFN))

    _while(rig, h.H_SVM_INIT_DONE.number, replace_the_kernel)

    assert await rig.esm(image) == UCode.U_SUCCESS

    assert codes == [UCode.U_RETRY, UCode.U_P2]
    assert bytes(rig.page(KERNEL_GFN)) == KERNEL.ljust(PAGE_BYTES, b"\0")


async def test_bytes_beside_a_measured_part_cannot_be_smuggled_in(rig: UltravisorRig, image: PlayedImage) -> None:
    rig.load(image)
    _while(rig, h.H_SVM_INIT_DONE.number, lambda: rig.kvm.page_out(RTAS_GFN))

    assert await rig.esm(image) == UCode.U_SUCCESS

    assert bytes(rig.page(RTAS_GFN)) == RTAS_TEXT.ljust(PAGE_BYTES, b"\0")


async def test_a_page_that_nobody_asked_for_is_zero_in_the_secure_vm(rig: UltravisorRig, image: PlayedImage) -> None:
    rig.load(image)
    _while(rig, h.H_SVM_INIT_DONE.number, lambda: rig.kvm.page_in(FREE_GFN))

    assert await rig.esm(image) == UCode.U_SUCCESS

    assert not any(rig.page(FREE_GFN))


async def test_a_page_in_after_the_start_is_refused(rig: UltravisorRig, image: PlayedImage) -> None:
    await rig.secure(image)
    rig.write(FREE_GFN, b"x" * PAGE_BYTES)

    assert await rig.kvm.page_in(FREE_GFN) == UCode.U_P2
    assert not any(rig.page(FREE_GFN))


async def test_the_hypervisor_may_end_a_switch_at_any_step(rig: UltravisorRig, image: PlayedImage) -> None:
    for number in (h.H_SVM_INIT_START.number, h.H_SVM_PAGE_IN.number, h.H_SVM_INIT_DONE.number):
        rig.load(image)
        terminated = _while(rig, number, rig.kvm.terminate)

        assert await rig.esm(image) == UCode.U_STATE
        await terminated.wait()

        assert rig.partition.svm is None
        assert rig.account.used_bytes == 0
        assert rig.partition.last_esm is not None
        assert rig.partition.last_esm.reason == "the VM was ended before the switch was complete"
    await rig.secure(image)


async def test_a_guest_that_does_not_start_ends_the_secure_vm(rig: UltravisorRig, image: PlayedImage) -> None:
    rig.load(image)
    rig.guest.codes[SVM_START.number] = HCode.H_NO_MEM

    assert await rig.esm(image) == UCode.U_STATE

    assert rig.notices == [("vm-failed", "vm1", f"guest-did-not-start: code {int(HCode.H_NO_MEM)}")]
    assert rig.account.used_bytes == 0


async def test_a_guest_that_never_takes_its_memory_does_not_hold_up_the_ultravisor(
    rig: UltravisorRig, image: PlayedImage
) -> None:
    """S7."""
    await rig.secure(image)
    svm = rig.partition.svm
    assert svm is not None

    with pytest.raises(BlockingIOError):
        for _ in range(100_000):
            rig.partition.hand_over_memory(svm)


async def test_a_hypervisor_that_dropped_the_pages_before_an_abort_ends_the_vm_by_name(
    rig: UltravisorRig, image: PlayedImage
) -> None:
    rig.load(image)
    rig.kvm.lies[h.H_SVM_INIT_DONE.number] = answering(HCode.H_PARAMETER)
    rig.kvm.lies[h.H_SVM_INIT_ABORT.number] = answering(HCode.H_STATE)

    await rig.esm(image)

    assert rig.partition.svm is None
    assert rig.partition.failure == "hypervisor-refused-abort"
    assert ("vm-failed", rig.partition.name, "hypervisor-refused-abort") in rig.notices
