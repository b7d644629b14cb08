"""Who holds and maps which memory: every process of a running cluster against the table of docs/isolation.md.

The facts come from the kernel (/proc/PID/fd, /proc/PID/maps), not from the processes. A cluster of an ordinary user is
started with `debug`, since the kernel shows nobody but root the descriptors of a process that is not dumpable.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import stat
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from deploy.api import RunningCluster
from tests.cluster.conftest import own_directories
from tests.cluster.two_hosts import N_PAGES, VM_OF, cluster_text, pids, running_hosts, templates_of, until, vm_text

__all__ = ["own_directories"]

pytestmark = pytest.mark.cold

NORMAL_VM = ("alpha", "vm3")
SECURE_VMS = [*VM_OF.items()]
F_SEAL_FUTURE_WRITE = 0x0010
ALWAYS_SEALED = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
READ_ONLY_FOR_OTHERS = frozenset({"view", "map", "tce"})

Access = dict[str, str]
"""Target -> `fd` (a descriptor, no mapping), `r` or `rw` (mapped so)."""
Table = Counter[tuple[str, frozenset[tuple[str, str]]]]
"""How many memory files of a kind are reached so by exactly these."""


@dataclass
class MemoryFile:
    """One memory file (by inode) and who reaches it how."""

    kind: str
    path: str
    maps: dict[str, set[str]] = field(default_factory=dict)
    fds: dict[str, list[int]] = field(default_factory=dict)

    @property
    def access(self) -> Access:
        """By target."""
        held = dict.fromkeys(self.fds, "fd")
        return held | {target: " ".join(sorted(modes)) for target, modes in self.maps.items()}


# -- what the table says --------------------------------------------------------------------------------------------


def expected_table(secure: list[tuple[str, str]], normal: list[tuple[str, str]]) -> Table:
    """The table of docs/isolation.md for VMs given as (host, VM)."""
    rows: Table = Counter()
    for host, vm in (*secure, *normal):
        uv, kvm, qemu, guest = f"{host}/ultravisor", f"{host}/kvm", f"{vm}/qemu", f"{vm}/guest"
        rows += _rows(
            ("ram", {uv: "fd", kvm: "rw", qemu: "rw", guest: "rw"}),
            ("stream", {uv: "rw", kvm: "rw", qemu: "rw"}),
            ("view", {kvm: "rw", qemu: "r"}),
            ("dirty", {guest: "rw", kvm: "rw"}),
            ("dirty", {guest: "rw", uv: "rw"}),
            ("dirty", {qemu: "rw", kvm: "rw"}),
            ("tce", {kvm: "rw", qemu: "r"}),
        )
        if (host, vm) in secure:
            # The guest of a secure VM has dropped kvm's map: the ultravisor's is the one in force.
            rows += _rows(("secure", {uv: "rw", guest: "rw"}), ("map", {uv: "rw", guest: "r"}), ("map", {kvm: "rw"}))
        else:
            rows += _rows(("map", {kvm: "rw", guest: "r"}))
    return rows


def _rows(*rows: tuple[str, Access]) -> Table:
    return Counter((kind, frozenset(access.items())) for kind, access in rows)


# -- what the kernel says -------------------------------------------------------------------------------------------


def memory_files(targets: dict[str, int]) -> list[MemoryFile]:
    """Every memory file that any of the processes holds or maps."""
    found: dict[tuple[int, int], MemoryFile] = {}
    for target, pid in targets.items():
        for fd, path, inode in descriptors_of(pid):
            if (kind := kind_of(path)) is not None:
                found.setdefault(inode, MemoryFile(kind, path)).fds.setdefault(target, []).append(fd)
        for path, inode, mode in mappings_of(pid):
            if (kind := kind_of(path)) is not None:
                found.setdefault(inode, MemoryFile(kind, path)).maps.setdefault(target, set()).add(mode)
    return list(found.values())


def table_of(files: list[MemoryFile]) -> Table:
    """In the form of `expected_table`."""
    return Counter((file.kind, frozenset(file.access.items())) for file in files)


def kind_of(path: str) -> str | None:
    """What a memory file is for; None for any other file."""
    if path.startswith("/dev/shm/"):
        return "ram"
    if path.startswith("/secretmem"):
        return "secure"
    named = re.match(r"/memfd:pefbox-(\w+)-", path)
    if named is None:
        return "unknown" if path.startswith("/memfd:") else None
    return named[1]


def descriptors_of(pid: int) -> Iterator[tuple[int, str, tuple[int, int]]]:
    """(descriptor, path, (device, inode)) of each open file."""
    for name in os.listdir(f"/proc/{pid}/fd"):
        link = f"/proc/{pid}/fd/{name}"
        try:
            path, status = os.readlink(link), os.stat(link)
        except FileNotFoundError:
            continue
        yield int(name), path, (status.st_dev, status.st_ino)


def mappings_of(pid: int) -> Iterator[tuple[str, tuple[int, int], str]]:
    """(path, (device, inode), mode) of each file mapping; mode is `r`, `rw`, or as in proc(5) when it is private."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        parts = line.split(maxsplit=5)
        if len(parts) == 6:
            major, minor = (int(part, 16) for part in parts[3].split(":"))
            mode = {"rw-s": "rw", "r--s": "r"}.get(parts[1], parts[1])
            yield parts[5], (os.makedev(major, minor), int(parts[4])), mode


@asynccontextmanager
async def isolated_cluster(directory: Path) -> AsyncIterator[RunningCluster]:
    """Two hosts with a secure VM each, and a normal VM beside the first."""
    text = cluster_text(VM_OF, vm_text(NORMAL_VM[1], NORMAL_VM[0], secure=False))
    if os.geteuid():
        text = text.replace("secure = ", "debuggable = true\nsecure = ")
    async with running_hosts(directory, text, debug=bool(os.geteuid())) as running:
        for vm in VM_OF.values():
            await running.vm(vm).secure()
        yield running


# -- tests ----------------------------------------------------------------------------------------------------------


async def test_memory_is_held_and_mapped_exactly_as_the_table_says(tmp_path: Path) -> None:
    async with isolated_cluster(tmp_path) as running:
        targets = {**await pids(running), "launcher": running.launcher_pid}

        files = memory_files(targets)

        assert table_of(files) == expected_table(SECURE_VMS, [NORMAL_VM])
        for file in files:
            check_only_its_own_vm(file)
        check_seals(files, targets)
        check_other_descriptors(running, targets)
        check_sockets(targets)
        if os.geteuid() == 0:
            # To anybody else the kernel shows nothing of them.
            assert memory_files({str(pid): pid for pid in templates_of(running.launcher_pid)}) == []
        await check_gone_when_off(running, targets)


def check_only_its_own_vm(file: MemoryFile) -> None:
    """Nobody holds anything of a VM that is not his."""
    vms = {owner for owner, _, role in (target.partition("/") for target in file.access) if role in ("qemu", "guest")}
    named = re.search(r"vm\d", file.path)
    # kvm alone holds its map of a VM that is secure: then the name says whose it is.
    owners = vms | ({named[0]} if named is not None else set())
    assert len(owners) == 1, f"{file.path}: {file.access}"


def check_seals(files: list[MemoryFile], targets: dict[str, int]) -> None:
    """No holder can cut a memory file under a mapping, and who only reads cannot become a writer."""
    sealed = [file for file in files if file.path.startswith("/memfd:")]
    assert {file.kind for file in sealed} >= {"view", "map", "dirty", "tce"}
    for file in sealed:
        if not file.fds:
            # Nobody has a descriptor left to cut it by: who maps a stream buffer closes his.
            assert file.kind == "stream"
            continue
        target, (first, *_) = next(iter(file.fds.items()))
        fd = os.open(f"/proc/{targets[target]}/fd/{first}", os.O_RDWR)
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            read_only = F_SEAL_FUTURE_WRITE if file.kind in READ_ONLY_FOR_OTHERS else 0
            assert seals == ALWAYS_SEALED | read_only, file.path
            with pytest.raises(PermissionError):
                os.ftruncate(fd, 0)
            if read_only:
                with pytest.raises(PermissionError):
                    mmap.mmap(fd, N_PAGES, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
                with pytest.raises(PermissionError):
                    os.pwrite(fd, b"\0", 0)
        finally:
            os.close(fd)


def check_other_descriptors(running: RunningCluster, targets: dict[str, int]) -> None:
    """Beside memory each process holds its own log and record files, sockets, and what its role needs; no more."""
    state = running.paths.state_dir
    for target, pid in targets.items():
        if target == "launcher":
            continue
        owner, _, role = target.partition("/")
        paths = running.paths
        allowed = {"/dev/null", str(paths.log_file(target)), str(paths.stderr_file(target))}
        allowed |= {str(paths.trace_file(target)), "anon_inode:[eventpoll]", "anon_inode:[eventfd]"}
        if role == "ultravisor":
            allowed |= {str(paths.audit_log(owner)), str(paths.ledger(owner))}
        if role == "qemu":
            allowed |= {str(state / f"{owner}.{what}") for what in ("image", "initrd", "blob")}
        held = {path for _, path, _ in descriptors_of(pid) if kind_of(path) is None}
        more = {path for path in held - allowed if not path.startswith("socket:[")}
        assert not more, target


def check_sockets(targets: dict[str, int]) -> None:
    """No end of a socket is in two hands: what ultravisor and guest share, the launcher has no more."""
    holders: dict[tuple[int, int], set[str]] = {}
    for target, pid in targets.items():
        for fd, path, inode in descriptors_of(pid):
            if path.startswith("socket:["):
                assert stat.S_ISSOCK(os.stat(f"/proc/{pid}/fd/{fd}").st_mode)
                holders.setdefault(inode, set()).add(target)
    assert holders
    assert not {inode: who for inode, who in holders.items() if len(who) > 1}


async def check_gone_when_off(running: RunningCluster, targets: dict[str, int]) -> None:
    """A VM that is off has no secure memory: neither its guest nor the ultravisor holds or maps any."""
    await running.vm("vm1").console_write(b"poweroff\r")
    await running.vm("vm1").wait_state("off")
    expected = expected_table([("beta", "vm2")], [("alpha", "vm1"), NORMAL_VM])
    await until(lambda: table_of(memory_files(targets)) == expected, "secure memory is gone")
