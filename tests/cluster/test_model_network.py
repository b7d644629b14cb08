"""Model kernels on two hosts talk over a network: normal and secure ones, by several ways to their memory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deploy.api import RunningCluster, Vm
from shared.dma_designs import DESIGNS, DmaDesign
from tests.cluster.two_hosts import running_hosts, vm_text
from tests.cluster.vm_files import answer_of

ALL_PAIRS = [DmaDesign.QUIRK, DmaDesign.IOMMU_ALWAYS, DmaDesign.DDW_IDENTITY]
OTHER_DESIGNS = [dma for dma in DmaDesign if dma not in (*ALL_PAIRS, DmaDesign.DMA_LIMIT, DmaDesign.NOTHING)]
"""That a secure VM works with: a limit lets the device have everything below it."""
MACS = {name: f"52:54:00:00:00:{number:02x}" for number, name in enumerate(("vm1", "vm2", "vm3", "vm4"), 1)}
"""vm1 and vm2 are normal, vm3 and vm4 secure; the odd ones are on alpha."""
PAIRS = [("vm1", "vm2"), ("vm3", "vm4"), ("vm1", "vm4"), ("vm3", "vm2")]
N_PAYLOAD_BYTES = 8000
RUN = re.compile(r"ok requests (\d+) bytes (\d+) ns \d+ p50_ns (\d+) p99_ns (\d+) bounced (\d+) calls (.*)")

_HEAD = """
make = "demo"
[networks.lan]
mtu = 9000
[hosts.alpha]
secure_memory = "128M"
[hosts.beta]
secure_memory = "128M"
"""
_CARD = """dma = "{dma}"
[[vms.{vm}.devices]]
kind = "virtio-net"
network = "lan"
mac = "{mac}"
"""


def with_card(vm: str, host: str, *, secure: bool, dma: DmaDesign = DmaDesign.QUIRK) -> str:
    """A VM of the cluster file with its card."""
    return vm_text(vm, host, secure=secure) + _CARD.format(vm=vm, dma=dma, mac=MACS[vm])


def four_vms(dma: DmaDesign) -> str:
    hosts = {"vm1": "alpha", "vm2": "beta", "vm3": "alpha", "vm4": "beta"}
    secure = {"vm3", "vm4"}
    return _HEAD + "".join(with_card(vm, host, secure=vm in secure, dma=dma) for vm, host in hosts.items())


async def ask(vm: Vm, line: str, seconds: float = 20.0) -> str:
    """The answer line of a command."""
    return answer_of(await vm.console_command(line, seconds=seconds))


@pytest.mark.parametrize("dma", ALL_PAIRS)
async def test_normal_and_secure_kernels_answer_each_other_by_every_way(tmp_path: Path, dma: DmaDesign) -> None:
    async with running_hosts(tmp_path, four_vms(dma)) as running:
        for asks, answers in PAIRS:
            await check_pair(running, asks, answers)
        for name, mac in MACS.items():
            counts = await ask(running.vm(name), "net")
            assert re.fullmatch(rf"ok {mac} mtu 9000 link up in \d+ \d+ out \d+ \d+ dropped \S+", counts), counts
        await check_calls(running, translates=dma is DmaDesign.IOMMU_ALWAYS)
        for name in ("vm3", "vm4"):
            row = await running.vm(name).row()
            assert row.secure
            # The card was never given the address of a private page: that would have paged it out.
            assert row.pages["paged_out"] == 0


async def test_a_secure_kernel_of_every_other_design_that_works_reaches_its_network(tmp_path: Path) -> None:
    """One VM for each, all on one network; the last one answers them."""
    text = 'make = "demo"\n[networks.lan]\n[hosts.alpha]\nsecure_memory = "1G"\n'
    macs = {f"{dma}": f"52:54:00:00:01:{number:02x}" for number, dma in enumerate(OTHER_DESIGNS)}
    for name, mac in macs.items():
        tell_secure = f"secure = true\ntell_secure = {str(DESIGNS[DmaDesign(name)].machine.tell_secure).lower()}"
        entry = vm_text(name, "alpha").replace("secure = true", tell_secure)
        text += entry + _CARD.format(vm=name, dma=name, mac=mac)
    async with running_hosts(tmp_path, text + with_card("vm1", "alpha", secure=False)) as running:
        for name, mac in macs.items():
            vm = running.vm(name)
            assert (await ask(vm, f"ping {MACS['vm1']} 3 1400")).startswith("ok replies 3 of 3 "), name
            assert (await ask(running.vm("vm1"), f"blast {mac} 20 1400")).startswith("ok requests 20 "), name
            row = await vm.row()
            assert (row.secure, row.pages["paged_out"]) == (True, 0), name


async def check_pair(running: RunningCluster, asks: str, answers: str) -> None:
    """Replies come with what was sent, in frames of one buffer and of several."""
    vm, mac = running.vm(asks), MACS[answers]
    assert re.fullmatch(r"ok replies 3 of 3 p50_ns \d+ p99_ns \d+", await ask(vm, f"ping {mac}"))
    found = RUN.fullmatch(await ask(vm, f"blast {mac} 20 {N_PAYLOAD_BYTES} 2"))
    assert found, f"{asks} to {answers}"
    assert [int(value) for value in found.groups()[:2]] == [20, 20 * N_PAYLOAD_BYTES]
    assert 0 < int(found[3]) <= int(found[4])
    bounced = int(found[5])
    assert bounced >= 2 * 20 * N_PAYLOAD_BYTES if (await vm.row()).secure else bounced == 0


async def check_calls(running: RunningCluster, *, translates: bool) -> None:
    """With the 32-bit window each frame is mapped by calls; else it needs none of these."""
    for name, peer in (("vm1", "vm2"), ("vm3", "vm4")):
        found = RUN.fullmatch(await ask(running.vm(name), f"blast {MACS[peer]} 50 64 4"))
        assert found
        counts = {word.split("=")[0]: int(word.split("=")[1]) for word in found[6].split()}
        assert (counts.get("H_PUT_TCE", 0) >= 50) is translates
        assert ("H_PUT_TCE" in counts) is translates


async def test_a_kernel_goes_on_when_the_other_ones_qemu_is_stopped_and_when_its_own_network_is_gone(
    tmp_path: Path,
) -> None:
    text = _HEAD + with_card("vm1", "alpha", secure=False) + with_card("vm4", "beta", secure=True)
    async with running_hosts(tmp_path, text) as running:
        vm1, vm4 = running.vm("vm1"), running.vm("vm4")
        assert (await ask(vm1, f"ping {MACS['vm4']}")).startswith("ok replies 3 of 3 ")
        await vm4.qemu.stop()

        assert (await ask(vm1, f"ping {MACS['vm4']} 2")).startswith("ok replies 0 of 2 ")
        assert await ask(vm1, f"blast {MACS['vm4']} 1000 64 8") == "error no reply for 5 s"

        await vm4.qemu.resume()
        await vm1.wait(lambda row: row.network.networks[0].peers[0].state == "up", "linked", seconds=5)
        assert (await ask(vm1, f"ping {MACS['vm4']}")).startswith("ok replies 3 of 3 ")
        await vm4.qemu.kill()
        assert (await ask(vm1, f"ping {MACS['vm4']} 2")).startswith("ok replies 0 of 2 ")
        assert (await ask(vm1, "pages")).startswith("ok free=")


async def test_a_kernel_that_turns_itself_secure_takes_its_card_along(tmp_path: Path) -> None:
    """The first kernel uses the card, and its receive buffers are open when it makes the ultracall."""
    secure = with_card("vm3", "alpha", secure=True).replace("svm=on", "svm=off")
    async with running_hosts(tmp_path, _HEAD + secure + with_card("vm2", "beta", secure=False)) as running:
        vm2, vm3 = running.vm("vm2"), running.vm("vm3")
        assert (await ask(vm3, f"ping {MACS['vm2']}")).startswith("ok replies 3 of 3 ")
        assert not (await vm3.row()).secure

        await vm3.console_write(b"esm\r")
        await vm3.wait(lambda row: bool(row.secure), "secure", seconds=20)
        await vm3.console_command("", seconds=20)

        assert (await ask(vm2, f"ping {MACS['vm3']}")).startswith("ok replies 3 of 3 ")
        assert (await ask(vm3, f"ping {MACS['vm2']}")).startswith("ok replies 3 of 3 ")
        assert (await vm3.row()).pages["paged_out"] == 0


async def test_a_kernel_whose_esm_is_refused_goes_on_with_its_card_as_it_was(tmp_path: Path) -> None:
    vm1 = with_card("vm1", "alpha", secure=False, dma=DmaDesign.IOMMU_ALWAYS)
    async with running_hosts(tmp_path, _HEAD + vm1 + with_card("vm2", "beta", secure=False)) as running:
        vm = running.vm("vm1")
        assert (await ask(vm, f"blast {MACS['vm2']} 40 64 8")).startswith("ok requests 40 ")
        for _ in range(3):
            assert (await ask(vm, "esm")).startswith("error U_")
            assert (await ask(vm, f"blast {MACS['vm2']} 40 64 8")).startswith("ok requests 40 ")
