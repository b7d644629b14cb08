"""A cluster of two hosts and a VM with a disk that moves between them, for tests: what it must not lose on the way."""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from deploy.api import RunningCluster, Vm, cluster
from deploy.cluster_file import read_cluster_file
from deploy.demo_files import write_model_disk
from protocol.errors import UserError
from services.ultravisor.identity import ensure_keys
from shared.boot_partition import ALIGN_BYTES, DiskLayout
from tests.cluster.vm_files import CONSOLE_SECONDS, PROMPT, answer_of, console_end, console_until

DATA_BYTES = 4 << 20
HOSTS = ("alpha", "beta")
FILLED_GFNS = (700, 701, 702)
"""Free pages of the kernel, as far as `fill` goes."""

_CLUSTER = """
name = "{name}"
[hosts.alpha]
secure_memory = "256M"
[hosts.beta]
secure_memory = "256M"
{hosts}
[vms.vm1]
host = "alpha"
memory = "64M"
time = "{time}"
secure = {secure}
{vm}
[vms.vm1.guest]
command_line = "svm={switch}"
[vms.vm1.disks.root]
path = "{disk}"
"""


@dataclass(frozen=True, slots=True)
class Traveller:
    """The VM, and its disk as the host sees it."""

    running: RunningCluster
    vm: Vm
    disk: Path
    layout: DiskLayout

    async def ask(self, line: str, seconds: float = CONSOLE_SECONDS) -> str:
        """The answer line of a command; raises UserError when there is none."""
        return answer_of(await self.vm.console_command(line, seconds=seconds))

    async def fill(self, byte: int) -> list[str]:
        """Fill some pages with `byte`; what they sum up to."""
        for gfn in FILLED_GFNS:
            assert await self.ask(f"fill {gfn} {byte}") == "ok"
        return await self.sums()

    async def sums(self) -> list[str]:
        """SHA-256 of the filled pages, as the guest sees them."""
        return [await self.ask(f"sum {gfn}") for gfn in FILLED_GFNS]

    async def hash_of_disk(self) -> str:
        """SHA-256 of the whole disk, as the guest reads it."""
        answer = await self.ask("hash", seconds=60.0)
        assert answer.startswith("ok "), answer
        return answer.split()[1]

    def hash_on_host(self) -> str:
        """The same, as the host sees it."""
        return hashlib.sha256(self.disk.read_bytes()).hexdigest()

    async def is_secure(self) -> bool:
        """As `status` says."""
        rows = [vm for host in (await self.running.status()).hosts for vm in host.vms if vm.name == "vm1"]
        return bool(rows and rows[0].secure)


@asynccontextmanager
async def travelling(
    directory: Path,
    *,
    secure: bool = True,
    time: str = "wall",
    vm: str = "",
    hosts: str = "",
    name: str = "moving",
    more: str = "",
    record: bool = False,
    service_module: str | None = None,
) -> AsyncIterator[Traveller]:
    """The cluster, with the VM at its prompt on alpha; `vm`, `hosts` and `more` are further lines of its file."""
    file, state_dir, disk = directory / "c.toml", directory / "state", directory / "vm1.img"
    switch = "on" if secure else "off"
    text = _CLUSTER.format(
        name=name, hosts=hosts, time=time, secure=str(secure).lower(), vm=vm, switch=switch, disk=disk
    )
    file.write_text(text + more)
    state_dir.mkdir()
    spec_cluster = read_cluster_file(file)
    for host in HOSTS:
        ensure_keys(state_dir, host)
    data = io.BytesIO(random.Random(5).randbytes(DATA_BYTES))
    spec = spec_cluster.vms[0]
    with disk.open("w+b") as image:
        layout = write_model_disk(spec, state_dir, image, data, ALIGN_BYTES, spec_cluster.homes_of(spec))
    async with cluster(file, state_dir=state_dir, record=record, service_module=service_module) as running:
        traveller = Traveller(running, running.vm("vm1"), disk, layout)
        await console_until(traveller.vm, f"{PROMPT}\r\n> ")
        yield traveller


async def begin(traveller: Traveller, line: str) -> int:
    """Type a command whose answer is awaited later; where the console stands before it."""
    since = await console_end(traveller.vm)
    await traveller.vm.console_write(f"{line}\r".encode())
    return since


async def answer_since(traveller: Traveller, since: int, seconds: float = 60.0) -> str:
    """The answer of a command that was begun at `since`."""
    return answer_of(await console_until(traveller.vm, "\r\nok", "\r\nerror", seconds=seconds, since=since))


async def settled(traveller: Traveller, seconds: float = 30.0) -> str:
    """Where the VM runs, once no migration of it is under way; raises UserError."""
    with trio.move_on_after(seconds):
        while True:
            facts = await traveller.vm.job_info()
            if facts["phase"] in ("done", "failed", "cancelled", "in-doubt"):
                return str(facts["phase"])
            await trio.sleep(0.05)
    raise UserError(f"vm1 is still on its way after {seconds:g} s")
