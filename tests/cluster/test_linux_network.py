"""A normal and a secure Linux on two hosts with a network between them, random numbers and a second console."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import trio

from deploy.api import RunningCluster, Vm, cluster
from deploy.linux.store import LinuxImage
from deploy.linux_shell import LinuxShell
from deploy.status import NetworkPeer
from tests.needs import need_firmware, need_linux

pytestmark = pytest.mark.linux

TRANSFER_MIB = 2

_VM = """
[vms.{name}]
host = "{host}"
memory = "256M"
[vms.{name}.guest]
kernel = "machine"
boot = "kernel"
image = "{image.kernel}"
initrd = "{image.initramfs}"
{boot}
[[vms.{name}.devices]]
kind = "virtio-net"
network = "lan"
{card}
"""
_HEAD = """
make = "linux"
[networks.lan]
[hosts.alpha]
secure_memory = "64M"
[hosts.beta]
secure_memory = "256M"
"""
_NORMAL = 'command_line = "console=hvc0 quiet"'
_SECURE = """
command_line = "console=hvc0 quiet svm=on swiotlb=force"
esm_blob = "@state/vm2.esm"
"""
_MORE_DEVICES = """
[[vms.vm1.devices]]
kind = "virtio-rng"
[[vms.vm1.devices]]
kind = "virtio-console"
name = "log"
"""


def cluster_file(directory: Path, image: LinuxImage) -> Path:
    """vm1 on alpha is a normal VM; vm2 on beta turns itself secure, and its card works through the IOMMU."""
    file = directory / "network.toml"
    vm1 = _VM.format(name="vm1", host="alpha", image=image, boot=_NORMAL, card='mac = "52:54:00:00:00:01"')
    vm2 = _VM.format(name="vm2", host="beta", image=image, boot=_SECURE, card="access_platform = true")
    file.write_text(_HEAD + vm1 + _MORE_DEVICES + vm2)
    return file


async def test_a_normal_and_a_secure_linux_talk_and_one_goes_on_without_the_other(tmp_path: Path) -> None:
    need_firmware()
    async with cluster(cluster_file(tmp_path, need_linux()), state_dir=tmp_path / "state") as running:
        vm1, vm2 = running.vm("vm1"), running.vm("vm2")
        shell1, shell2 = LinuxShell(vm1), LinuxShell(vm2)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(boot, shell1, "10.0.0.1")
            nursery.start_soon(boot, shell2, "10.0.0.2")
        assert [(await vm.row()).secure for vm in (vm1, vm2)] == [False, True]
        assert "link/ether 52:54:00:00:00:01" in await shell1.run("ip addr show eth0")
        for shell, other in ((shell1, "10.0.0.2"), (shell2, "10.0.0.1")):
            assert "3 packets received, 0% packet loss" in await shell.run(f"ping -c 3 -i 0.2 {other}")
        await check_transfer(shell1, shell2)
        (card,) = (await vm2.row()).network.devices
        assert card.received_bytes > TRANSFER_MIB << 20
        # The card was never given the address of a private page: that would have paged it out.
        assert (await vm2.row()).pages["paged_out"] == 0
        await check_random_numbers(shell1)
        await check_second_console(running, shell1)
        await check_peer_that_stops(shell1, vm1, vm2)
        await check_peer_that_dies_and_comes_back(shell1, vm1, vm2)
        await check_host_that_dies_and_comes_back(running, shell1, vm1, vm2)


async def boot(shell: LinuxShell, address: str) -> None:
    await shell.until_prompt()
    await shell.silence_kernel()
    await shell.run(f"ip addr add {address}/24 dev eth0; ip link set eth0 up")


async def check_transfer(sender: LinuxShell, receiver: LinuxShell) -> None:
    """A file sent over TCP has the same digest on the other side."""
    make = f"dd if=/dev/urandom of=/tmp/f bs=1M count={TRANSFER_MIB} 2>/dev/null; sha256sum /tmp/f"
    sent = await sender.run(make)
    await receiver.run("nc -l -p 5000 > /tmp/f 2>/dev/null & true")
    await sender.run("nc 10.0.0.2 5000 < /tmp/f")
    received = await receiver.run("wait; sha256sum /tmp/f")
    digests = [re.findall(r"[0-9a-f]{64}", text) for text in (sent, received)]
    assert digests[0] == digests[1] and len(digests[0]) == 1


async def check_random_numbers(shell: LinuxShell) -> None:
    assert await shell.run("cat /sys/class/misc/hw_random/rng_current") == "virtio_rng.0"
    seen = await shell.run("for i in 1 2; do dd if=/dev/hwrng bs=32 count=1 2>/dev/null | sha256sum; done")
    digests = re.findall(r"[0-9a-f]{64}", seen)
    assert len(digests) == len(set(digests)) == 2


async def check_second_console(running: RunningCluster, shell: LinuxShell) -> None:
    """What the guest writes to hvc1 is kept, and what is typed there reaches it, by the command as well."""
    await shell.run("echo out of hvc1 > /dev/hvc1")
    await shell.run("(read line < /dev/hvc1; echo got $line > /dev/hvc1) & true")
    command = [sys.executable, "-m", "deploy.cli", "console", "vm1", "--port", "log", "--cluster", running.name]
    done = await trio.run_process(command, stdin=b"typed\n", capture_stdout=True)
    assert b"out of hvc1\r\n" in done.stdout
    assert b"got typed\r\n" in done.stdout
    mistaken = ["nolog" if word == "log" else word for word in command]
    wrong = await trio.run_process(mistaken, capture_stderr=True, check=False)
    assert wrong.returncode == 1
    assert b"no virtio-console 'nolog'; there is: log" in wrong.stderr


async def check_peer_that_stops(shell: LinuxShell, vm1: Vm, vm2: Vm) -> None:
    """L1: frames for a peer that is stopped are lost and counted, and the sender is not held up."""
    await vm2.qemu.stop()
    await until(vm1, "stopped")
    assert "0 packets received" in await shell.run("ping -c 2 -i 0.2 -W 1 10.0.0.2")
    assert (await peer_of(vm1)).dropped["peer-lost"] >= 2
    await vm2.qemu.resume()
    await until(vm1, "up")
    assert "1 packets received" in await shell.run("ping -c 1 -W 5 10.0.0.2")


async def check_peer_that_dies_and_comes_back(shell: LinuxShell, vm1: Vm, vm2: Vm) -> None:
    """The link of the next incarnation takes the place of the old one without a restart of the other VM."""
    await vm2.guest.kill()
    await vm2.wait(lambda row: row.state == "failed", "failed")
    await until(vm1, "gone", "failed")
    assert await shell.run("echo alive") == "alive"
    await vm2.restart()
    await check_frames_arrive(shell, vm1, vm2)


async def check_host_that_dies_and_comes_back(running: RunningCluster, shell: LinuxShell, vm1: Vm, vm2: Vm) -> None:
    """A host that is restarted with its VMs links them again with those of the other host."""
    await running.process("beta/kvm").kill()
    await vm2.wait(lambda row: row.state == "failed", "failed")
    assert await shell.run("echo alive") == "alive"
    await running.restart("beta")
    await check_frames_arrive(shell, vm1, vm2)


async def check_frames_arrive(shell: LinuxShell, vm1: Vm, vm2: Vm) -> None:
    """The driver of vm2 is not there yet, so its card drops what comes; that it comes is the point.

    Some may have come before: the kernel of vm1 looks by itself whether its neighbour is still there.
    """
    await until(vm1, "up")
    before = (await peer_of(vm2)).received_frames
    await shell.run("ip neigh flush dev eth0; ping -c 2 -i 0.2 -W 1 10.0.0.2")
    assert (await peer_of(vm2)).received_frames > before
    assert (await vm1.row()).incarnation == 1


async def peer_of(vm: Vm) -> NetworkPeer:
    """What a VM's status says of the only other one on its network."""
    (end,) = (await vm.row()).network.networks
    (peer,) = end.peers
    return peer


async def until(vm: Vm, *states: str) -> None:
    """Returns when the VM's status has the other one in one of `states`."""
    await vm.wait(lambda row: row.network.networks[0].peers[0].state in states, f"linked, {states}", seconds=5)
