"""The model kernel's balloon: a normal VM gives memory and takes it back; who refuses it in a secure one, and how."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from deploy.api import RunningCluster, Vm, cluster
from deploy.qmp_client import QmpRefusal, execute
from deploy.status import BalloonStatus
from tests.cluster.vm_files import PROMPT, VmFiles, answer_of, console_end, console_until, make_vm_files

MIB = 1 << 20
MEMORY_BYTES = 64 * MIB
KEPT_BYTES = 4 * MIB
"""What the kernel does not give, whatever the target."""
BALLOON = '\n[[vms.vm1.devices]]\nkind = "virtio-blk"\ndisk = "root"\n\n[[vms.vm1.devices]]\nkind = "virtio-balloon"\n'
NORMAL = 'command_line = "svm=off"\n'
STOPPED = "queue 0: the VM is secure: its pages are not the host's to take"


@dataclass
class World:
    """One VM with a balloon, the model kernel at its prompt."""

    running: RunningCluster
    vm: Vm
    files: VmFiles
    boot: str

    async def pefbox(self, *words: str) -> subprocess.CompletedProcess[bytes]:
        """`pefbox ... --cluster`."""
        line = [sys.executable, "-m", "deploy.cli", *words, "--cluster", self.running.name]
        return await trio.run_process(line, capture_stdout=True, capture_stderr=True, check=False)

    async def refused(self, *words: str) -> str:
        """The line that a command gives instead of doing anything."""
        done = await self.pefbox(*words)
        assert done.returncode == 1
        return done.stderr.decode().removeprefix("pefbox: ").removesuffix("\n")

    async def qmp(self, command: str, **arguments: int) -> Any:  # noqa: ANN401
        """A command on the monitor, past all that `pefbox balloon` checks."""
        path = (await self.vm.row()).qmp
        assert path is not None
        return await trio.to_thread.run_sync(execute, path, command, arguments or None)

    async def balloon(self) -> BalloonStatus:
        """The balloon in `pefbox status`."""
        balloon = (await self.vm.row()).balloon
        assert balloon is not None
        return balloon

    async def until_actual(self, n_bytes: int) -> BalloonStatus:
        """The balloon, as soon as the guest has so much memory."""

        def reached(balloon: BalloonStatus | None) -> bool:
            return balloon is not None and balloon.actual_bytes == n_bytes

        await self.vm.wait(lambda row: reached(row.balloon), f"at {n_bytes} bytes", 20.0)
        return await self.balloon()

    async def ask(self, line: str) -> str:
        """The answer of a prompt command."""
        return answer_of(await self.vm.console_command(line))

    async def ballooned(self) -> int:
        """Pages in the balloon, as the page table has it."""
        found = re.search(r" balloon=(\d+)", await self.ask("pages"))
        assert found is not None
        return int(found[1])

    async def check_hash(self) -> None:
        """Disk, page cache, rings, swiotlb: all that the kernel has is as it was."""
        size = self.files.layout.size_bytes
        assert await self.ask("hash") == f"ok {self.files.sha256()} {size}"


@asynccontextmanager
async def world(directory: Path, *, guest: str = "", platform: bool = False) -> AsyncIterator[World]:
    extra = BALLOON + f"access_platform = {str(platform).lower()}\n"
    files = make_vm_files(directory, guest=guest, extra=extra)
    async with cluster(files.cluster_file, state_dir=files.state_dir) as running:
        vm = running.vm("vm1")
        yield World(running, vm, files, await console_until(vm, PROMPT))


async def test_a_normal_vm_gives_memory_and_takes_it_back_and_when_it_turns_secure_its_driver_refuses(
    tmp_path: Path,
) -> None:
    async with world(tmp_path, guest=NORMAL) as one:
        await one.check_hash()
        assert await one.ask("balloon") == "ok target 0 actual 0 pages"

        await check_inflation(one)
        await check_a_part_comes_back(one)
        await check_a_target_out_of_reach(one)
        await check_all_comes_back(one)
        await check_it_turns_secure_with_pages_in_the_balloon(one)


async def check_inflation(one: World) -> None:
    assert (await one.pefbox("balloon", "vm1", "32M")).returncode == 0
    status = await one.until_actual(32 * MIB)
    assert 32 * MIB - MIB < status.discarded_bytes <= 32 * MIB
    assert await one.ask("balloon") == "ok target 512 actual 512 pages"
    assert await one.ballooned() == 512
    await one.check_hash()


async def check_a_part_comes_back(one: World) -> None:
    await one.qmp("balloon", value=48 * MIB)
    status = await one.until_actual(48 * MIB)
    assert await one.ballooned() == 256
    assert status.discarded_bytes <= 32 * MIB
    await one.check_hash()


async def check_a_target_out_of_reach(one: World) -> None:
    """The driver gives what it can, says so once, and the kernel goes on."""
    since = await console_end(one.vm)
    await one.qmp("balloon", value=MIB)
    said = await console_until(one.vm, "no more can be spared", since=since)
    assert re.search(r"pefbox: balloon: 1008 pages wanted, [89]\d\d given: no more can be spared", said)
    assert KEPT_BYTES < (await one.balloon()).actual_bytes < 16 * MIB
    assert (await one.ask("pages")).startswith("ok free=64 ")
    assert await one.ask("id") == "ok root"


async def check_all_comes_back(one: World) -> None:
    await one.qmp("balloon", value=MEMORY_BYTES)
    await one.until_actual(MEMORY_BYTES)
    assert await one.ballooned() == 0
    await one.check_hash()


async def check_it_turns_secure_with_pages_in_the_balloon(one: World) -> None:
    """The frames that the host has back are the secure VM's as any other; its driver begins with an empty balloon."""
    await one.qmp("balloon", value=32 * MIB)
    await one.until_actual(32 * MIB)
    since = await console_end(one.vm)
    await one.vm.console_write(b"esm\r")

    refusal = "pefbox: balloon: 512 pages wanted, 0 given: the VM is secure, the host has no use for its pages"
    await console_until(one.vm, refusal, since=since)

    assert (await one.vm.row()).secure
    assert await one.ask("balloon") == "ok target 512 actual 0 pages"
    balloon = await one.balloon()
    assert (balloon.actual_bytes, balloon.discarded_bytes, balloon.reason) == (MEMORY_BYTES, 0, None)
    assert await one.refused("balloon", "vm1", "48M") == (
        "balloon is not possible: vm1 is secure: "
        "the balloon would hand private pages to the host, which gains nothing by them"
    )
    await one.check_hash()


async def test_a_driver_without_the_quirk_is_stopped_by_kvm_and_the_vm_loses_nothing(tmp_path: Path) -> None:
    """Rings and page numbers are shared as the design has it, so the device gets the numbers of private pages."""
    async with world(tmp_path, guest="options = { balloon_quirk = false }") as one:
        since = await console_end(one.vm)
        assert await one.qmp("balloon", value=32 * MIB) == {}
        await console_until(one.vm, "pefbox: balloon: the device needs a reset", since=since)

        balloon = await one.balloon()
        assert balloon.reason == STOPPED
        assert (balloon.actual_bytes, balloon.discarded_bytes) == (MEMORY_BYTES, 0)
        assert STOPPED in (await one.pefbox("status")).stdout.decode()
        assert await one.ask("balloon") == "error the device needs a reset"
        assert "discard refused" in one.running.process("alpha/kvm").log()
        with pytest.raises(QmpRefusal, match=f"The balloon device has stopped: {STOPPED}"):
            await one.qmp("balloon", value=48 * MIB)

        await one.check_hash()
        row = await one.vm.row()
        assert row.secure
        assert row.pages["paged_out"] == 0


async def test_without_quirk_and_without_shared_rings_the_device_reads_ciphertext(tmp_path: Path) -> None:
    """`ddw-identity` uses the DMA API only where ACCESS_PLATFORM was taken, which a balloon's driver never does."""
    guest = 'dma = "ddw-identity"\noptions = { balloon_quirk = false }'
    async with world(tmp_path, guest=guest) as one:
        balloon = await one.balloon()
        assert balloon.reason is not None
        assert balloon.reason.startswith("queue ")
        assert (balloon.actual_bytes, balloon.discarded_bytes) == (MEMORY_BYTES, 0)
        await one.check_hash()


async def test_a_device_that_insists_on_access_platform_refuses_the_driver(tmp_path: Path) -> None:
    async with world(tmp_path, guest=NORMAL, platform=True) as one:
        assert "pefbox: balloon: the device refuses the features (FEATURES_OK)" in one.boot
        balloon = await one.balloon()
        assert balloon.reason == "the driver does not accept VIRTIO_F_ACCESS_PLATFORM"
        assert await one.ask("balloon") == "error the device refuses the features (FEATURES_OK)"
        await one.check_hash()
