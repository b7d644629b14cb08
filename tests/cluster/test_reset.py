"""A reset of a secure VM ends it in the ultravisor; the machine boots as a normal VM and turns secure again."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import trio

from protocol import hcalls as h
from protocol.codes import HCode, UCode
from protocol.geometry import PAGE_BYTES, gpa_of
from services.testing.guest import NotMapped
from services.testing.host import PlayedVm, RealHost
from services.testing.image import FIRST_FREE_GFN, PlayedImage, make_image
from services.ultravisor.identity import MACHINE_KEY, ensure_keys
from shared.partition_map import MapKind
from tests.cluster.svm_rig import MEMORY_BYTES, Rig, svm_rig

N_RESETS = 5
N_MONITOR_RESETS = 20
PLAYED_BYTES = 16 << 20
MARK = b"a secret of the guest before its reset."


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with svm_rig(tmp_path) as running:
        yield running


async def expect_secure_again(rig: Rig, since: int, n_ended: int) -> None:
    """The new start was a normal one that turned secure, the old VM ended once, one VM's memory is charged."""
    text = await rig.booted(since)

    assert text.index("pefbox: boot stage, 64 MiB") < text.index("pefbox: kernel prompt secure=1")
    assert (await rig.vm.row()).secure
    assert len(rig.audit("svm-terminated")) == n_ended
    assert len(rig.audit("esm")) == n_ended + 1
    assert await rig.account() == MEMORY_BYTES


async def test_resets_by_the_monitor_end_the_secure_vm_and_it_turns_secure_again(rig: Rig) -> None:
    for n_done in range(N_MONITOR_RESETS):
        await expect_secure_again(rig, await rig.reset(), n_done + 1)


async def test_a_reboot_of_the_guest_does_the_same(rig: Rig) -> None:
    for n_done in range(N_RESETS):
        since = await rig.console_end()
        await rig.vm.console_write(b"reboot\r")
        await expect_secure_again(rig, since, n_done + 1)


async def test_nothing_of_the_old_secure_vm_is_left_to_the_new_one_or_the_host(rig: Rig) -> None:
    gfn = await rig.free_gfn()
    await rig.ask(f"fill {gfn} 0xd7")

    await rig.booted(await rig.reset())

    assert await rig.ask(f"sum {gfn}") == f"ok {hashlib.sha256(bytes(PAGE_BYTES)).hexdigest()}"
    ram = rig.ram()
    assert not any(ram[gpa_of(gfn) : gpa_of(gfn) + PAGE_BYTES])


async def test_a_page_that_was_out_or_shared_is_an_ordinary_page_after_the_reset(rig: Rig) -> None:
    gfn = await rig.free_gfn() - 1
    await rig.ask(f"share {gfn}")
    await rig.ask(f"fill {gfn + 1} 0xd7")
    await rig.move("out", gfn + 1)

    await rig.booted(await rig.reset())

    assert [await rig.page_state(page) for page in (gfn, gfn + 1)] == [("SECURE", "SECURE")] * 2
    assert await rig.ask(f"sum {gfn + 1}") == f"ok {hashlib.sha256(bytes(PAGE_BYTES)).hexdigest()}"


async def test_power_off_gives_the_secure_memory_back(rig: Rig) -> None:
    await rig.vm.console_write(b"poweroff\r")

    await rig.vm.wait_state("off")

    assert await rig.account() == 0
    assert not (await rig.vm.row()).secure
    assert len(rig.audit("svm-terminated")) == 1


# -- a reset in the middle of something, with a played guest and qemu -------------------------------------------------


async def played(host: RealHost, tmp_path: Path) -> tuple[PlayedVm, PlayedImage]:
    """A VM with an image loaded, running as a normal one."""
    image = make_image(ensure_keys(tmp_path, "alpha")[MACHINE_KEY], b"kernel" * 20_000, PLAYED_BYTES, {})
    vm = await host.add_vm("vm1", memory_bytes=PLAYED_BYTES)
    assert await vm.qemu.power_on(image) == HCode.H_SUCCESS
    return vm, image


async def used_bytes(host: RealHost) -> int:
    return int((await host.ultravisor.query("account"))["used_bytes"])


async def starts_anew(host: RealHost, vm: PlayedVm, image: PlayedImage) -> None:
    """After a reset nothing is charged, and the machine loads, starts and turns secure as the first time."""
    assert await used_bytes(host) == 0
    assert await vm.qemu.power_on(image) == HCode.H_SUCCESS
    assert await vm.guest.esm(image) == UCode.U_SUCCESS
    assert await used_bytes(host) == PLAYED_BYTES
    assert vm.guest.load(image.kbase // PAGE_BYTES).startswith(b"kernel")


async def reset_during(host: RealHost, vm: PlayedVm, work: Callable[[], Awaitable[int]], n_queries: int) -> int:
    """Reset the machine while the guest's call is open; what the guest gets for the call.

    Each query is a round trip through the process that is at work on the call, so their number sets the moment.
    """
    codes: list[int] = []

    async def call() -> None:
        codes.append(await work())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(call)
        for _ in range(n_queries):
            await host.ultravisor.query("account")
        assert await vm.qemu.reset() == HCode.H_SUCCESS
    return codes[0]


async def test_a_reset_during_esm_wins_at_every_moment(host: RealHost, tmp_path: Path) -> None:
    vm, image = await played(host, tmp_path)
    codes = []
    for n_queries in range(0, 30, 2):
        codes.append(await reset_during(host, vm, partial(vm.guest.esm, image), n_queries))
        await starts_anew(host, vm, image)
        assert await vm.qemu.reset() == HCode.H_SUCCESS
        assert await vm.qemu.power_on(image) == HCode.H_SUCCESS

    # U_PARAMETER: kvm refused the switch of a machine that it was resetting already.
    assert set(codes) <= {UCode.U_STATE, UCode.U_SUCCESS, UCode.U_PARAMETER}
    assert codes.count(UCode.U_STATE) >= 5


async def test_a_reset_during_a_share_wins_at_every_moment(host: RealHost, tmp_path: Path) -> None:
    vm, image = await played(host, tmp_path)
    codes = []
    for n_queries in (0, 0, 1, 1, 2, 3, 4):
        assert await vm.guest.esm(image) == UCode.U_SUCCESS
        for gfn in range(FIRST_FREE_GFN, FIRST_FREE_GFN + 200):
            vm.guest.store(gfn, MARK)
        codes.append(await reset_during(host, vm, partial(vm.guest.share, FIRST_FREE_GFN, 200), n_queries))
        assert MARK not in vm.raw()
        await starts_anew(host, vm, image)
        assert await vm.qemu.reset() == HCode.H_SUCCESS
        assert await vm.qemu.power_on(image) == HCode.H_SUCCESS

    assert set(codes) <= {UCode.U_STATE, UCode.U_SUCCESS, UCode.U_PERMISSION}
    assert UCode.U_STATE in codes


async def test_a_reset_answers_an_open_cede(host: RealHost, tmp_path: Path) -> None:
    vm, image = await played(host, tmp_path)
    assert await vm.guest.esm(image) == UCode.U_SUCCESS
    codes: list[int] = []

    async def cede() -> None:
        codes.append((await vm.guest.call(h.H_CEDE))[0])

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cede)
            await trio.testing.wait_all_tasks_blocked()
            await host.ultravisor.query("account")
            assert await vm.qemu.reset() == HCode.H_SUCCESS

    assert codes == [HCode.H_STATE]
    await starts_anew(host, vm, image)


# -- kvm's map, which the guest drops while it is secure --------------------------------------------------------------


def maps_held_by_guest(vm: PlayedVm) -> list[MapKind]:
    """Where the guest's map in force sends the first page; empty without a map."""
    try:
        return [vm.guest.kind(FIRST_FREE_GFN)]
    except NotMapped:
        return []


async def test_a_start_waits_for_kvms_map_to_come_back(host: RealHost, tmp_path: Path) -> None:
    vm, image = await played(host, tmp_path)
    assert await vm.guest.esm(image) == UCode.U_SUCCESS
    vm.holds_maps = True
    assert await vm.qemu.reset() == HCode.H_SUCCESS
    assert maps_held_by_guest(vm) == []
    codes: list[int] = []

    async def power_on() -> None:
        codes.append(await vm.qemu.power_on(image))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(power_on)
        while not vm.guest.starts_too_early:
            await host.kvm.query("vm.status", vm="vm1")
        assert codes == []
        assert vm.guest.pc is None
        vm.hand_over_maps()

    assert codes == [HCode.H_SUCCESS]
    assert maps_held_by_guest(vm) == [MapKind.ABSENT]
    assert await vm.guest.esm(image) == UCode.U_SUCCESS


async def test_a_map_that_never_comes_ends_the_start_in_an_error(host: RealHost, tmp_path: Path) -> None:
    vm, image = await played(host, tmp_path)
    assert await vm.guest.esm(image) == UCode.U_SUCCESS
    vm.holds_maps = True
    assert await vm.qemu.reset() == HCode.H_SUCCESS

    assert await vm.qemu.power_on(image) == HCode.H_BUSY

    assert vm.guest.pc is None
    vm.hand_over_maps()
    assert await vm.qemu.power_on(image) == HCode.H_SUCCESS


async def test_a_reset_wins_over_a_start_that_waits_for_the_map(host: RealHost, tmp_path: Path) -> None:
    vm, image = await played(host, tmp_path)
    assert await vm.guest.esm(image) == UCode.U_SUCCESS
    vm.holds_maps = True
    assert await vm.qemu.reset() == HCode.H_SUCCESS

    codes: list[int] = []

    async def power_on() -> None:
        codes.append(await vm.qemu.power_on(image))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(power_on)
        while not vm.guest.starts_too_early:
            await host.kvm.query("vm.status", vm="vm1")
        assert await vm.qemu.reset() == HCode.H_SUCCESS
        vm.hand_over_maps()

    assert codes == [HCode.H_STATE]
    assert vm.guest.pc is None
    await starts_anew(host, vm, image)


async def test_twenty_resets_in_a_row_leave_one_map(host: RealHost, tmp_path: Path) -> None:
    vm, image = await played(host, tmp_path)

    for _ in range(20):
        assert await vm.guest.esm(image) == UCode.U_SUCCESS
        assert await vm.qemu.reset() == HCode.H_SUCCESS
        await starts_anew_as_normal(host, vm, image)


async def starts_anew_as_normal(host: RealHost, vm: PlayedVm, image: PlayedImage) -> None:
    """After a reset nothing is charged, and the machine loads and starts."""
    assert await used_bytes(host) == 0
    assert await vm.qemu.power_on(image) == HCode.H_SUCCESS
    assert not vm.guest.secure
