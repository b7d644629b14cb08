"""Linux as a secure VM, seen from its host: it finds nothing that the guest wrote, and paging changes nothing (S1, S3).

The guest plants a marker that nobody else knows in page cache, process memory and kernel memory. A normal VM does the
same, where the host does find it.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from deploy.api import RunningCluster, Vm, cluster
from deploy.memory_segments import SHM_DIR
from deploy.run_program import RunOrder, check_program, cluster_text, program_blob
from protocol.geometry import PAGE_BYTES
from tests.needs import need_linux

pytestmark = [pytest.mark.linux, pytest.mark.slow]

MEMORY_BYTES = 256 << 20
N_PAGES = MEMORY_BYTES // PAGE_BYTES
PROMPT = "# \x1b[6n"
"""The shell asks the terminal where its cursor is."""
BOOT_SECONDS = 120.0
ANSWER_SECONDS = 120.0
SEED = "what the host does not know"
MARKER = hashlib.sha256(SEED.encode()).hexdigest()[:40]
PLANT = (
    f"M=$(echo -n {SEED} | sha256sum | cut -c1-40); "
    "echo $M > /tmp/file; hostname $M; KEPT=$M /bin/busybox sleep 10000 & echo $! > /tmp/pid; echo planted"
)
"""The page cache, the kernel's own name, a process's memory; the command line holds the seed alone."""


@asynccontextmanager
async def linux(directory: Path, *, secure: bool) -> AsyncIterator[tuple[RunningCluster, Vm]]:
    """The kernel at its first prompt."""
    image = need_linux()
    order = RunOrder(
        program=Path(image.kernel),
        initrd=Path(image.initramfs),
        secure=secure,
        command_line="console=hvc0 quiet loglevel=0 svm=on swiotlb=force",
        memory_bytes=MEMORY_BYTES,
    )
    blob = program_blob(check_program(order.program, MEMORY_BYTES), order, directory) if secure else None
    (directory / "linux.toml").write_text(cluster_text(order, blob))
    async with cluster(directory / "linux.toml", state_dir=directory) as running:
        vm = running.vm("program")
        await until_prompt(vm)
        yield running, vm


async def until_prompt(vm: Vm) -> None:
    text, since = b"", 0
    with trio.fail_after(BOOT_SECONDS):
        while not text.endswith(PROMPT.encode()):
            data, since = await vm.console_read(since, 1.0)
            text += data
            row = await vm.row()
            assert row.state == "running", (row.reason, text[-500:])


async def ask(vm: Vm, line: str) -> str:
    """A command at the prompt; the last line of its answer."""
    answer = await vm.console_command(line, PROMPT, ANSWER_SECONDS)
    # Before it stands the echo of the line, after it the directory that the prompt names.
    return answer.splitlines()[-2].strip()


def normal_ram(running: RunningCluster) -> bytes:
    (name,) = [name for name in os.listdir(SHM_DIR) if name.startswith(f"pefbox-{running.name}-program-")]
    return (SHM_DIR / name).read_bytes()


def found(memory: bytes) -> int:
    """How often the marker is there, as text or as bytes."""
    return memory.count(MARKER.encode()) + memory.count(bytes.fromhex(MARKER))


async def test_the_host_finds_what_a_normal_vm_wrote(tmp_path: Path) -> None:
    async with linux(tmp_path, secure=False) as (running, vm):
        assert await ask(vm, PLANT) == "planted"

        assert found(normal_ram(running)) >= 3


async def test_the_host_finds_nothing_that_a_secure_vm_wrote_and_paging_changes_nothing(tmp_path: Path) -> None:
    async with linux(tmp_path, secure=True) as (running, vm):
        assert await ask(vm, "cat /sys/devices/system/cpu/svm") == "1"
        assert await ask(vm, PLANT) == "planted"
        digest = await ask(vm, "sha256sum /bin/busybox")

        assert found(normal_ram(running)) == 0
        pages = (await vm.row()).pages
        assert pages["secure"] is not None
        assert pages["secure"] > N_PAGES // 4

        assert await press(running, 0.3) > 0.1 * N_PAGES
        assert found(normal_ram(running)) == 0
        assert await ask(vm, "sha256sum /bin/busybox") == digest
        assert await ask(vm, "cat /tmp/file") == MARKER
        assert await ask(vm, "hostname") == MARKER
        assert await ask(vm, "tr '\\0' '\\n' < /proc/$(cat /tmp/pid)/environ | grep KEPT") == f"KEPT={MARKER}"


async def press(running: RunningCluster, share: float) -> int:
    """Have kvm page out this share of all pages, at random; how many went."""
    kvm, gone = running.process("host/kvm"), 0
    for gfn in random.Random(1).sample(range(N_PAGES), int(share * N_PAGES)):
        answer = await kvm.query("page.out", {"vm": "program", "gpa": gfn * PAGE_BYTES, "n": 1}, 5.0)
        gone += answer["codes"].get("H_SUCCESS", 0)
    return gone
