"""A Linux VM gives memory back through its balloon and takes it again; a secure one gives none."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from qemu.qmp import QMPClient

from deploy.api import RunningCluster, Vm, cluster
from deploy.linux_shell import LinuxShell
from deploy.memory_segments import SHM_DIR
from deploy.qmp_client import QmpRefusal, execute
from deploy.run_program import RunOrder, check_program, cluster_text, program_blob
from deploy.status import BalloonStatus
from deploy.tables import balloon_facts
from tests.cluster.vm_files import console_end
from tests.needs import need_linux

pytestmark = pytest.mark.linux

MIB = 1 << 20
MEMORY_BYTES = 256 * MIB
SECONDS = 60.0
SLACK_BYTES = 8 * MIB
"""What Linux itself uses more or less meanwhile."""
TOUCHED_BYTES = 160 * MIB
_ROOM = "mount -o remount,size=180m /tmp"
"""What it takes by itself depends on how much memory the balloon left when it was mounted."""
TOUCH = f"{_ROOM}; dd if=/dev/zero of=/tmp/x bs=1M count=160 2>/dev/null; rm /tmp/x"
"""Whichever pages the driver takes after that, the host has most of them."""
USE_MEMORY = f"{_ROOM}; for i in $(seq 32); do cat /bin/busybox; done > /tmp/x; sha256sum < /tmp/x; rm /tmp/x"
"""64 MiB with something on every page."""


@dataclass
class World:
    """One VM with a balloon, Linux at its prompt."""

    running: RunningCluster
    vm: Vm
    shell: LinuxShell
    boot: str
    """What it wrote up to its first prompt."""

    async def pefbox(self, *words: str) -> subprocess.CompletedProcess[bytes]:
        """`pefbox balloon VM ...`."""
        line = [sys.executable, "-m", "deploy.cli", "balloon", self.vm.name, *words, "--cluster", self.running.name]
        return await trio.run_process(line, capture_stdout=True, capture_stderr=True, check=False)

    async def set_target(self, size: str) -> None:
        """`pefbox balloon VM SIZE`."""
        done = await self.pefbox(size)
        assert done.returncode == 0, done.stderr

    async def refused(self, *words: str) -> str:
        """The line that a command gives instead of doing anything."""
        done = await self.pefbox(*words)
        assert done.returncode == 1
        assert done.stdout == b""
        return done.stderr.decode().removeprefix("pefbox: ").removesuffix("\n")

    async def balloon(self) -> BalloonStatus:
        """The balloon in `pefbox status`."""
        balloon = (await self.vm.row()).balloon
        assert balloon is not None
        return balloon

    async def until_actual(self, n_bytes: int) -> BalloonStatus:
        """The balloon, as soon as the guest has so much memory."""

        def reached(balloon: BalloonStatus | None) -> bool:
            return balloon is not None and balloon.actual_bytes == n_bytes

        await self.vm.wait(lambda row: reached(row.balloon), f"at {n_bytes} bytes", SECONDS)
        return await self.balloon()

    def used_bytes(self) -> int:
        """What its RAM segment really takes of this machine's memory."""
        (name,) = [name for name in os.listdir(SHM_DIR) if name.startswith(f"pefbox-{self.running.name}-")]
        return (SHM_DIR / name).stat().st_blocks * 512

    async def total_bytes(self) -> int:
        """The memory that Linux says it has."""
        found = re.search(r"Mem: +(\d+)", await self.shell.run("free -k"))
        assert found is not None
        return int(found[1]) << 10

    async def qmp(self, command: str, arguments: dict[str, Any] | None = None) -> Any:  # noqa: ANN401
        """A command on the monitor, past all that `pefbox balloon` checks."""
        path = (await self.vm.row()).qmp
        assert path is not None
        return await trio.to_thread.run_sync(execute, path, command, arguments)


@asynccontextmanager
async def linux(directory: Path, *, secure: bool = False, access_platform: bool = False) -> AsyncIterator[World]:
    """Linux without firmware: what a balloon does has nothing to do with how it starts."""
    image = need_linux()
    order = RunOrder(
        program=Path(image.kernel),
        initrd=Path(image.initramfs),
        command_line="console=hvc0 svm=on swiotlb=force" if secure else "console=hvc0 quiet",
        memory_bytes=MEMORY_BYTES,
        secure=secure,
        time="wall",
    )
    blob = program_blob(check_program(order.program, MEMORY_BYTES), order, directory) if secure else None
    device = f'[[vms.program.devices]]\nkind = "virtio-balloon"\naccess_platform = {str(access_platform).lower()}\n'
    file = directory / "balloon.toml"
    file.write_text(cluster_text(order, blob) + device)
    async with cluster(file, state_dir=directory) as running:
        vm = running.vm("program")
        shell = LinuxShell(vm)
        yield World(running, vm, shell, await shell.until_prompt())


@dataclass
class Listener:
    """A client of the monitor that collects the balloon's events, in a thread, since its library is asyncio's."""

    path: str
    actuals: list[int] = field(default_factory=list)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        token, ready = trio.lowlevel.current_trio_token(), trio.Event()

        async def listen() -> None:
            client = QMPClient("test")
            await client.connect(self.path)
            with client.listener("BALLOON_CHANGE") as events:
                token.run_sync_soon(ready.set)
                while not self.actuals or self.actuals[-1] != MEMORY_BYTES // 2:
                    event = await asyncio.wait_for(events.get(), SECONDS)
                    data: Any = event["data"]
                    self.actuals.append(data["actual"])
            await client.disconnect()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, lambda: asyncio.run(listen()))
            await ready.wait()
            task_status.started()


async def test_linux_gives_half_of_its_memory_back_and_takes_it_again(tmp_path: Path) -> None:
    async with linux(tmp_path) as world:
        await check_mistakes(world)
        total = await world.total_bytes()
        content = await world.shell.run(USE_MEMORY)
        await world.shell.run(TOUCH)
        used = world.used_bytes()
        assert used > TOUCHED_BYTES

        await check_inflation(world)

        assert await world.total_bytes() < total - MEMORY_BYTES // 2 + SLACK_BYTES
        assert world.used_bytes() < used - (MEMORY_BYTES // 2 - (total - TOUCHED_BYTES)) + SLACK_BYTES
        await check_what_is_shown(world)
        await check_a_reset(world)

        await world.set_target("256M")
        assert (await world.until_actual(MEMORY_BYTES)).target_bytes == MEMORY_BYTES
        assert await world.total_bytes() > total - SLACK_BYTES
        assert await world.shell.run(USE_MEMORY) == content


async def check_mistakes(world: World) -> None:
    """One line, and nothing changes."""
    lines = {
        "much": 'SIZE: "much" is no size; allowed: bytes, or a text such as 128M',
        "0": "SIZE: 0 is not possible; program can have up to 256 MiB",
        "1G": "SIZE: 1G is not possible; program can have up to 256 MiB",
    }
    for size, line in lines.items():
        assert await world.refused(size) == line
    assert await world.qmp("query-balloon") == {"actual": MEMORY_BYTES}


async def check_inflation(world: World) -> None:
    """A client of the monitor hears of it, at most once a second, of the end in any case."""
    path = (await world.vm.row()).qmp
    assert path is not None
    listener = Listener(path)
    async with trio.open_nursery() as nursery:
        await nursery.start(listener.run)
        begin_s = trio.current_time()
        await world.set_target("128M")
    assert listener.actuals[-1] == MEMORY_BYTES // 2
    assert len(listener.actuals) <= trio.current_time() - begin_s + 1
    balloon = await world.until_actual(MEMORY_BYTES // 2)
    assert balloon.target_bytes == MEMORY_BYTES // 2
    # Where the guest did not let go in time, kvm asks for the frame with the next ones.
    assert MEMORY_BYTES // 2 - SLACK_BYTES < balloon.discarded_bytes <= MEMORY_BYTES // 2


async def check_what_is_shown(world: World) -> None:
    """`pefbox balloon VM`, as text and as JSON, with statistics of now."""
    text = (await world.pefbox()).stdout.decode().splitlines()
    facts = balloon_facts(msgspec.to_builtins(await world.balloon()))
    assert facts.startswith("actual 128 MiB  target 128 MiB  discarded 1")
    assert text[0] == f"program  memory 256 MiB  {facts}"
    assert text[1].startswith("the guest says: total_memory ")
    shown = json.loads((await world.pefbox("--json")).stdout)
    sizes = [shown[f"{name}_bytes"] for name in ("memory", "actual", "target")]
    assert sizes == [MEMORY_BYTES, MEMORY_BYTES // 2, MEMORY_BYTES // 2]
    assert abs(shown["stats"]["total_memory"] - await world.total_bytes()) < SLACK_BYTES
    line = [sys.executable, "-m", "deploy.cli", "status", "--cluster", world.running.name]
    status = await trio.run_process(line, capture_stdout=True)
    assert f"balloon {facts}" in status.stdout.decode()


async def check_a_reset(world: World) -> None:
    """It empties the balloon; the next driver fills it again, since the target stays."""
    since = await console_end(world.vm)
    await world.qmp("system_reset")
    assert (await world.balloon()).actual_bytes == MEMORY_BYTES
    await world.shell.until_prompt(since)
    await world.until_actual(MEMORY_BYTES // 2)


async def test_a_secure_linux_with_access_platform_has_no_balloon_as_its_driver_clears_the_bit(tmp_path: Path) -> None:
    """Its page numbers are never translated, so it does not ask for what would translate them; the device insists."""
    async with linux(tmp_path, secure=True, access_platform=True) as world:
        assert "virtio_balloon virtio0: virtio: device refuses features: 3" in world.boot
        await check_refusal(world)

        # qemu does not know that the VM is secure: it takes a target that nobody will follow.
        assert await world.qmp("balloon", {"value": MEMORY_BYTES // 2}) == {}

        balloon = await world.balloon()
        assert balloon.reason == "the driver does not accept VIRTIO_F_ACCESS_PLATFORM"
        assert balloon.actual_bytes == MEMORY_BYTES
        await check_nothing_is_lost(world)


async def test_a_secure_linux_whose_rings_are_private_stops_its_balloon(tmp_path: Path) -> None:
    """Without the bit Linux keeps even the rings in its own memory: the device reads ciphertext and gives up."""
    async with linux(tmp_path, secure=True) as world:
        await check_refusal(world)

        with pytest.raises(QmpRefusal, match="The balloon device has stopped: queue"):
            await world.qmp("balloon", {"value": MEMORY_BYTES // 2})

        balloon = await world.balloon()
        assert balloon.reason is not None
        assert balloon.reason.startswith("queue ")
        assert balloon.target_bytes == balloon.actual_bytes == MEMORY_BYTES
        await check_nothing_is_lost(world)


async def check_refusal(world: World) -> None:
    """`pefbox balloon` does not even try."""
    assert (await world.vm.row()).secure
    assert await world.refused("128M") == (
        "balloon is not possible: program is secure: "
        "the balloon would hand private pages to the host, which gains nothing by them"
    )
    assert (await world.balloon()).target_bytes == MEMORY_BYTES
    assert (await world.pefbox()).returncode == 0


async def check_nothing_is_lost(world: World) -> None:
    """The host has no page of it back, and Linux goes on."""
    assert (await world.balloon()).discarded_bytes == 0
    assert (await world.vm.row()).secure
    assert await world.shell.run("cat /sys/devices/system/cpu/svm") == "1"
