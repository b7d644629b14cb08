"""What management has to know of a VM: what it is made of, whether it is secure now, what can be done to it now."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec
import trio

from deploy import plan
from deploy.cluster_run import ClusterRun, VmRecord
from deploy.operations import OperationRow, VmFacts, operation_rows
from deploy.states import printable
from deploy.status import ask, refresh_vm
from protocol.roles import Role
from protocol.startup import AccessPlatform, DeviceEntry, DmaOffer, GuestEntry
from shared.machine_type import CPU_MODEL, N_CPUS, VERSIONED_MACHINE, machine_uuid, slot_of
from shared.virtio import Feature

FIRMWARE_ARCHITECTURE: Literal["ppc64"] = "ppc64"
"""In which every processor starts, and all that is known while no qemu says what it loaded."""


class DeviceAnswer(msgspec.Struct, kw_only=True):
    """A device in a qemu's answer to `machine.describe`; what it says is checked, not trusted."""

    offered: list[str]
    accepted: list[str]
    driver_ok: bool


class DmaWindow(msgspec.Struct, kw_only=True):
    """Bus addresses that devices translate through a table."""

    liobn: int
    base: int
    page_bytes: int
    size_bytes: int


class MachineAnswer(msgspec.Struct, kw_only=True):
    """A qemu's answer to `machine.describe`."""

    arch: Literal["ppc64", "ppc64le"]
    monitor_commands: list[str]
    devices: list[DeviceAnswer]
    dma_windows: list[DmaWindow]
    dma_page_bytes: list[int]


class DiskRow(msgspec.Struct, kw_only=True):
    """A disk: its file or block device."""

    name: str
    path: str
    is_block_device: bool
    readonly: bool
    format: str


class DeviceRow(msgspec.Struct, kw_only=True):
    """A device on PCI bus 0.

    `access_platform` says whether it offers VIRTIO_F_ACCESS_PLATFORM now, `offer` what the cluster file gives it. Its
    features are None while no qemu tells them; `accepted` are those of its driver.
    """

    kind: str
    slot: int
    function: int
    access_platform: bool
    offer: DmaOffer
    disk: DiskRow | None
    network: str | None
    mac: str | None
    mtu: int | None
    name: str | None
    offered: list[str] | None
    accepted: list[str] | None
    driver_ok: bool | None


class VmDescription(msgspec.Struct, kw_only=True):
    """A VM. `may_turn_secure` is what the cluster file allows, `secure` what the VM has made of it."""

    cluster: str
    host: str
    name: str
    uuid: str
    lpid: int
    incarnation: int
    state: str
    reason: str
    may_turn_secure: bool
    secure: bool
    secure_memory_mode: str | None
    debuggable: bool
    memory_bytes: int
    vcpus: int
    arch: str
    machine: str
    cpu_model: str
    time: str
    guest: GuestEntry
    devices: list[DeviceRow]
    dma_windows: list[DmaWindow] | None
    dma_page_bytes: list[int] | None
    qmp: str | None
    operations: dict[str, OperationRow]


async def describe_vm(run: ClusterRun, name: str) -> VmDescription:
    """Ask the processes of a VM, bounded, then say what is known; raises UserError for an unknown VM."""
    vm = run.vm_named(name)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(refresh_vm, run, vm)
        nursery.start_soon(_refresh_machine, run, vm)
    return _description(run, vm)


def vm_facts(run: ClusterRun, vm: VmRecord) -> VmFacts:
    """What is known of the VM, for the conditions of operations."""
    spec = vm.spec
    children = {role: run.child(spec.host, role) for role in (Role.ULTRAVISOR, Role.KVM)}
    children.update({role: run.child(spec.name, role) for role in (Role.QEMU, Role.GUEST)})
    machine: MachineAnswer | None = vm.last_machine
    return VmFacts(
        name=spec.name,
        host=spec.host,
        state=vm.state,
        secure=vm.secure,
        processes={role: child.state for role, child in children.items() if child is not None},
        device_kinds=frozenset(device.kind for device in spec.devices),
        monitor_commands=None if machine is None else frozenset(machine.monitor_commands),
        on_its_way=_on_its_way(vm),
        other_hosts=len(run.hosts) > 1,
    )


def _on_its_way(vm: VmRecord) -> str | None:
    if vm.snapshot is not None:
        way = "restored from" if vm.snapshot.restores else "saved in"
        return f"{vm.spec.name} is being {way} {vm.snapshot.path}"
    if vm.migration is None:
        return None
    if vm.in_doubt:
        return f"nobody knows where {vm.spec.name} runs: pefbox recover {vm.spec.name}"
    return f"{vm.spec.name} is on its way to {vm.migration.host}"


async def _refresh_machine(run: ClusterRun, vm: VmRecord) -> None:
    answer = await ask(run.child(vm.spec.name, Role.QEMU), "machine.describe", {})
    try:
        machine = msgspec.convert(answer, MachineAnswer)
    except msgspec.ValidationError:
        return
    if len(machine.devices) == len(vm.spec.devices):
        vm.last_machine = machine


def _description(run: ClusterRun, vm: VmRecord) -> VmDescription:
    spec = vm.spec
    machine: MachineAnswer | None = vm.last_machine
    qemu = plan.ProcessPlan(Role.QEMU, spec.host, spec.name, vm.move)
    return VmDescription(
        cluster=run.cluster.name,
        host=spec.host,
        name=spec.name,
        uuid=str(machine_uuid(spec.name, spec.lpid)),
        lpid=spec.lpid,
        incarnation=vm.incarnation,
        state=vm.state.value,
        reason=vm.reason,
        may_turn_secure=spec.secure_allowed,
        secure=vm.secure,
        secure_memory_mode=vm.last_memory_mode,
        debuggable=spec.debuggable,
        memory_bytes=spec.memory_bytes,
        vcpus=N_CPUS,
        arch=FIRMWARE_ARCHITECTURE if machine is None else machine.arch,
        machine=VERSIONED_MACHINE,
        cpu_model=CPU_MODEL,
        time=spec.time,
        guest=spec.guest,
        devices=[_device_row(vm, index) for index in range(len(spec.devices))],
        dma_windows=None if machine is None else machine.dma_windows,
        dma_page_bytes=None if machine is None else machine.dma_page_bytes,
        qmp=plan.monitor_sockets(run.paths, qemu)[0],
        operations=operation_rows(vm_facts(run, vm)),
    )


def _device_row(vm: VmRecord, index: int) -> DeviceRow:
    entry = vm.spec.devices[index]
    machine: MachineAnswer | None = vm.last_machine
    answer = None if machine is None else machine.devices[index]
    return DeviceRow(
        kind=entry.kind,
        slot=slot_of(index),
        function=0,
        access_platform=_offers_platform(entry, answer),
        offer=entry.offer,
        disk=_disk_row(vm, entry),
        network=entry.network,
        mac=entry.mac,
        mtu=entry.mtu if entry.network is not None else None,
        name=entry.name,
        offered=None if answer is None else _shown(answer.offered),
        accepted=None if answer is None else _shown(answer.accepted),
        driver_ok=None if answer is None else answer.driver_ok,
    )


def _offers_platform(entry: DeviceEntry, answer: DeviceAnswer | None) -> bool:
    if answer is not None:
        return Feature.ACCESS_PLATFORM.name in answer.offered
    return entry.offer.access_platform is not AccessPlatform.NO


def _disk_row(vm: VmRecord, entry: DeviceEntry) -> DiskRow | None:
    disk = next((disk for disk in vm.spec.disks if disk.name == entry.disk), None)
    if disk is None:
        return None
    is_block = Path(disk.path).is_block_device()
    return DiskRow(name=disk.name, path=disk.path, is_block_device=is_block, readonly=disk.readonly, format=disk.format)


def _shown(names: list[str]) -> list[str]:
    return [printable(name) for name in names]
