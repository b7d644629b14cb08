"""The life of a secure VM's pages between real ultravisor and kvm processes, with guest and qemu played."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path

import pytest
import trio

from protocol.codes import HCode, UCode
from protocol.geometry import PAGE_BYTES, gpa_of
from protocol.hcalls import H_CEDE, H_RANDOM
from protocol.ucalls import UV_ESMB_GET_FILE
from services.testing.host import PlayedVm, RealHost, real_host
from services.testing.image import KERNEL_GFN, PlayedImage, make_image
from services.testing.watch import Forgery, Page, WatchedVm
from services.ultravisor.esm_files import pack_name
from services.ultravisor.identity import ensure_keys
from shared.host_view import HostState

MEMORY_BYTES = 4 << 20
KERNEL = bytes(range(1, 256)) * 500
PAGES = range(12, 48)
GFN, OTHER = 14, 20
_LIVES = 8


@cache
def keys_and_image() -> tuple[dict[str, str], PlayedImage]:
    with tempfile.TemporaryDirectory() as path:
        identity = ensure_keys(Path(path), "alpha")
    return identity, make_image(identity["machine-key"], KERNEL, MEMORY_BYTES, {"crypttab": b"the disk's key"})


@asynccontextmanager
async def host_and_image(secure_memory_bytes: int = 64 << 20) -> AsyncIterator[tuple[RealHost, PlayedImage]]:
    identity, image = keys_and_image()
    with tempfile.TemporaryDirectory(prefix="pb-") as path:
        async with real_host(Path(path), identity, secure_memory_bytes=secure_memory_bytes) as host:
            yield host, image
            assert not host.calls.still_open()
            for process in (host.ultravisor, host.kvm):
                assert process.alive
                assert '"event": "internal error"' not in host.log_text(process)


@asynccontextmanager
async def secure_vm() -> AsyncIterator[WatchedVm]:
    async with host_and_image() as (host, image):
        watched = WatchedVm(host, await host.add_vm("vm1", memory_bytes=MEMORY_BYTES), image, PAGES, seed=1)
        await watched.boot()
        await watched.turn_secure()
        yield watched


async def used_bytes(host: RealHost) -> int:
    used: int = (await host.ultravisor.query("account"))["used_bytes"]
    return used


async def failure(host: RealHost) -> str | None:
    reason: str | None = (await host.ultravisor.query("vm.status", vm="vm1"))["failure"]
    return reason


# -- turning secure ---------------------------------------------------------------------------------------------------


async def test_a_vm_turns_secure_and_the_host_keeps_nothing() -> None:
    async with secure_vm() as it:
        raw = it.check_s1()

        assert it.vm.guest.pc == it.image.kbase
        assert KERNEL not in raw
        assert it.vm.guest.load(KERNEL_GFN) == KERNEL[:PAGE_BYTES]
        it.check_s2(raw)
        assert await used_bytes(it.host) == MEMORY_BYTES


@pytest.mark.parametrize("part", range(4), ids=["RTAS", "kernel", "initrd", "device tree"])
async def test_a_changed_image_is_refused_and_the_vm_runs_on_with_its_memory(part: int) -> None:
    async with host_and_image() as (host, image):
        vm = await host.add_vm("vm1", memory_bytes=MEMORY_BYTES)
        changed = image.with_byte_changed(sorted(image.parts)[part])
        await vm.qemu.power_on(changed)
        await vm.qemu.write(gpa_of(GFN), b"of the normal VM")
        before = vm.raw()

        assert await vm.guest.esm(changed) == UCode.U_PARAMETER

        assert vm.raw() == before
        assert not vm.guest.secure
        assert await used_bytes(host) == 0
        assert all(vm.qemu.view(gfn) is HostState.PRESENT for gfn in range(vm.n_pages))
        await vm.guest.touch(GFN)
        assert vm.guest.load(GFN).startswith(b"of the normal VM")


async def test_a_repaired_image_is_taken_after_a_refused_one() -> None:
    async with host_and_image() as (host, image):
        vm = await host.add_vm("vm1", memory_bytes=MEMORY_BYTES)
        changed = image.with_byte_changed(image.kbase)
        await vm.qemu.power_on(changed)
        assert await vm.guest.esm(changed) == UCode.U_PARAMETER
        await vm.qemu.write(image.kbase, image.kernel)

        assert await vm.guest.esm(image) == UCode.U_SUCCESS


async def test_secure_memory_that_is_taken_is_refused_until_it_is_given_back() -> None:
    async with host_and_image(secure_memory_bytes=MEMORY_BYTES) as (host, image):
        first = await host.add_vm("vm1", memory_bytes=MEMORY_BYTES)
        second = await host.add_vm("vm2", memory_bytes=MEMORY_BYTES, lpid=2)
        for vm in (first, second):
            await vm.qemu.power_on(image)
        assert await first.guest.esm(image) == UCode.U_SUCCESS

        assert await second.guest.esm(image) == UCode.U_PARAMETER
        assert await first.qemu.reset() == HCode.H_SUCCESS
        assert await second.guest.esm(image) == UCode.U_SUCCESS


async def test_a_vm_that_may_not_turn_secure_is_refused() -> None:
    async with host_and_image() as (host, image):
        vm = await host.add_vm("vm1", memory_bytes=MEMORY_BYTES, secure_allowed=False)
        await vm.qemu.power_on(image)

        assert await vm.guest.esm(image) == UCode.U_PARAMETER
        assert not vm.guest.secure


async def test_the_files_of_the_blob_are_the_secure_vms_alone() -> None:
    async with host_and_image() as (host, image):
        vm = await host.add_vm("vm1", memory_bytes=MEMORY_BYTES)
        await vm.qemu.power_on(image)
        name = pack_name("crypttab")
        assert (await vm.guest.call(UV_ESMB_GET_FILE, 0, *name))[0] == UCode.U_PERMISSION
        await vm.guest.esm(image)

        vm.guest.pidr = 7
        count, *data = await vm.guest.call(UV_ESMB_GET_FILE, 0, *name)

        assert b"".join(word.to_bytes(8, "big") for word in data)[:count] == b"the disk's key"
        assert (await vm.guest.call(UV_ESMB_GET_FILE, 0, *name))[0] == UCode.U_PARAMETER
        vm.guest.pidr = 8
        assert (await vm.guest.call(UV_ESMB_GET_FILE, count, *name))[0] == UCode.U_PARAMETER
        vm.guest.pidr = 7
        assert (await vm.guest.call(UV_ESMB_GET_FILE, count, *name))[0] == 0


# -- pages ------------------------------------------------------------------------------------------------------------


async def test_the_host_finds_ciphertext_and_the_guest_its_bytes() -> None:
    async with secure_vm() as it:
        secret = it.content[GFN]

        image = await it.vm.qemu.read(GFN)

        assert image != secret
        assert it.vm.qemu.view(GFN) is HostState.PRESENT
        it.check_s2(it.check_s1())
        await it.check_content(GFN)
        assert it.vm.qemu.view(GFN) is HostState.ABSENT
        assert it.vm.raw_page(GFN) == bytes(PAGE_BYTES)


async def test_two_pages_of_equal_content_have_different_images() -> None:
    async with secure_vm() as it:
        for gfn in (GFN, OTHER):
            it.vm.guest.store(gfn, b"e" * PAGE_BYTES)

        assert await it.vm.qemu.read(GFN) != await it.vm.qemu.read(OTHER)


@pytest.mark.parametrize("how", list(Forgery), ids=lambda how: how.value)
async def test_a_forged_image_is_refused_and_the_good_one_is_taken(how: Forgery) -> None:
    async with secure_vm() as it:
        await it.page_out(GFN)
        if how is Forgery.EARLIER_LIFE:
            assert await it.vm.qemu.reset() == HCode.H_SUCCESS
            it.ended()
            await it.boot()
            await it.turn_secure()

        await it.check_s3(GFN, OTHER, how)

        assert it.forgeries_refused == 1


async def test_a_host_that_keeps_forging_loses_the_vm_and_not_the_ultravisor() -> None:
    async with secure_vm() as it:
        await it.page_out(GFN)
        it.vm.forge(GFN, os.urandom(PAGE_BYTES))

        codes = [await it.vm.guest.fault(GFN) for _ in range(3)]

        assert codes == [HCode.H_BUSY, HCode.H_BUSY, UCode.U_STATE]
        assert await failure(it.host) == "page-integrity"
        assert [(notice.what, notice.detail) for notice in it.host.ultravisor.notices] == [
            ("vm-failed", "page-integrity")
        ]
        assert not it.vm.guest.secure
        assert await used_bytes(it.host) == 0


async def test_shared_pages_are_zero_and_seen_by_both_and_private_again_afterwards() -> None:
    async with secure_vm() as it:
        assert await it.vm.guest.share(GFN, 3) == UCode.U_SUCCESS
        for gfn in range(GFN, GFN + 3):
            it.now_shared(gfn)
            it.check_newly_shared(gfn)
        it.check_s2(it.check_s1())

        assert await it.vm.guest.unshare_all() == UCode.U_SUCCESS
        for gfn in range(GFN, GFN + 3):
            it.now_private(gfn)
            await it.check_content(gfn)
        it.check_s2(it.check_s1())


async def test_a_frame_that_the_guest_does_not_let_go_is_kept() -> None:
    async with secure_vm() as it:
        await it.bring_to(GFN, Page.SHARED)
        it.vm.guest.store(GFN, b"of the guest")
        it.vm.guest.acknowledges = False

        answer = await it.host.kvm.query("page.reclaim", vm="vm1", gpa=gpa_of(GFN), n=1)

        assert answer["codes"] == {"H_BUSY": 1}
        assert it.vm.raw_page(GFN).startswith(b"of the guest")
        it.vm.guest.acknowledges = True
        await it.vm.guest.touch(GFN)
        assert it.vm.guest.load(GFN).startswith(b"of the guest")


@pytest.mark.parametrize("other", ["fault", "share", "unshare", "unshare all", "host touch", "reclaim", "reset"])
async def test_taking_a_shared_frame_away_waits_for_no_other_call_on_the_page(other: str) -> None:
    async with secure_vm() as it:
        for round_ in range(12):
            if not it.vm.guest.secure:
                it.ended()
                await it.boot()
                await it.turn_secure()
            await it.bring_to(GFN, Page.SHARED)
            results: dict[str, int | str] = {}
            with trio.fail_after(3):
                async with trio.open_nursery() as nursery:
                    for call in ("reclaim", other) if round_ % 2 else (other, "reclaim"):
                        nursery.start_soon(note, results, call, it)
            assert results["reclaim"] in ("H_SUCCESS", "H_BUSY", "H_PARAMETER", "H_UNSUPPORTED")
            assert other == "reclaim" or results[other] in (0, HCode.H_BUSY, UCode.U_RETRY, UCode.U_STATE)
            it.check_s1()
            if it.vm.guest.secure:
                await settle(it, private=other.startswith("unshare") and results[other] == UCode.U_SUCCESS)
        assert await failure(it.host) is None
        assert {name for name, seconds in it.host.calls.longest_s.items() if seconds > 1} <= {"UV_ESM"}


async def note(results: dict[str, int | str], call: str, it: WatchedVm) -> None:
    guest, qemu = it.vm.guest, it.vm.qemu
    if call == "reclaim":
        codes = (await it.host.kvm.query("page.reclaim", vm="vm1", gpa=gpa_of(GFN), n=1))["codes"]
        results[call] = str(*codes)
    elif call == "fault":
        results[call] = await guest.fault(GFN)
    elif call == "share":
        results[call] = await guest.share(GFN)
    elif call == "unshare":
        results[call] = await guest.unshare(GFN)
    elif call == "unshare all":
        results[call] = await guest.unshare_all()
    else:
        results[call] = await (qemu.want([GFN]) if call == "host touch" else qemu.reset())


async def settle(it: WatchedVm, *, private: bool) -> None:
    """The page is what the calls say, and works."""
    if private:
        it.now_private(GFN)
        await it.check_content(GFN)
    else:
        await it.vm.guest.touch(GFN)
        it.vm.guest.store(GFN, b"of the guest")
        assert it.vm.raw_page(GFN).startswith(b"of the guest")
    it.check_s2(it.check_s1())


async def test_pages_that_leave_together_cost_the_guest_few_invalidations() -> None:
    async with secure_vm() as it:
        it.vm.guest.invalidations.clear()

        answer = await it.host.kvm.query("page.out", vm="vm1", gpa=gpa_of(PAGES.start), n=len(PAGES))

        assert answer["codes"] == {"H_SUCCESS": len(PAGES)}
        assert sum(it.vm.guest.invalidations) == len(PAGES)
        assert len(it.vm.guest.invalidations) <= 4
        for gfn in PAGES:
            await it.check_content(gfn)


async def test_a_guest_that_does_not_acknowledge_keeps_its_page() -> None:
    async with secure_vm() as it:
        it.vm.guest.acknowledges = False

        answer = await it.host.kvm.query("page.out", vm="vm1", gpa=gpa_of(GFN), n=1)

        assert answer["codes"] == {"H_BUSY": 1}
        assert it.vm.raw_page(GFN) == bytes(PAGE_BYTES)
        it.vm.guest.acknowledges = True
        await it.check_content(GFN)


# -- the end of a life ------------------------------------------------------------------------------------------------


async def test_a_reset_vm_turns_secure_again_and_again() -> None:
    async with secure_vm() as it:
        for _ in range(3):
            await it.bring_to(GFN, Page.SHARED)
            await it.bring_to(OTHER, Page.OUT)
            assert await it.vm.qemu.reset() == HCode.H_SUCCESS
            assert await used_bytes(it.host) == 0
            it.check_s1()
            it.ended()
            await it.boot()
            await it.turn_secure()

        assert await failure(it.host) is None


async def test_a_reset_with_many_invalidations_on_their_way_leaves_none_behind() -> None:
    async with secure_vm() as it:
        it.vm.guest.acknowledges = False
        async with trio.open_nursery() as nursery:
            for gfn in PAGES:
                nursery.start_soon(it.vm.guest.share, gfn)
            await it.vm.qemu.reset()
        it.vm.guest.acknowledges = True
        it.ended()
        await it.boot()
        await it.turn_secure()

        with trio.fail_after(1):
            await it.page_out(GFN)


async def test_a_hypercall_that_is_open_without_limit_ends_with_the_vm() -> None:
    async with secure_vm() as it:
        ceded: list[int] = []

        async def cede() -> None:
            ceded.extend(await it.vm.guest.call(H_CEDE))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cede)
            # An answered call says that the one before it has been passed on.
            assert (await it.vm.guest.call(H_RANDOM))[0] == HCode.H_SUCCESS
            await it.vm.qemu.reset()

        assert ceded == [HCode.H_STATE]


async def test_a_vm_is_destroyed_and_its_next_incarnation_is_another_vm() -> None:
    async with host_and_image() as (host, image):
        for _ in range(3):
            vm = await host.add_vm("vm1", memory_bytes=MEMORY_BYTES)
            assert await _lives(vm, image) == UCode.U_SUCCESS
            await host.destroy_vm("vm1")
            assert not vm.guest.secure
            await host.forget_vm("vm1")
            assert await used_bytes(host) == 0


async def test_a_vm_whose_guest_was_killed_gives_everything_back() -> None:
    async with host_and_image() as (host, image):
        open_before: list[int] = []
        for life in range(_LIVES):
            vm = await host.add_vm("vm1", memory_bytes=MEMORY_BYTES)
            assert await _lives(vm, image) == UCode.U_SUCCESS
            await host.kill_vm("vm1")
            assert await used_bytes(host) == 0
            if life == 0:
                open_before = _n_descriptors(host)

        # ZeroMQ closes its sockets a little later, so the counts need not be equal.
        grown = [after - before for before, after in zip(open_before, _n_descriptors(host), strict=True)]
        assert max(grown) < _LIVES - 1


def _n_descriptors(host: RealHost) -> list[int]:
    return [len(os.listdir(f"/proc/{process.pid}/fd")) for process in (host.ultravisor, host.kvm)]


async def _lives(vm: PlayedVm, image: PlayedImage) -> int:
    await vm.qemu.power_on(image)
    return await vm.guest.esm(image)
