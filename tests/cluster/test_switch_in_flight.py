"""A boot stage that does not stop its disk before UV_ESM: what becomes of its requests, its ring, and the secure VM."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deploy.api import Vm, cluster
from tests.cluster.vm_files import PROMPT, VmFiles, answer_of, console_until, make_vm_files

LATE = "tests.attack.late.{role}"
EARLY = "tests.attack.early.{role}"
FIRST_GFN, END_GFN = 0x2EE, 0x300
"""Where the boot stage has buffer, commands and ring, at the end of the first 48 MiB."""
MOVED = "moved behind the IOMMU: the VM turned secure"
LEFT = re.compile(r"reads are left behind: buffer (\w+), commands (\w+), ring (\w+)")


def files_for(directory: Path, design: str, *, quiesce: bool = False) -> VmFiles:
    options = "" if quiesce else "options = { quiesce = false }"
    return make_vm_files(directory, guest=f'dma = "{design}"\n{options}')


async def ask(vm: Vm, line: str) -> str:
    return answer_of(await vm.console_command(line))


WAYS = {"quirk": "guest addresses", "runtime-switch": "window of liobn 0x80000000"}


async def check_disk(vm: Vm, files: VmFiles, design: str) -> None:
    """It was negotiated anew, all of it is read right, and a write gets there."""
    assert (await vm.row()).secure
    assert await ask(vm, "dma") == f"ok disk {WAYS[design]}, bounced"
    for command in ("hash", "write", "hash"):
        answer = await ask(vm, command)
        assert answer.startswith("ok ")
    assert answer == f"ok {files.sha256()} {files.layout.size_bytes}"


def faults_in(vm: Vm) -> list[str]:
    return re.findall(r'"reason": "([^"]*)", "event": "device fault"', vm.qemu.log())


async def left_pages(vm: Vm) -> list[str]:
    """The pages of buffer, commands and ring of before."""
    found = LEFT.search(await console_until(vm, PROMPT))
    assert found
    pages = list(found.groups())
    assert all(FIRST_GFN <= int(gfn, 16) < END_GFN for gfn in pages)
    return pages


@pytest.mark.parametrize("design", ["quirk", "runtime-switch"])
async def test_requests_that_end_after_the_switch_spoil_their_pages_and_nothing_else(
    tmp_path: Path, design: str
) -> None:
    files = files_for(tmp_path, design)
    async with cluster(files.cluster_file, state_dir=files.state_dir, service_module=LATE) as running:
        vm = running.vm("vm1")
        buffer, _, ring = await left_pages(vm)

        await check_disk(vm, files, design)

        (fault,) = faults_in(vm)
        if design == "quirk":
            # It went on with the old ring, and read the image of a private page.
            assert fault.startswith("queue 0: ")
        else:
            assert fault == MOVED
            assert await ask(vm, f"touch {ring}") == "ok 0x00", "the device left the old ring alone"
        await vm.console_write(f"touch {buffer}\r".encode())
        row = await vm.wait(lambda row: row.state == "failed", "failed")
        assert "page-integrity" in row.reason
        assert "Traceback" not in vm.qemu.log()


async def test_a_ring_that_the_device_went_on_with_is_spoiled_too(tmp_path: Path) -> None:
    files = files_for(tmp_path, "quirk")
    async with cluster(files.cluster_file, state_dir=files.state_dir, service_module=LATE) as running:
        vm = running.vm("vm1")
        _, _, ring = await left_pages(vm)

        await vm.console_write(f"touch {ring}\r".encode())

        assert "page-integrity" in (await vm.wait(lambda row: row.state == "failed", "failed")).reason


@pytest.mark.parametrize(("design", "faults"), [("quirk", []), ("runtime-switch", [MOVED])])
async def test_requests_that_end_before_the_switch_do_no_harm(tmp_path: Path, design: str, faults: list[str]) -> None:
    files = files_for(tmp_path, design)
    async with cluster(files.cluster_file, state_dir=files.state_dir, service_module=EARLY) as running:
        vm = running.vm("vm1")
        pages = await left_pages(vm)

        await check_disk(vm, files, design)

        assert faults_in(vm) == faults
        for gfn in pages:
            assert await ask(vm, f"touch {gfn}") == "ok 0x00"


@pytest.mark.parametrize("design", ["quirk", "runtime-switch"])
async def test_a_disk_that_was_stopped_writes_nothing_after_the_switch(tmp_path: Path, design: str) -> None:
    """The control: the same slow disk, and a boot stage that stops it."""
    files = files_for(tmp_path, design, quiesce=True)
    async with cluster(files.cluster_file, state_dir=files.state_dir, service_module=LATE) as running:
        vm = running.vm("vm1")
        assert "left behind" not in await console_until(vm, PROMPT)

        await check_disk(vm, files, design)

        assert faults_in(vm) == []
        for gfn in range(FIRST_GFN, END_GFN):
            assert await ask(vm, f"touch {gfn:#x}") == "ok 0x00"
