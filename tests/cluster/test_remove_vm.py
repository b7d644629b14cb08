"""The end of a VM whose guest does not let go, as the launcher orders it: whoever waits for it answers its pings."""

from __future__ import annotations

from pathlib import Path

import trio

from protocol.codes import HCode, UCode
from services.testing.host import PlayedVm, RealHost
from services.testing.image import make_image
from services.ultravisor.identity import MACHINE_KEY, ensure_keys

MEMORY_BYTES = 16 << 20
PONG_SECONDS = 0.5
KILL_SECONDS = 2.0
"""The ultravisor gives a guest one second to let go."""


async def secure_vm(host: RealHost, tmp_path: Path) -> PlayedVm:
    image = make_image(ensure_keys(tmp_path, "alpha")[MACHINE_KEY], b"kernel" * 20_000, MEMORY_BYTES, {})
    vm = await host.add_vm("vm1", memory_bytes=MEMORY_BYTES)
    assert await vm.qemu.power_on(image) == HCode.H_SUCCESS
    assert await vm.guest.esm(image) == UCode.U_SUCCESS
    return vm


async def test_l1_pings_and_news_are_taken_while_a_vm_ends_whose_guest_does_not_let_go(
    host: RealHost, tmp_path: Path
) -> None:
    vm = await secure_vm(host, tmp_path)
    vm.guest.lets_go = False
    removed: list[str] = []

    async def remove(order: str) -> None:
        await host.kvm.remove_vm("vm1")
        removed.append(order)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(remove, "first")
        with trio.fail_after(KILL_SECONDS):
            while not any(notice.what == "guest-must-die" for notice in host.ultravisor.notices):
                await answer_pings(host)
        assert removed == []
        nursery.start_soon(remove, "again")
        await answer_pings(host)
        assert removed == [], "a repeated order is not done before the first"
        await host.ultravisor.peer_state("vm1/guest", "gone")

    assert len(removed) == 2
    assert (await host.ultravisor.query("account"))["used_bytes"] == 0
    await host.forget_vm("vm1")


async def answer_pings(host: RealHost) -> None:
    with trio.fail_after(PONG_SECONDS):
        for process in (host.kvm, host.ultravisor):
            await process.barrier()
