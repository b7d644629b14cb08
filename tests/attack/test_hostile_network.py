"""A qemu that sends anything but frames on its network links, and floods them; the other VMs' qemus are honest.

Two Linux VMs talk to each other all the while. What must hold: S5 (each wrong message is refused and counted, and
nothing ends), L1 (nobody is held up), and memory stays bounded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from deploy.api import Process, RunningCluster, cluster, processes_of
from deploy.linux.store import LinuxImage
from deploy.linux_shell import LinuxShell
from protocol.wire import HIGH_WATER_MARK, MAX_MESSAGE_BYTES
from services.qemu.network import MAX_ADDRESSES, Drop
from tests.attack.hostile.network import FloodOf, NetLie
from tests.cluster.conftest import own_directories
from tests.needs import need_linux

__all__ = ["own_directories"]

pytestmark = [pytest.mark.linux, pytest.mark.cold]

HOSTILE = "tests.attack.hostile.{role}"
FLOOD_SECONDS = 2.0
COUNT_SECONDS = 5.0
MAX_GROWTH_BYTES = HIGH_WATER_MARK * MAX_MESSAGE_BYTES + (16 << 20)
"""What libzmq may keep of one link, and what a process takes now and then for itself."""
PINGS, MIN_ANSWERS, ANSWER_SECONDS = 5, 4, 3
ADDRESSES = {"vm1": "10.0.0.1", "vm2": "10.0.0.2"}

_HEAD = """
[networks.lan]
[hosts.alpha]
secure_memory = "64M"
"""
_VM = """
[vms.{name}]
host = "alpha"
memory = "{memory}"
[[vms.{name}.devices]]
kind = "virtio-net"
network = "lan"
[vms.{name}.guest]
"""
_LINUX = """
kernel = "machine"
boot = "program"
image = "{image.kernel}"
initrd = "{image.initramfs}"
command_line = "console=hvc0 quiet"
"""
_MODEL = """
boot = "kernel"
"""


def cluster_file(directory: Path, image: LinuxImage) -> Path:
    """vm1 and vm2 are honest; the qemu of vm3 is not, and its guest does not matter."""
    linux = [_VM.format(name=name, memory="128M") + _LINUX.format(image=image) for name in ADDRESSES]
    file = directory / "network.toml"
    file.write_text(_HEAD + "".join(linux) + _VM.format(name="vm3", memory="64M") + _MODEL)
    return file


@dataclass(frozen=True, slots=True)
class Counts:
    """What an honest qemu counted of what came from vm3."""

    refused: int
    malformed: int
    received: int
    addresses: int
    no_buffer: int

    @property
    def bad(self) -> int:
        return self.refused + self.malformed


async def counted(qemu: Process, n_bad: int) -> Counts:
    """Its counts, as soon as it has refused or dropped `n_bad`."""
    with trio.fail_after(COUNT_SECONDS):
        while True:
            counts = await counts_of(qemu)
            if counts.bad >= n_bad:
                return counts
            await trio.sleep(0.02)


async def counts_of(qemu: Process) -> Counts:
    links = await qemu.query("statistics", seconds=2.0)
    (refused,) = (link["refused"] for name, link in links.items() if name.startswith("network.") and "vm3" in name)
    status = await qemu.query("network.status", seconds=2.0)
    (end,), (card,) = status["networks"], status["devices"]
    (peer,) = (peer for peer in end["peers"] if peer["vm"] == "vm3")
    return Counts(
        refused=refused,
        malformed=peer["dropped"].get(Drop.MALFORMED.value, 0),
        received=peer["received_frames"],
        addresses=end["addresses"],
        no_buffer=card["dropped"].get(Drop.NO_BUFFER.value, 0),
    )


@dataclass(frozen=True, slots=True)
class Attack:
    """The running cluster."""

    running: RunningCluster
    shell: LinuxShell

    @property
    def victims(self) -> list[Process]:
        return [self.running.vm(name).qemu for name in ADDRESSES]

    @property
    def hostile(self) -> Process:
        return self.running.vm("vm3").qemu

    async def answers(self) -> int:
        """How many pings of vm1 vm2 answers. One at a time: of several BusyBox waits a second for the last, whatever
        it was told."""
        ping = f"ping -c 1 -W {ANSWER_SECONDS} {ADDRESSES['vm2']}"
        text = await self.shell.run(f"for n in {' '.join(map(str, range(PINGS)))}; do {ping}; sleep 0.2; done")
        return len(re.findall("1 packets received", text))

    async def tell(self, lie: NetLie) -> None:
        """Each message is refused, or its frame is dropped, and both are counted (S5)."""
        before = [await counts_of(victim) for victim in self.victims]
        sent = (await self.hostile.query("network.lie", {"what": lie.name}))["sent"]
        for victim, earlier in zip(self.victims, before, strict=True):
            if lie is NetLie.OVERSIZE:
                # libzmq refuses it and ends the connection; the next lie finds a new one.
                continue
            refused, malformed = (0, sent) if lie is NetLie.NO_FRAMES else (sent, 0)
            now = await counted(victim, earlier.bad + sent)
            assert (now.refused - earlier.refused, now.malformed - earlier.malformed) == (refused, malformed), lie
            assert now.received == earlier.received, lie

    async def flood(self, what: FloodOf) -> None:
        """While it lasts vm1 and vm2 talk, nobody is called unresponsive (L1), and memory stays bounded."""
        pids = [(await victim.row()).pid for victim in self.victims]
        before = [memory_of(pid) for pid in pids]
        grown = 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_flood, what)
            with trio.fail_after(FLOOD_SECONDS):
                assert {row.state for row in processes_of(await self.running.status())} == {"running"}
            assert await self.answers() >= MIN_ANSWERS, what
            grown = max(memory_of(pid) - earlier for pid, earlier in zip(pids, before, strict=True))
            assert {row.state for row in processes_of(await self.running.status())} == {"running"}
        assert grown < MAX_GROWTH_BYTES, what

    async def _send_flood(self, what: FloodOf) -> None:
        arguments = {"what": what.name, "seconds": FLOOD_SECONDS}
        await self.hostile.query("network.flood", arguments, FLOOD_SECONDS + COUNT_SECONDS)


def memory_of(pid: int | None) -> int:
    """Bytes of its own that a process has in memory."""
    (kib,) = re.findall(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(kib) << 10


async def test_s5_l1_lies_and_floods_of_a_qemu_are_counted_and_the_others_talk_on(tmp_path: Path) -> None:
    file = cluster_file(tmp_path, need_linux())
    async with cluster(file, state_dir=tmp_path / "state", service_module=HOSTILE) as running:
        shells = {name: LinuxShell(running.vm(name)) for name in ADDRESSES}
        async with trio.open_nursery() as nursery:
            for name, shell in shells.items():
                nursery.start_soon(boot, shell, ADDRESSES[name])
        attack = Attack(running, shells["vm1"])
        assert await attack.answers() == PINGS

        for lie in (*NetLie, NetLie.GARBAGE):
            await attack.tell(lie)
        assert await attack.answers() == PINGS
        for what in FloodOf:
            await attack.flood(what)
        for victim in attack.victims:
            await check_flood_was_one(victim)
        assert await attack.answers() == PINGS

        await check_logs(running)
        assert {(await running.vm(name).row()).state for name in ("vm1", "vm2", "vm3")} == {"running"}


async def boot(shell: LinuxShell, address: str) -> None:
    await shell.until_prompt()
    await shell.silence_kernel()
    await shell.run(f"ip addr add {address}/24 dev eth0; ip link set eth0 up")


async def check_flood_was_one(victim: Process) -> None:
    """More came than the guest takes, from more addresses than a switch remembers."""
    counts = await counts_of(victim)
    assert counts.received > 10_000
    assert counts.no_buffer > 1_000
    assert counts.addresses == MAX_ADDRESSES


async def check_logs(running: RunningCluster) -> None:
    """The operator reads of it, in bounded space."""
    for name in ADDRESSES:
        log = running.vm(name).qemu.log()
        assert '"peer": "vm3/qemu"' in log and '"event": "refused"' in log
        assert "Traceback" not in log and '"internal error"' not in log
        assert len(log) < 1 << 20
    assert "Traceback" not in running.process("alpha/kvm").log()
