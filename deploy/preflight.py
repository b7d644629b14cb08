"""What must hold on this machine before anything of a cluster is started.

All findings are collected, so that one `up` names every mistake. Nothing is made or changed here.
"""

from __future__ import annotations

import importlib.util
import os
import resource
import stat
from dataclasses import dataclass
from pathlib import Path

from deploy import plan
from deploy.cluster_file import Cluster
from deploy.memory_segments import SHM_DIR
from deploy.plan import ProcessPlan
from deploy.run_dirs import Paths
from protocol.control import MAX_DESCRIPTORS
from protocol.errors import UserError
from protocol.roles import Role
from protocol.startup import MACHINE_KERNEL

MAX_SOCKET_PATH_BYTES = 107
"""sun_path of sockaddr_un holds 108 bytes with its terminating zero (unix(7))."""

ENGINE_PACKAGE = "unicorn"
INSTALL_ENGINE = "pip install 'pefbox[machine]'"

PROCESS_BYTES = 64 << 20
"""Anonymous memory that one process needs at least, measured for an idle kvm."""

_DESCRIPTORS_A_PROCESS = 48
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Machine:
    """What this machine has free."""

    shm_free_bytes: int
    memory_available_bytes: int
    open_files_limit: int

    @classmethod
    def here(cls) -> Machine:
        """Measured now."""
        shm = os.statvfs(SHM_DIR)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = hard if hard != resource.RLIM_INFINITY else 1 << 30
        return cls(shm.f_bavail * shm.f_frsize, _memory_available_bytes(), max(soft, limit))


def _memory_available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise UserError("/proc/meminfo names no MemAvailable")


def check(cluster: Cluster, paths: Paths, machine: Machine) -> None:
    """Raise UserError with every finding, one a line."""
    findings = [
        *memory_findings(cluster, machine),
        *descriptor_findings(cluster, machine),
        *path_findings(cluster, paths),
        *file_findings(cluster),
        *engine_findings(cluster),
    ]
    if findings:
        raise UserError("\n".join(f"{cluster.path}: {finding}" for finding in findings))


def memory_findings(cluster: Cluster, machine: Machine) -> list[str]:
    """Space in /dev/shm for all RAM, and memory for all processes and pages."""
    findings = []
    ram_bytes = sum(vm.memory_bytes for vm in cluster.vms)
    if ram_bytes > machine.shm_free_bytes:
        findings.append(
            f"the VMs have {_mib(ram_bytes)} of RAM but /dev/shm has {_mib(machine.shm_free_bytes)} free: "
            "give them less `memory`, or enlarge it: mount -o remount,size=... /dev/shm"
        )
    # A page lies in normal RAM or in secure memory: one VM never fills both.
    wanted_bytes = ram_bytes + PROCESS_BYTES * len(plan.cluster_processes(cluster))
    if wanted_bytes > machine.memory_available_bytes:
        findings.append(
            f"the cluster needs {_mib(wanted_bytes)} of memory but {_mib(machine.memory_available_bytes)} is available:"
            " give the VMs less `memory`"
        )
    return findings


def descriptor_findings(cluster: Cluster, machine: Machine) -> list[str]:
    """Open files of the launcher, and descriptors that one start message can carry."""
    findings = []
    processes = plan.cluster_processes(cluster)
    wanted = 64 + sum(len(plan.descriptors(process, cluster)) + 2 for process in processes)
    if max(wanted, _DESCRIPTORS_A_PROCESS) > machine.open_files_limit:
        findings.append(f"{wanted} open files are needed, the limit is {machine.open_files_limit}: ulimit -n {wanted}")
    for process in processes:
        n = len(plan.descriptors(process, cluster))
        if n > MAX_DESCRIPTORS:
            what = "disks" if process.role is Role.QEMU else "VMs on the host"
            findings.append(
                f"{process.target} would need {n} descriptors of at most {MAX_DESCRIPTORS}: too many {what}"
            )
    return findings


def path_findings(cluster: Cluster, paths: Paths) -> list[str]:
    """Every Unix socket must have a path short enough to bind."""
    sockets = [str(paths.launcher_socket)]
    sockets += [str(link.socket_path) for link in plan.cluster_links(cluster, paths)]
    for process in plan.cluster_processes(cluster) + _moved_processes(cluster):
        sockets += [path for path in plan.monitor_sockets(paths, process) if path is not None]
    moves = {vm.name: 1 for vm in cluster.vms} if len(cluster.hosts) > 1 else {}
    sockets += [str(link.socket_path) for link in plan.network_links(paths, cluster, moves, moves)]
    longest = max(sockets, key=lambda path: len(os.fsencode(path)))
    # A restarted VM's incarnation may take three more digits.
    n_bytes = len(os.fsencode(longest)) + 3
    if n_bytes <= MAX_SOCKET_PATH_BYTES:
        return []
    return [
        f"socket path {longest} is {n_bytes - MAX_SOCKET_PATH_BYTES} bytes too long: "
        "take shorter names, or a shorter XDG_RUNTIME_DIR"
    ]


def _moved_processes(cluster: Cluster) -> list[ProcessPlan]:
    """Those of the VMs after a move, whose directories have longer names."""
    if len(cluster.hosts) < 2:
        return []
    return [process for vm in cluster.vms for process in plan.vm_processes(vm, move=1)]


def file_findings(cluster: Cluster) -> list[str]:
    """Every disk, image and blob exists and can be opened; no writable disk is used twice."""
    findings = []
    writable: dict[tuple[int, int], str] = {}
    for vm in cluster.vms:
        for disk in vm.disks:
            key = f"vms.{vm.name}.disks.{disk.name}.path"
            mode = os.R_OK if disk.readonly else os.R_OK | os.W_OK
            findings += _file_findings(key, disk.path, mode)
            findings += _shared_disk(key, disk.path, disk.readonly, writable)
        for name in plan.GUEST_FILES:
            path = getattr(vm.guest, name)
            if path is not None:
                findings += _file_findings(f"vms.{vm.name}.guest.{name}", path, os.R_OK)
    return findings


def engine_findings(cluster: Cluster) -> list[str]:
    """The package that runs real POWER code is installed when a VM needs it."""
    users = [vm.name for vm in cluster.vms if vm.guest.kernel == MACHINE_KERNEL]
    if not users or importlib.util.find_spec(ENGINE_PACKAGE) is not None:
        return []
    return [
        f'vms.{name}.guest.kernel: "machine" needs the Python package {ENGINE_PACKAGE}: {INSTALL_ENGINE}'
        for name in users
    ]


def _file_findings(key: str, path: str, mode: int) -> list[str]:
    try:
        status = os.stat(path)
    except OSError as error:
        return [f"{key}: {path}: {error.strerror}"]
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISBLK(status.st_mode):
        return [f"{key}: {path} is no file"]
    if not os.access(path, mode):
        return [f"{key}: {path} cannot be {'written' if mode & os.W_OK else 'read'} by this user"]
    return []


def _shared_disk(key: str, path: str, readonly: bool, writable: dict[tuple[int, int], str]) -> list[str]:
    if readonly or not os.path.exists(path):
        return []
    status = os.stat(path)
    file = (status.st_dev, status.st_ino)
    if file in writable:
        return [f"{key}: {path} is the writable disk {writable[file]} already"]
    writable[file] = key
    return []


def _mib(n_bytes: int) -> str:
    return f"{n_bytes // _MIB} MiB"
