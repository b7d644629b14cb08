"""Why a VM cannot move to a host now: everything that can be known before anything is started."""

from __future__ import annotations

import os

import msgspec

from deploy import plan
from deploy.answers import answer_of
from deploy.cluster_run import ClusterRun, VmRecord
from deploy.memory_segments import SHM_DIR
from deploy.operations import MIGRATE, OPERATIONS
from deploy.plan import ProcessPlan
from deploy.states import printable
from deploy.status import ask, refresh_vm
from deploy.vm_description import vm_facts
from protocol.control import MAX_DESCRIPTORS
from protocol.errors import UserError
from protocol.roles import Role

_MIB = 1 << 20
_CHECK_SECONDS = 2.0


class AccountAnswer(msgspec.Struct, kw_only=True):
    """An ultravisor's answer to `account`."""

    total_bytes: int
    used_bytes: int


class CertificateAnswer(msgspec.Struct, kw_only=True):
    """An ultravisor's answer to `migration.certificate`, which the other one is shown as it is."""

    certificate: str
    measurement: str
    debuggable: bool
    version: int


class CheckAnswer(msgspec.Struct, kw_only=True):
    """An ultravisor's answer to `migration.check`."""

    reason: str | None


async def why_not(run: ClusterRun, name: str, host: str) -> list[str]:
    """Every reason why VM `name` cannot move to `host` now; none when it can. Raises UserError for unknown names."""
    vm = run.vm_named(name)
    run.host_named(host)
    if run.unready is not None:
        return [run.unready]
    if host == vm.spec.host:
        return [f"{name} is on {host} already"]
    await refresh_vm(run, vm)
    reasons = _of_the_vm(run, vm) + _of_the_way(run, vm, host) + _of_the_machine(run, vm, host)
    if vm.secure:
        reasons += await _of_secure_memory(run, vm, host)
        reasons += await _of_the_ultravisors(run, vm, host)
    return reasons


def _of_the_vm(run: ClusterRun, vm: VmRecord) -> list[str]:
    facts = vm_facts(run, vm)
    reasons = (condition(facts) for condition in OPERATIONS[MIGRATE].conditions)
    return [reason for reason in reasons if reason is not None]


def _of_the_way(run: ClusterRun, vm: VmRecord, host: str) -> list[str]:
    reasons = []
    if not run.cluster.may_move(vm.spec.host, host):
        reasons.append(f"the cluster file has no link between {vm.spec.host} and {host}")
    for role in (Role.ULTRAVISOR, Role.KVM):
        child = run.child(host, role)
        if child is None or not child.state.answers:
            state = "missing" if child is None else child.state.value
            advice = f": pefbox restart {host}" if child is None or child.state.is_over else ""
            reasons.append(f"{host}/{role.value} is {state}{advice}")
    return reasons


def _of_the_machine(run: ClusterRun, vm: VmRecord, host: str) -> list[str]:
    reasons = []
    shm = os.statvfs(SHM_DIR)
    free_bytes = shm.f_bavail * shm.f_frsize
    if free_bytes < vm.spec.memory_bytes:
        reasons.append(
            f"{vm.spec.name} needs {_mib(vm.spec.memory_bytes)} of RAM on {host} while it moves, "
            f"but /dev/shm has {_mib(free_bytes)} free"
        )
    ultravisor = ProcessPlan(Role.ULTRAVISOR, host)
    arriving = [record.spec for record in run.moving(host) if record.spec.host != host]
    names = plan.descriptors(ultravisor, run.cluster)
    names += [name for spec in (*arriving, vm.spec) for name in plan.vm_descriptors(Role.ULTRAVISOR, spec)]
    if len(names) > MAX_DESCRIPTORS:
        reasons.append(f"{host} has as many VMs as it could be restarted with")
    return reasons


async def _of_secure_memory(run: ClusterRun, vm: VmRecord, host: str) -> list[str]:
    answer = await ask(run.child(host, Role.ULTRAVISOR), "account", {})
    try:
        account = msgspec.convert(answer, AccountAnswer)
    except msgspec.ValidationError:
        return [f"{host}/ultravisor does not tell how much secure memory it has"]
    free_bytes = account.total_bytes - account.used_bytes
    if free_bytes >= vm.spec.memory_bytes:
        return []
    return [
        f"{host} has {_mib(max(0, free_bytes))} of secure memory free and {vm.spec.name} needs "
        f"{_mib(vm.spec.memory_bytes)}: restart or stop a secure VM there, or give it more `secure_memory`"
    ]


async def _of_the_ultravisors(run: ClusterRun, vm: VmRecord, host: str) -> list[str]:
    """Each is shown who the other is, and says whether it would have to do with it."""
    try:
        source = await _certificate(run, vm.spec.host)
        destination = await _certificate(run, host)
        reasons = [
            await _check(run, vm, vm.spec.host, "source", destination),
            await _check(run, vm, host, "destination", source),
        ]
    except UserError as error:
        return [str(error)]
    return [reason for reason in reasons if reason is not None]


async def _certificate(run: ClusterRun, host: str) -> CertificateAnswer:
    ultravisor = run.child(host, Role.ULTRAVISOR)
    return await answer_of(ultravisor, "migration.certificate", {}, CertificateAnswer, _CHECK_SECONDS)


async def _check(run: ClusterRun, vm: VmRecord, host: str, side: str, peer: CertificateAnswer) -> str | None:
    arguments = {"vm": vm.spec.name, "as": side, "peer": msgspec.to_builtins(peer)}
    ultravisor = run.child(host, Role.ULTRAVISOR)
    answer = await answer_of(ultravisor, "migration.check", arguments, CheckAnswer, _CHECK_SECONDS)
    return None if answer.reason is None else f"{host}/ultravisor: {printable(answer.reason)}"


def _mib(n_bytes: int) -> str:
    return f"{n_bytes // _MIB} MiB"
