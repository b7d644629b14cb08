"""One host with one debuggable VM that turns secure: what the tests of ultracalls, refusals and resets stand on."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from deploy.api import RunningCluster, Vm, cluster
from deploy.memory_segments import SHM_DIR
from deploy.qmp_client import execute
from protocol.errors import UserError
from protocol.geometry import PAGE_BYTES
from services.ultravisor.audit import AuditLine, audit_path, read_lines

HOST = "alpha"
READY = "pefbox: ready"
MEMORY_BYTES = 64 << 20
N_PAGES = MEMORY_BYTES // PAGE_BYTES

TEMPLATE = """
make = "demo"
[hosts.alpha]
secure_memory = "{secure_memory}"
[vms.vm1]
host = "alpha"
memory = "64M"
secure = {secure}
debuggable = true
[vms.vm1.guest]
boot = "kernel"
image = "@state/vm1.image"
initrd = "@state/vm1.initrd"
esm_blob = "@state/vm1.blob"
command_line = "{command_line}"
workload = "prompt"
"""


class Rig:
    """A running cluster with `vm1` on host `alpha`."""

    def __init__(self, running: RunningCluster, state_dir: Path) -> None:
        self.cluster = running
        self.state_dir = state_dir
        self.vm: Vm = running.vm("vm1")
        self.ultravisor = running.process(f"{HOST}/ultravisor")
        self.kvm = running.process(f"{HOST}/kvm")

    # -- the guest --------------------------------------------------------------------------------------------

    async def printed(self, since: int = 0) -> str:
        """Console output from `since` on."""
        data, _ = await self.vm.console_read(since)
        return data.decode(errors="replace")

    async def console_end(self) -> int:
        """Where the console output ends now."""
        return (await self.vm.console_read())[1]

    async def booted(self, since: int = 0, seconds: float = 20.0) -> str:
        """Console output from `since` up to the kernel's first prompt."""
        text, at = b"", since
        with trio.move_on_after(seconds):
            while True:
                data, at = await self.vm.console_read(at, 0.2)
                text += data
                if READY.encode() in text and text.endswith(b"> "):
                    return text.decode(errors="replace").replace("\r\n", "\n")
        raise UserError(f"vm1 is not up within {seconds:g} s: {text[-300:]!r}")

    async def ask(self, line: str) -> str:
        """A command at the prompt; its answer without line ends."""
        return (await self.vm.console_command(line)).strip()

    async def free_gfn(self) -> int:
        """A page that the guest does not use."""
        for gfn in range(N_PAGES - 40, 0, -1):
            if await self.ask(f"fill {gfn} 0") == "ok":
                return gfn
        raise UserError("no free page")

    # -- the machine ------------------------------------------------------------------------------------------

    async def reset(self) -> int:
        """QMP system_reset; where the console output of the new start begins."""
        since = await self.console_end()
        await trio.to_thread.run_sync(execute, await self.monitor(), "system_reset")
        return since

    async def monitor(self) -> str:
        """pefbox's own QMP socket of the VM."""
        user = (await self.vm.row()).qmp
        assert user is not None
        return user

    async def account(self) -> int:
        """Bytes of secure memory that the host's ultravisor has given out."""
        return int((await self.ultravisor.query("account"))["used_bytes"])

    async def last_esm(self) -> dict[str, Any]:
        """The outcome of the last UV_ESM as `status` shows it."""
        outcome = (await self.vm.row()).last_esm
        assert isinstance(outcome, dict)
        return outcome

    async def page_state(self, gfn: int) -> tuple[str, str]:
        """The state of a page for the ultravisor and for kvm."""
        arguments = {"vm": "vm1", "gpa": gfn * PAGE_BYTES}
        secure = await self.ultravisor.query("page.secure", arguments)
        host = await self.kvm.query("page.host", arguments)
        return secure["state"], host["state"]

    async def move(self, direction: str, gfn: int, n_pages: int = 1) -> dict[str, int]:
        """Have kvm page out or in; how often each code came."""
        arguments = {"vm": "vm1", "gpa": gfn * PAGE_BYTES, "n": n_pages}
        answer = await self.kvm.query(f"page.{direction}", arguments, 5.0)
        codes: dict[str, int] = answer["codes"]
        return codes

    def audit(self, event: str | None = None) -> list[AuditLine]:
        """Audit lines of the VM, all or of one event."""
        lines = [line for line in self.all_audit() if line.vm == "vm1"]
        return [line for line in lines if event in (None, line.event)]

    def all_audit(self) -> list[AuditLine]:
        """Every audit line of the host."""
        with audit_path(self.state_dir, HOST).open("rb") as log:
            return list(read_lines(log))

    def expect_no_internal_error(self) -> None:
        """No process met an exception that it did not foresee."""
        for process in (self.ultravisor, self.kvm, self.vm.qemu, self.vm.guest):
            assert '"internal error"' not in process.log(), process.target

    def ram(self) -> mmap.mmap:
        """The VM's RAM segment, as whoever has the host's memory reaches it."""
        (name,) = [name for name in os.listdir(SHM_DIR) if name.startswith(f"pefbox-{self.cluster.name}-vm1-")]
        fd = os.open(SHM_DIR / name, os.O_RDWR)
        try:
            return mmap.mmap(fd, MEMORY_BYTES)
        finally:
            os.close(fd)

    def file(self, what: str) -> Path:
        """`image`, `initrd` or `blob` of the VM; read again at every reset."""
        return self.state_dir / f"vm1.{what}"


def change_in_place(path: Path, change: Callable[[bytearray], object]) -> None:
    """Change a file that other processes hold open: its inode stays."""
    with path.open("r+b") as file:
        data = bytearray(file.read())
        change(data)
        file.seek(0)
        file.write(data)
        file.truncate()


def page_digests(ram: mmap.mmap) -> list[bytes]:
    """A digest of every page."""
    view = memoryview(ram)
    try:
        return [hashlib.blake2b(view[at : at + PAGE_BYTES]).digest() for at in range(0, len(ram), PAGE_BYTES)]
    finally:
        view.release()


def changed_pages(before: list[bytes], after: list[bytes]) -> set[int]:
    """GFNs whose digest differs."""
    return {gfn for gfn, (old, new) in enumerate(zip(before, after, strict=True)) if old != new}


@asynccontextmanager
async def svm_rig(
    directory: Path,
    *,
    secure_memory: str = "128M",
    secure: bool = True,
    command_line: str = "svm=on",
    record: bool = False,
    debug: bool = False,
) -> AsyncIterator[Rig]:
    """The cluster up, its VM at the first prompt."""
    path = directory / "cluster.toml"
    values = {"secure_memory": secure_memory, "secure": str(secure).lower(), "command_line": command_line}
    path.write_text(TEMPLATE.format(**values))
    state_dir = directory / "own-state"
    async with cluster(path, state_dir=state_dir, record=record, debug=debug) as running:
        rig = Rig(running, state_dir)
        await rig.booted()
        yield rig
        rig.expect_no_internal_error()
