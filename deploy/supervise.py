"""Watching the processes of a cluster: their packets, their heartbeat, their end, and what follows from it (L1).

Death, SIGSTOP and SIGCONT come from the kernel (waitid), a hang from the heartbeat. Nobody is killed for a hang.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

import trio

from deploy.child import Child, QueryRefused
from deploy.cluster_run import ClusterRun, VmRecord
from deploy.gifts import relay
from deploy.migration_record import Migration, VmEnd
from deploy.sides import Side, side_of
from deploy.states import ProcessState
from protocol import control
from protocol.errors import MalformedMessage, PeerGone
from protocol.roles import Role
from protocol.vm_state import VmState

_STOP_SECONDS = 1.0
_SECOND_LOOK_SECONDS = 0.05
_HELD_UP_SECONDS = 0.5
_MAX_HELD_NOTICES = 64
_VM_STATES = frozenset(state.value for state in VmState) - {VmState.LEFT.value}
_CHANGES = os.WEXITED | os.WSTOPPED | os.WCONTINUED | os.WNOHANG


async def watch_signals(run: ClusterRun, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """Notice every change that the kernel reports, for as long as the launcher lives."""
    with trio.open_signal_receiver(signal.SIGCHLD) as signals:
        task_status.started()
        async for _ in signals:
            look_for_changes(run)


def look_for_changes(run: ClusterRun) -> None:
    """Take every pending report of waitid for our own processes."""
    for child in run.living():
        while child.is_running:
            try:
                report = os.waitid(os.P_PID, child.pid, _CHANGES)
            except ChildProcessError:
                break
            if report is None:
                break
            _changed(run, child, report.si_code, report.si_status)


def _changed(run: ClusterRun, child: Child, code: int, status: int) -> None:
    if code == os.CLD_STOPPED:
        set_state(run, child, ProcessState.STOPPED, signal.Signals(status).name)
    elif code == os.CLD_CONTINUED:
        child.pings.clear()
        set_state(run, child, child.settled_state)
    elif code in (os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED):
        _ended(run, child, code, status)


def _ended(run: ClusterRun, child: Child, code: int, status: int) -> None:
    # A qemu whose user said quit ends in good order without having been asked by us.
    quit_by_user = child.plan.role is Role.QEMU and code == os.CLD_EXITED and status == 0
    child.exit_expected |= quit_by_user
    child.gone(status, code)
    if run.breaks is not None:
        run.breaks.ended(child)
    run.manifest.drop_process(child.pid)
    if not run.is_current(child):
        _replaced_ended(run, child)
        return
    if child.state is ProcessState.FAILED:
        place = f"{child.target} on {child.plan.host}" if child.plan.vm in _moving(run) else child.target
        run.report(f"{place} failed: {child.detail}", process=child.target, pid=child.pid)
    tell_peers(run, child)
    if not run.stopping:
        _consequences(run, child, quit_by_user)


def _moving(run: ClusterRun) -> set[str]:
    return {name for name, vm in run.vms.items() if vm.migration is not None}


def _replaced_ended(run: ClusterRun, child: Child) -> None:
    """Its keepers hear of it, where they have not got another process of its target already."""
    run.dead = [other for other in run.dead if other is not child]
    if run.at(child.target, child.plan.host) is not None:
        return
    for peer in run.host_children(child.plan.host):
        if peer.target in child.peers and peer.plan.vm is None:
            _tell(peer, child)


def _consequences(run: ClusterRun, child: Child, quit_by_user: bool) -> None:
    reason = f"{child.target} is {child.state.value} ({child.detail})"
    if child.plan.vm is not None:
        _vm_process_ended(run, run.vms[child.plan.vm], child, VmEnd(VmState.OFF, "quit") if quit_by_user else None)
        return
    if child.exit_expected:
        return
    for vm in run.moving(child.plan.host):
        if side_of(run, vm, child) is Side.ARRIVAL:
            _note_arrival_end(vm, VmEnd(VmState.FAILED, reason))
    vms = [vm for vm in run.vms.values() if vm.spec.host == child.plan.host]
    if child.plan.role is Role.KVM:
        for vm in vms:
            fail_vm(run, vm, reason)
    else:
        for vm in vms:
            run.nursery.start_soon(_fail_if_secure, run, vm, vm.secure, reason)


def _vm_process_ended(run: ClusterRun, vm: VmRecord, child: Child, quit_by_user: VmEnd | None) -> None:
    if child.exit_expected and quit_by_user is None:
        return
    end = quit_by_user or VmEnd(VmState.FAILED, f"{child.target} is {child.state.value} ({child.detail})")
    if run.incoming.get(child.target) is child:
        _note_arrival_end(vm, end)
    else:
        end_vm(run, vm, end)


def _note_arrival_end(vm: VmRecord, end: VmEnd) -> None:
    if vm.migration is not None:
        vm.migration.arrival_end = vm.migration.arrival_end or end


async def _fail_if_secure(run: ClusterRun, vm: VmRecord, was_secure: bool, reason: str) -> None:
    """Without its ultravisor a secure VM fails; a normal one goes on. What was known when it died counts: kvm's word,
    which `status` takes from then on, may be another by now."""
    if was_secure or await _kvm_calls_secure(run, vm):
        fail_vm(run, vm, reason)


async def _kvm_calls_secure(run: ClusterRun, vm: VmRecord) -> bool:
    kvm = run.child(vm.spec.host, Role.KVM)
    if kvm is None:
        return False
    try:
        answer = await kvm.query("vm.status", {"vm": vm.spec.name})
    except (PeerGone, QueryRefused):
        return False
    return isinstance(answer, dict) and answer.get("secure") is True


def fail_vm(run: ClusterRun, vm: VmRecord, reason: str) -> None:
    """The VM has failed: say so, and end what is left of it."""
    end_vm(run, vm, VmEnd(VmState.FAILED, reason))


def end_vm(run: ClusterRun, vm: VmRecord, end: VmEnd) -> None:
    """The VM is over where it lives. Of one that moves, whoever carries that out decides what that means."""
    if vm.migration is not None:
        vm.migration.home_end = vm.migration.home_end or end
        return
    if vm.lost:
        return
    vm.change(end.state, end.reason)
    vm.lost = True
    if end.state is VmState.FAILED:
        vm.secure = False
        run.report(f"{vm.spec.name} failed: {end.reason}", vm=vm.spec.name)
    for child in run.vm_children(vm.spec.name):
        if child.is_running:
            run.nursery.start_soon(end_child, child, _STOP_SECONDS)


async def end_child(child: Child, grace_seconds: float) -> None:
    """Ask the process to end, then kill it; returns when the kernel reported its end."""
    child.exit_expected = True
    try:
        child.channel.send(control.Stop())
    except PeerGone:
        grace_seconds = 0
    if not child.state.answers:
        grace_seconds = 0
    with trio.move_on_after(grace_seconds):
        await child.exited.wait()
    child.kill()
    await child.exited.wait()


def set_state(run: ClusterRun, child: Child, state: ProcessState, detail: str = "") -> None:
    """Note a new state of a process and tell its peers."""
    if not child.change(state, detail):
        return
    run.log.warning("state", process=child.target, state=state.value, detail=detail)
    if state is not ProcessState.STARTING and run.is_current(child):
        tell_peers(run, child)


def tell_peers(run: ClusterRun, child: Child) -> None:
    """Tell every process that has a link to `child` what it is in."""
    for peer in run.peers_of(child):
        _tell(peer, child)


def _tell(peer: Child, child: Child) -> None:
    if peer.is_running and peer.has_keys:
        peer.channel.tell_peer_state(child.target, child.told_state)


async def heartbeat(run: ClusterRun) -> None:
    """Ping every process that should answer; notice who does not."""
    expected = trio.current_time() + control.HEARTBEAT_SECONDS
    while True:
        await trio.sleep_until(expected)
        late_seconds = trio.current_time() - expected
        expected = trio.current_time() + control.HEARTBEAT_SECONDS
        look_for_changes(run)
        if late_seconds > _HELD_UP_SECONDS:
            # This process itself was held up: answers may wait unread, so nobody is blamed this round.
            continue
        await _judge(run)
        for child in run.living():
            _ping(child)


def _ping(child: Child) -> None:
    if child.ready.is_set() and not child.pings and child.state is not ProcessState.STOPPED:
        try:
            child.ping()
        except PeerGone:
            return


async def _judge(run: ClusterRun) -> None:
    if not any(_is_silent(child) for child in run.living()):
        return
    # The readers run first: an answer that has arrived must count.
    await trio.sleep(_SECOND_LOOK_SECONDS)
    for child in run.living():
        if _is_silent(child):
            set_state(run, child, ProcessState.UNRESPONSIVE, f"no answer for {child.silent_seconds():.1f} s")


def _is_silent(child: Child) -> bool:
    judged = child.state in (ProcessState.RUNNING, ProcessState.WAITING)
    return judged and child.debugger is None and child.silent_seconds() >= control.UNRESPONSIVE_SECONDS


async def serve_child(run: ClusterRun, child: Child) -> None:
    """Read the packets of one process until it closes its end."""
    run.nursery.start_soon(child.channel.write)
    while True:
        try:
            received = await child.channel.receive()
        except MalformedMessage as error:
            run.log.error("malformed packet", process=child.target, reason=str(error))
            continue
        if received is None:
            return
        _take(run, child, *received)


def _take(run: ClusterRun, child: Child, packet: control.FromProcess, descriptors: Sequence[int]) -> None:
    if isinstance(packet, control.Give):
        relay(run, child, packet, descriptors)
        return
    for fd in descriptors:
        os.close(fd)
    match packet:
        case control.Hello():
            child.hello.set()
        case control.Confined(protections):
            child.protections = protections
            child.confined.set()
        case control.Ready():
            _ready(run, child)
        case control.Pong(sequence):
            _ponged(run, child, sequence)
        case control.Answer():
            child.answered(packet)
        case control.BreakHit() if run.breaks is not None:
            run.breaks.hit(child, packet)
        case control.Failed(reason):
            child.detail = reason
        case control.Notice():
            _noticed(run, child, packet)


def _ready(run: ClusterRun, child: Child) -> None:
    child.ready.set()
    child.change(ProcessState.RUNNING)
    if run.breaks is not None:
        run.breaks.started(child)
    for peer in run.peers_of(child):
        if peer.told_state not in (ProcessState.RUNNING.value, ProcessState.STARTING.value):
            child.channel.tell_peer_state(peer.target, peer.told_state)


def _ponged(run: ClusterRun, child: Child, sequence: int) -> None:
    child.ponged(sequence)
    if child.state is ProcessState.UNRESPONSIVE:
        set_state(run, child, child.settled_state)


def _noticed(run: ClusterRun, child: Child, notice: control.Notice) -> None:
    vm = run.vms.get(notice.vm or "")
    side = None if vm is None else side_of(run, vm, child)
    if vm is None or side is None or notice.what not in control.NOTICES:
        run.log.error("notice refused", process=child.target, what=notice.what, vm=notice.vm)
        return
    run.log.info("notice", process=child.target, what=notice.what, vm=notice.vm, detail=notice.detail)
    if run.stopping or side is Side.OVER:
        # Everything ends anyway, and what is said of the end is no news.
        return
    if notice.what == "guest-must-die":
        _kill_guest(run, child, vm, notice.detail)
    elif side is Side.ARRIVAL:
        assert vm.migration is not None
        _noticed_at_arrival(vm.migration, vm, child, notice)
    elif notice.what == "migrate":
        _asked_to_migrate(run, child, vm, notice.detail)
    else:
        _noticed_at_home(run, vm, child, notice)


def _noticed_at_home(run: ClusterRun, vm: VmRecord, child: Child, notice: control.Notice) -> None:
    if notice.what == "vm-failed":
        fail_vm(run, vm, notice.detail or f"reported by {child.target}")
    elif _says_quit(vm, child, notice):
        end_vm(run, vm, VmEnd(VmState.OFF, notice.detail))
    else:
        take_news(vm, notice.what, notice.detail)


def _says_quit(vm: VmRecord, child: Child, notice: control.Notice) -> bool:
    """Whether the user of its monitor or its owner's debugger ends the VM."""
    if notice.what != "vm-off":
        return False
    if notice.detail == control.KILLED_BY_DEBUGGER:
        return child.plan.role is Role.GUEST and vm.spec.debuggable
    return notice.detail == "quit" and child.plan.role is Role.QEMU


def take_news(vm: VmRecord, what: str, detail: str) -> None:
    """What a notice says of the state of the VM where it lives."""
    if what == "vm-off":
        vm.change(VmState.OFF, detail)
    elif what == "vm-state":
        take_vm_state(vm, detail)


def _noticed_at_arrival(move: Migration, vm: VmRecord, child: Child, notice: control.Notice) -> None:
    """Where it arrives: an end is acted on, all else counts when the VM lives there."""
    if notice.what == "vm-failed":
        _note_arrival_end(vm, VmEnd(VmState.FAILED, notice.detail or f"reported by {child.target}"))
    elif _says_quit(vm, child, notice):
        _note_arrival_end(vm, VmEnd(VmState.OFF, notice.detail))
    elif notice.what in ("vm-off", "vm-state") and len(move.notices) < _MAX_HELD_NOTICES:
        move.notices.append((notice.what, notice.detail))


def _asked_to_migrate(run: ClusterRun, child: Child, vm: VmRecord, host: str) -> None:
    if child.plan.role is not Role.QEMU:
        run.log.error("notice refused", process=child.target, what="migrate", vm=vm.spec.name)
        return
    run.on_migrate(vm, host)


def _kill_guest(run: ClusterRun, child: Child, vm: VmRecord, detail: str) -> None:
    guest = run.at(f"{vm.spec.name}/{Role.GUEST.value}", child.plan.host)
    if guest is None or child.plan.role not in (Role.ULTRAVISOR, Role.KVM):
        run.log.error("notice refused", process=child.target, what="guest-must-die", vm=vm.spec.name)
        return
    guest.detail = guest.detail or f"killed for {child.target}: {detail}"
    guest.kill()


def take_vm_state(vm: VmRecord, state: str, reason: str = "") -> None:
    """Note a state as kvm names it; `secure` and `normal` say which kind of VM it is now.

    A VM that kvm calls failed, because its guest gave up, keeps its processes: a reset brings it back. That it has left
    is no state: it runs elsewhere, or did not arrive, and what becomes of it is told when the migration ends.
    """
    if state in ("secure", "normal"):
        vm.secure = state == "secure"
    elif state in _VM_STATES:
        vm.change(VmState(state), reason)
