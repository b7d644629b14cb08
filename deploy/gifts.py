"""Descriptors that one process makes for another go through the launcher, which checks who may give what to whom."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence

from deploy.child import Child
from deploy.cluster_run import ClusterRun
from deploy.plan import ProcessPlan
from deploy.sides import Side, side_of, vm_hosts
from protocol import control
from protocol.errors import PeerGone, UnexpectedMessage
from protocol.roles import Role

MAX_HELD = 64


def receivers(giver: ProcessPlan, packet: control.Give, vm_hosts: Collection[str]) -> list[str]:
    """The targets on the giver's host that get the descriptor.

    `vm_hosts` are those of the VM that it names: none for an unknown VM, two for one that moves.

    Raises UnexpectedMessage when the giver's role may not give this, or not for this VM.
    """
    declared = control.GIFTS.get(packet.tag.partition(":")[0])
    if declared is None or declared[0] is not giver.role:
        raise UnexpectedMessage(f"{giver.target} may not give {packet.tag!r}")
    if giver.host not in vm_hosts or giver.vm not in (None, packet.vm):
        raise UnexpectedMessage(f"{giver.target} may give nothing for VM {packet.vm!r}")
    per_vm = (Role.QEMU, Role.GUEST)
    return [f"{packet.vm if role in per_vm else giver.host}/{role.value}" for role in declared[1]]


def relay(run: ClusterRun, giver: Child, packet: control.Give, descriptors: Sequence[int]) -> None:
    """Pass a descriptor on; takes ownership of `descriptors`. A breach is logged and goes nowhere."""
    try:
        if len(descriptors) != 1:
            raise UnexpectedMessage(f"{giver.target} gave {packet.tag!r} with {len(descriptors)} descriptors")
        vm = run.vms.get(packet.vm)
        hosts = () if vm is None else vm_hosts(vm)
        targets = receivers(giver.plan, packet, hosts)
        if vm is None or side_of(run, vm, giver) not in (Side.HOME, Side.ARRIVAL):
            return
        gift = control.Gift(packet.tag, packet.vm, giver.target)
        for target in targets:
            _hand_over(run, run.at(target, giver.plan.host), gift, descriptors[0])
    except UnexpectedMessage as error:
        run.log.error("gift refused", reason=str(error))
    finally:
        for fd in descriptors:
            os.close(fd)


def _hand_over(run: ClusterRun, receiver: Child | None, gift: control.Gift, fd: int) -> None:
    if receiver is None or not receiver.is_running:
        return
    if receiver.has_keys:
        try:
            receiver.channel.send(gift, [fd])
        except PeerGone as error:
            run.log.error("gift lost", tag=gift.tag, receiver=receiver.target, reason=str(error))
    elif len(receiver.held) < MAX_HELD:
        # Before its keys a process expects nothing but them.
        receiver.held.append((gift, os.dup(fd)))


def release_held(receiver: Child) -> None:
    """The receiver has its keys: send what was held for it."""
    held, receiver.held = receiver.held, []
    for gift, fd in held:
        try:
            receiver.channel.send(gift, [fd])
        except PeerGone:
            continue
        finally:
            os.close(fd)
