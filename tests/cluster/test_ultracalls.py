"""Every ultracall through real processes: what it does to a page, for the guest, for the ultravisor and for kvm."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from protocol import hcalls as h
from protocol import ucalls as u
from protocol.codes import HCode, UCode
from protocol.declare import Caller
from protocol.geometry import PAGE_BYTES, gpa_of
from protocol.unhandled import UNHANDLED
from services.testing.host import PlayedVm, RealHost
from services.testing.image import FDT_GFN, FIRST_FREE_GFN, KERNEL_GFN, PlayedImage, make_image
from services.ultravisor.identity import MACHINE_KEY, ensure_keys
from tests.cluster.svm_rig import Rig, svm_rig

ZERO_SUM = f"ok {hashlib.sha256(bytes(PAGE_BYTES)).hexdigest()}"
PLAYED_BYTES = 4 << 20


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with svm_rig(tmp_path) as running:
        yield running


def sum_of(byte: int) -> str:
    return f"ok {hashlib.sha256(bytes([byte]) * PAGE_BYTES).hexdigest()}"


# -- share and unshare ------------------------------------------------------------------------------------------------


async def test_a_page_is_zero_when_it_is_shared_and_zero_when_it_is_taken_back(rig: Rig) -> None:
    gfn = await rig.free_gfn()
    await rig.ask(f"fill {gfn} 0xaa")
    ram = rig.ram()

    assert await rig.ask(f"share {gfn}") == "ok"

    assert await rig.page_state(gfn) == ("SHARED", "SHARED")
    assert await rig.ask(f"sum {gfn}") == ZERO_SUM
    await rig.ask(f"fill {gfn} 0xbb")
    assert ram[gpa_of(gfn) : gpa_of(gfn) + 4] == b"\xbb" * 4
    ram[gpa_of(gfn)] = 0x11
    assert await rig.ask(f"touch {gfn}") == "ok 0x11"

    assert await rig.ask(f"unshare {gfn}") == "ok"

    assert await rig.page_state(gfn) == ("SECURE", "SECURE")
    assert await rig.ask(f"sum {gfn}") == ZERO_SUM
    assert not any(ram[gpa_of(gfn) : gpa_of(gfn) + PAGE_BYTES])


async def test_a_page_already_in_the_asked_state_keeps_its_content(rig: Rig) -> None:
    gfn = await rig.free_gfn()
    await rig.ask(f"fill {gfn} 0xaa")

    assert await rig.ask(f"unshare {gfn}") == "ok"
    assert await rig.ask(f"sum {gfn}") == sum_of(0xAA)

    await rig.ask(f"share {gfn}")
    await rig.ask(f"fill {gfn} 0xbb")
    assert await rig.ask(f"share {gfn}") == "ok"
    assert await rig.ask(f"sum {gfn}") == sum_of(0xBB)


async def test_a_range_outside_the_vm_and_a_bounce_page_are_refused(rig: Rig) -> None:
    bounce = [gfn for gfn in range(1024 - 64, 1024) if (await rig.page_state(gfn))[0] == "SHARED_IMPLICIT"]

    assert await rig.ask("share 1024") == "error U_P2"
    assert await rig.ask("share 1000 0") == "error U_P3"
    assert await rig.ask("share 1000 5000") == "error U_P3"
    assert await rig.ask(f"unshare {bounce[0]}") == "error U_P2"
    assert len(bounce) == 5


async def test_shares_are_in_the_audit_log(rig: Rig) -> None:
    gfn = await rig.free_gfn()

    await rig.ask(f"share {gfn}")
    await rig.ask(f"unshare {gfn}")

    assert rig.audit("share")[-1].facts == {"gfn": gfn, "n_pages": 1, "code": 0}
    assert rig.audit("unshare")[-1].facts == {"gfn": gfn, "n_pages": 1, "code": 0}


# -- page out and in --------------------------------------------------------------------------------------------------


async def test_a_page_that_is_out_is_an_image_and_comes_back_at_the_guests_touch(rig: Rig) -> None:
    gfn = await rig.free_gfn()
    await rig.ask(f"fill {gfn} 0xc3")
    used = await rig.account()

    assert await rig.move("out", gfn) == {"H_SUCCESS": 1}

    assert await rig.page_state(gfn) == ("PAGED_OUT", "PAGED_OUT")
    image = rig.ram()[gpa_of(gfn) : gpa_of(gfn) + PAGE_BYTES]
    assert image.count(0xC3) < 1000
    assert await rig.account() == used
    assert await rig.ask(f"sum {gfn}") == sum_of(0xC3)
    assert await rig.page_state(gfn) == ("SECURE", "SECURE")
    assert not any(rig.ram()[gpa_of(gfn) : gpa_of(gfn) + PAGE_BYTES])


async def test_kvm_may_bring_an_image_back_unasked(rig: Rig) -> None:
    gfn = await rig.free_gfn()
    await rig.ask(f"fill {gfn} 0xc3")
    await rig.move("out", gfn)

    assert await rig.move("in", gfn) == {"H_SUCCESS": 1}

    assert await rig.page_state(gfn) == ("SECURE", "SECURE")
    assert await rig.ask(f"sum {gfn}") == sum_of(0xC3)


async def test_two_pages_of_equal_content_have_different_images_and_so_has_one_page_twice(rig: Rig) -> None:
    gfn = await rig.free_gfn() - 1
    for page in (gfn, gfn + 1):
        await rig.ask(f"fill {page} 0xc3")
    ram, seen = rig.ram(), set()

    for _ in range(2):
        assert await rig.move("out", gfn, 2) == {"H_SUCCESS": 2}
        seen |= {ram[gpa_of(page) : gpa_of(page) + PAGE_BYTES] for page in (gfn, gfn + 1)}
        assert await rig.move("in", gfn, 2) == {"H_SUCCESS": 2}

    assert len(seen) == 4


async def expect_page_integrity(rig: Rig, gfn: int) -> None:
    """The guest touches a page whose image was forged: three tries, then the VM ends with that reason."""
    await rig.vm.console_write(f"sum {gfn}\r".encode())

    row = await rig.vm.wait_state("failed")

    assert "page-integrity" in row.reason
    assert not row.secure
    assert len(rig.audit("page-refused")) == 3
    assert [line.facts["reason"] for line in rig.audit("svm-failed")] == ["page-integrity"]
    assert await rig.account() == 0


async def test_an_altered_image_ends_the_vm(rig: Rig) -> None:
    gfn = await rig.free_gfn()
    await rig.ask(f"fill {gfn} 0xc3")
    await rig.move("out", gfn)
    rig.ram()[gpa_of(gfn) + 12345] ^= 1

    await expect_page_integrity(rig, gfn)


async def test_an_older_image_of_the_same_page_ends_the_vm(rig: Rig) -> None:
    gfn, ram = await rig.free_gfn(), rig.ram()
    frame = slice(gpa_of(gfn), gpa_of(gfn) + PAGE_BYTES)
    await rig.ask(f"fill {gfn} 1")
    await rig.move("out", gfn)
    old = ram[frame]
    await rig.ask(f"fill {gfn} 2")
    await rig.move("out", gfn)
    ram[frame] = old

    await expect_page_integrity(rig, gfn)


async def test_two_images_that_were_swapped_end_the_vm(rig: Rig) -> None:
    gfn, ram = await rig.free_gfn() - 1, rig.ram()
    first, second = (slice(gpa_of(page), gpa_of(page) + PAGE_BYTES) for page in (gfn, gfn + 1))
    await rig.ask(f"fill {gfn} 7")
    await rig.ask(f"fill {gfn + 1} 7")
    await rig.move("out", gfn, 2)
    ram[first], ram[second] = ram[second], ram[first]

    await expect_page_integrity(rig, gfn)


async def test_an_image_that_is_repaired_before_the_third_try_is_taken(rig: Rig) -> None:
    gfn, ram = await rig.free_gfn(), rig.ram()
    await rig.ask(f"fill {gfn} 0xc3")
    await rig.move("out", gfn)
    ram[gpa_of(gfn)] ^= 1
    for _ in range(2):
        assert await rig.move("in", gfn) == {"H_PARAMETER": 1}

    ram[gpa_of(gfn)] ^= 1

    assert await rig.ask(f"sum {gfn}") == sum_of(0xC3)
    assert (await rig.vm.row()).secure


# -- files of the blob ------------------------------------------------------------------------------------------------


async def test_a_file_of_the_blob_is_read_once(rig: Rig) -> None:
    content = b"root /dev/vda3 vm1\n"

    assert await rig.ask("file crypttab") == f"ok {len(content)} {hashlib.sha256(content).hexdigest()}"

    assert await rig.ask("file crypttab") == "error U_PARAMETER"
    assert await rig.ask("file nosuchfile") == "error U_PARAMETER"


async def test_a_file_that_one_process_began_is_refused_to_another(rig: Rig) -> None:
    nothing = hashlib.sha256(b"").hexdigest()
    assert await rig.ask("pid 7") == "ok"
    assert await rig.ask("file crypttab 19") == f"ok 0 {nothing}"

    assert await rig.ask("pid 8") == "ok"
    assert await rig.ask("file crypttab 19") == "error U_PARAMETER"
    assert await rig.ask(f"pid {1 << 20}") == "error a process is 0 to 1048575"

    assert await rig.ask("pid 7") == "ok"
    assert await rig.ask("file crypttab 19") == f"ok 0 {nothing}"


# -- calls that no kernel makes, by a played guest --------------------------------------------------------------------


async def played(host: RealHost, tmp_path: Path) -> tuple[PlayedVm, PlayedImage]:
    """A VM with an image loaded, running as a normal one."""
    image = make_image(ensure_keys(tmp_path, "alpha")[MACHINE_KEY], b"kernel", PLAYED_BYTES, {})
    vm = await host.add_vm("vm1", memory_bytes=PLAYED_BYTES)
    assert await vm.qemu.power_on(image) == HCode.H_SUCCESS
    return vm, image


async def test_the_addresses_of_esm_are_checked_before_anything_happens(host: RealHost, tmp_path: Path) -> None:
    vm, _ = await played(host, tmp_path)
    kbase, fdt = gpa_of(KERNEL_GFN), gpa_of(FDT_GFN)

    pairs = ((0, fdt), (1 << 60, fdt), (kbase, 0), (kbase, (1 << 64) - 1))
    codes = [(await vm.guest.call(u.UV_ESM, *pair))[0] for pair in pairs]

    assert codes == [UCode.U_P2, UCode.U_P2, UCode.U_P3, UCode.U_P3]
    assert (await host.ultravisor.query("account"))["used_bytes"] == 0


async def test_a_device_tree_that_is_none_is_refused(host: RealHost, tmp_path: Path) -> None:
    vm, _ = await played(host, tmp_path)
    before = vm.raw()

    assert (await vm.guest.call(u.UV_ESM, gpa_of(KERNEL_GFN), gpa_of(FIRST_FREE_GFN + 2)))[0] == UCode.U_PARAMETER

    assert vm.raw() == before
    status = await host.ultravisor.query("vm.status", vm="vm1")
    assert status["last_esm"]["reason"].startswith("device tree: ")


async def test_every_call_that_nobody_handles_is_answered_so(host: RealHost, tmp_path: Path) -> None:
    vm, image = await played(host, tmp_path)
    hcalls = [call for call in h.HCALLS if call.name in UNHANDLED]
    firmware = [call for call in u.UCALLS if call.callers == {Caller.FIRMWARE}]

    normal = {(await vm.guest.call(call, *[0] * call.n_args))[0] for call in hcalls}
    ucalls = {(await vm.guest.call(call, *[0] * call.n_args))[0] for call in firmware}
    assert await vm.guest.esm(image) == UCode.U_SUCCESS
    secure = {(await vm.guest.call(call, *[0] * call.n_args))[0] for call in hcalls}

    assert normal == secure == {HCode.H_FUNCTION}
    assert ucalls == {UCode.U_FUNCTION}
    assert len(hcalls) > 100


async def test_a_guest_may_issue_neither_the_hypervisors_nor_the_ultravisors_calls(
    host: RealHost, tmp_path: Path
) -> None:
    vm, image = await played(host, tmp_path)
    of_kvm = [call for call in u.UCALLS if call.callers == {Caller.HYPERVISOR}]
    of_ultravisor = [call for call in h.HCALLS if call.callers == {Caller.ULTRAVISOR}]
    of_svm = [call for call in u.UCALLS if call.callers == {Caller.SVM}]

    as_normal = {(await vm.guest.call(call, *[1] * call.n_args))[0] for call in (*of_kvm, *of_svm)}
    assert await vm.guest.esm(image) == UCode.U_SUCCESS
    as_secure = {(await vm.guest.call(call, *[1] * call.n_args))[0] for call in of_kvm}
    own = {(await vm.guest.call(call, *[1] * call.n_args))[0] for call in of_ultravisor}

    assert as_normal == as_secure == {UCode.U_PERMISSION}
    assert own == {HCode.H_FUNCTION}
    assert (await host.ultravisor.query("vm.status", vm="vm1"))["secure"]


async def test_unshare_all_takes_back_what_the_guest_shared_and_nothing_else(host: RealHost, tmp_path: Path) -> None:
    vm, image = await played(host, tmp_path)
    assert await vm.guest.esm(image) == UCode.U_SUCCESS
    before = (await host.ultravisor.query("vm.status", vm="vm1"))["pages"]
    assert await vm.guest.share(FIRST_FREE_GFN, 7) == UCode.U_SUCCESS
    vm.guest.store(FIRST_FREE_GFN, b"published")

    assert await vm.guest.unshare_all() == UCode.U_SUCCESS

    assert (await host.ultravisor.query("vm.status", vm="vm1"))["pages"] == before
    assert not any(vm.raw_page(FIRST_FREE_GFN))
    await vm.guest.touch(FIRST_FREE_GFN)
    assert not any(vm.guest.load(FIRST_FREE_GFN))
