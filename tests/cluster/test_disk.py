"""virtio-blk on a real image, from the guest's prompt down to the file: every request, and what the host refuses."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from deploy.api import RunningCluster, Vm, cluster
from deploy.launcher_process import SpawnedLauncher
from deploy.run_dirs import default_paths
from protocol.errors import UserError
from services.guest.model.region_writer import REGION_BYTES, region_pattern
from services.guest.model.virtqueue import QueueError
from tests.cluster.vm_files import PROMPT, VmFiles, answer_of, console_until, make_vm_files

START_SECONDS = 20
HOSTILE = "tests.attack.hostile.{role}"


async def ask(vm: Vm, line: str) -> str:
    return answer_of(await vm.console_command(line))


def disk_errors(running: RunningCluster) -> list[str]:
    return [line for line in running.vm("vm1").qemu.log().splitlines() if "disk error" in line]


@pytest.mark.parametrize("secure", [True, False], ids=["secure", "normal"])
async def test_every_request_reaches_the_image(tmp_path: Path, secure: bool) -> None:
    files = make_vm_files(tmp_path, guest="" if secure else 'command_line = "svm=off"')
    async with cluster(files.cluster_file, state_dir=files.state_dir) as running:
        vm = running.vm("vm1")
        await console_until(vm, PROMPT)
        assert (await vm.row()).secure is secure

        assert await ask(vm, "hash") == f"ok {files.sha256()} {files.layout.size_bytes}"
        digest = hashlib.sha256(region_pattern(1, REGION_BYTES)).hexdigest()
        first = files.layout.scratch.offset_bytes // 512
        assert await ask(vm, "write") == f"ok {first} {REGION_BYTES // 512} sha256 {digest}"
        assert files.scratch(REGION_BYTES) == region_pattern(1, REGION_BYTES)
        assert await ask(vm, "hash") == f"ok {files.sha256()} {files.layout.size_bytes}"
        assert (await ask(vm, "zero")).startswith("ok ")
        assert files.scratch(REGION_BYTES) == bytes(REGION_BYTES)
        assert (await ask(vm, "write")).startswith("ok ")
        assert files.scratch(REGION_BYTES) == region_pattern(2, REGION_BYTES)
        blocks = os.stat(files.disk).st_blocks
        assert (await ask(vm, "discard")).startswith("ok ")
        assert os.stat(files.disk).st_blocks == blocks - REGION_BYTES // 512
        assert await ask(vm, "id") == "ok root"
        assert disk_errors(running) == []


async def test_a_readonly_disk_is_read_and_never_written(tmp_path: Path) -> None:
    files = make_vm_files(tmp_path, readonly=True)
    before = files.sha256()
    async with cluster(files.cluster_file, state_dir=files.state_dir) as running:
        vm = running.vm("vm1")
        await console_until(vm, PROMPT)

        assert await ask(vm, "hash") == f"ok {before} {files.layout.size_bytes}"
        assert [await ask(vm, command) for command in ("write", "zero", "discard")] == [
            "error the disk is read-only"
        ] * 3
        assert await ask(vm, "id") == "ok root"
    assert files.sha256() == before


async def test_options_of_the_cluster_file_reach_the_kernel_through_its_measured_image(tmp_path: Path) -> None:
    files = make_vm_files(tmp_path, guest="options = { swiotlb_slots = 512, page_cache = false }")
    async with cluster(files.cluster_file, state_dir=files.state_dir) as running:
        vm = running.vm("vm1")
        await console_until(vm, PROMPT)

        assert " slots=512 " in await ask(vm, "pages")
        assert await ask(vm, "hash") == f"ok {files.sha256()} {files.layout.size_bytes}"


async def test_bad_requests_are_refused_by_status_and_a_chain_without_one_ends_the_queue(tmp_path: Path) -> None:
    files = make_vm_files(tmp_path)
    before = files.sha256()
    async with cluster(files.cluster_file, state_dir=files.state_dir, service_module=HOSTILE) as running:
        vm = running.vm("vm1")
        await console_until(vm, PROMPT)

        assert [await ask(vm, "write") for _ in range(3)] == ["error UNSUPP", "error IOERR", "error IOERR"]
        assert await ask(vm, "hash") == f"ok {before} {files.layout.size_bytes}"
        assert (await vm.qemu.query("vm.status"))["faults"] == {}
        assert await ask(vm, "write") == f"error queue 0: {QueueError.NO_ANSWER.value}"

        faults = [line for line in vm.qemu.log().splitlines() if "device fault" in line]
        assert len(faults) == 1 and "no block request" in faults[0]
        assert await ask(vm, "hash") == f"error queue 0: {QueueError.NO_ANSWER.value}"
        assert (await vm.row()).secure
        assert files.sha256() == before


async def test_a_full_host_file_system_is_ioerr_to_the_guest_and_one_line_to_the_operator(tmp_path: Path) -> None:
    files = make_vm_files(tmp_path)
    small = tmp_path / "small"
    small.mkdir()
    text = files.cluster_file.read_text().replace(str(files.disk), str(small / files.disk.name))
    files.cluster_file.write_text(text)
    async with cluster_on_small_file_system(files, small) as running:
        vm = running.vm("vm1")
        await vm.secure()
        await console_until(vm, PROMPT)

        assert await ask(vm, "write") == "error IOERR"
        errors = disk_errors(running)
        assert len(errors) == 1 and os.strerror(28) in errors[0]
        assert (await ask(vm, "hash")).startswith("ok ")
        assert (await vm.row()).state == "running"


@asynccontextmanager
async def cluster_on_small_file_system(files: VmFiles, mount_point: Path) -> AsyncIterator[RunningCluster]:
    """A launcher in a mount namespace of its own, where the disk lies on a file system that has no room left."""
    name = f"enospc-{os.getpid()}"
    launcher = start_in_namespace(files, mount_point, name)
    running = RunningCluster(name, default_paths(name, files.state_dir), launcher)
    try:
        await wait_until_up(running)
        yield running
    finally:
        with trio.CancelScope(shield=True):
            await running.down()


def start_in_namespace(files: VmFiles, mount_point: Path, name: str) -> SpawnedLauncher:
    """`pefbox up` in the namespace; skips where there are none."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("no user and mount namespaces here")
    up = f"exec {sys.executable} -m deploy.cli up {files.cluster_file} --name {name} --state {files.state_dir}"
    mount = f"mount -t tmpfs -o size={files.layout.size_bytes} none {mount_point}"
    # The image keeps its holes; what would be left for them goes to another file, until there is nothing left.
    fill = f"{{ cat /dev/zero > {mount_point}/filler || true; }}"
    script = f"{mount} && cp --sparse=always {files.disk} {mount_point}/ && {fill} && {up}"
    command = ["unshare", "-rm", "sh", "-c", script]
    return SpawnedLauncher(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


async def wait_until_up(running: RunningCluster) -> None:
    with trio.fail_after(START_SECONDS):
        for _ in itertools.count():
            if await is_up(running):
                return
            await trio.sleep(0.05)


async def is_up(running: RunningCluster) -> bool:
    try:
        return (await running.vm("vm1").row()).state == "running"
    except UserError:
        return False
