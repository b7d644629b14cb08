"""Which virtual processors of a VM run, and which wait in a hypercall that is not answered yet.

A processor is off, running, ceded (waiting in H_CEDE, H_CONFER to itself or H_JOIN) or stopped (by the monitor or a
debugger; it may be waiting underneath and goes on waiting when continued). What answers a waiting call:

| call | answered at once when | left open until |
|---|---|---|
| H_CEDE | the prod bit is set, or the external interrupt line is high (takes the bit) | prod, line rises, `wake` |
| H_CONFER to itself | the prod bit is set (taken) | prod |
| H_CONFER to others | always: every processor has a host thread of its own, so there is nothing to give away | - |
| H_JOIN | the prod bit is set (taken); H_CONTINUE when all other started processors have joined | prod |

H_PROD ends a wait, else it sets the prod bit for the next one, so that no prod is lost between a guest's check and
its cede. The decrementer belongs to the processor itself, which kvm learns of by `wake`. H_JOIN does not check MSR.EE,
which kvm never sees. Nothing here waits: a call that stays open is answered by whoever drains `take_ended`.
Source: PAPR 14.5.3 and 14.11.3; Linux KVM `arch/powerpc/kvm/book3s_hv.c`, QEMU `hw/ppc/spapr_hcall.c`.
"""

from __future__ import annotations

from enum import Enum

import msgspec

from protocol.codes import HCode
from protocol.errors import MalformedMessage

CONFER_ALL = (1 << 64) - 1
"""H_CONFER's target -1: every other processor."""


class RunState(Enum):
    """What a processor is doing, as it is shown."""

    OFF = "off"
    RUNNING = "running"
    CEDED = "ceded"
    STOPPED = "stopped"


class Wait(Enum):
    """The hypercall that a processor waits in."""

    NONE = "none"
    CEDE = "cede"
    CONFER = "confer"
    JOIN = "join"


class VcpuState(msgspec.Struct):
    """One processor."""

    started: bool = False
    stopped: bool = False
    wait: Wait = Wait.NONE
    prodded: bool = False
    line: bool = False
    """Level of its external interrupt line."""


class VcpusState(msgspec.Struct):
    """All processors of a VM, by number."""

    vcpus: list[VcpuState]


class Vcpus:
    """The processors of one VM, numbered from 0; all are off at first.

    `h_cede`, `h_confer` and `h_join` return the code to answer with, or None when the call stays open. Every open call
    that ends is told once by `take_ended`, in the order of its ending, and is answered H_SUCCESS. Methods other than
    hypercalls take numbers below `len(self)`.
    """

    def __init__(self, n_vcpus: int = 1) -> None:
        self._vcpus = [VcpuState() for _ in range(n_vcpus)]
        self._ended: list[int] = []

    def __len__(self) -> int:
        return len(self._vcpus)

    def state(self, vcpu: int) -> RunState:
        """What a processor is doing; stopped hides a wait."""
        it = self._vcpus[vcpu]
        if not it.started:
            return RunState.OFF
        if it.stopped:
            return RunState.STOPPED
        return RunState.RUNNING if it.wait is Wait.NONE else RunState.CEDED

    def waits_in(self, vcpu: int) -> Wait:
        """The open hypercall of a processor, stopped or not."""
        return self._vcpus[vcpu].wait

    def take_ended(self) -> list[int]:
        """Processors whose open call ended since the last time."""
        ended, self._ended = self._ended, []
        return ended

    # -- hypercalls ---------------------------------------------------------------------------------------------

    def h_cede(self, vcpu: int) -> HCode | None:
        """Wait for an interrupt or a prod."""
        it = self._caller(vcpu)
        if it is None:
            return HCode.H_PARAMETER
        if it.line:
            it.prodded = False
            return HCode.H_SUCCESS
        return self._wait(it, Wait.CEDE)

    def h_confer(self, vcpu: int, target: int, dispatch: int) -> HCode | None:
        """Give time to another processor, or wait for a prod when `target` is the caller.

        `dispatch`, the target's dispatch count, says whether it was preempted; no processor here is.
        """
        it = self._caller(vcpu)
        if it is None:
            return HCode.H_PARAMETER
        if target == vcpu:
            return self._wait(it, Wait.CONFER)
        known = target == CONFER_ALL or 0 <= target < len(self._vcpus)
        return HCode.H_SUCCESS if known else HCode.H_PARAMETER

    def h_join(self, vcpu: int) -> HCode | None:
        """Wait for a prod, unless every other started processor already does."""
        it = self._caller(vcpu)
        if it is None:
            return HCode.H_PARAMETER
        others = (other for other in self._vcpus if other is not it and other.started)
        if not it.prodded and all(other.wait is Wait.JOIN for other in others):
            return HCode.H_CONTINUE
        return self._wait(it, Wait.JOIN)

    def h_prod(self, target: int) -> HCode:
        """End a processor's wait, or its next one before it begins."""
        if not 0 <= target < len(self._vcpus):
            return HCode.H_PARAMETER
        it = self._vcpus[target]
        if it.wait is Wait.NONE:
            it.prodded = True
        else:
            self._end(target)
        return HCode.H_SUCCESS

    # -- events -------------------------------------------------------------------------------------------------

    def set_line(self, vcpu: int, level: bool) -> None:
        """The external interrupt line changed; high ends a cede."""
        self._vcpus[vcpu].line = level
        if level:
            self.wake(vcpu)

    def wake(self, vcpu: int) -> None:
        """An event of the processor itself (decrementer, doorbell) ends its cede; other waits go on."""
        if self._vcpus[vcpu].wait is Wait.CEDE:
            self._end(vcpu)

    def leave(self, vcpu: int) -> None:
        """The processor is no more in the call that it waits in, if it is in any: PAPR lets a wait end early."""
        if self._vcpus[vcpu].wait is not Wait.NONE:
            self._end(vcpu)

    def left(self, vcpu: int) -> None:
        """The processor does not wait any more, whatever it waited for."""
        if self._vcpus[vcpu].wait is not Wait.NONE:
            self._end(vcpu)

    # -- life ---------------------------------------------------------------------------------------------------

    def start(self, vcpu: int) -> bool:
        """Start a processor that is off; False when it is not."""
        it = self._vcpus[vcpu]
        if it.started:
            return False
        self._vcpus[vcpu] = VcpuState(started=True, stopped=it.stopped, line=it.line)
        return True

    def off(self, vcpu: int) -> bool:
        """A processor is gone from the guest (stop-self, VM end).

        True when it had an open call: that is not told by `take_ended`, and whoever keeps it drops it.
        """
        it = self._vcpus[vcpu]
        self._vcpus[vcpu] = VcpuState(stopped=it.stopped, line=it.line)
        self._ended = [ended for ended in self._ended if ended != vcpu]
        return it.wait is not Wait.NONE

    def stop(self, vcpu: int) -> bool:
        """Hold a processor; False when it was held."""
        it = self._vcpus[vcpu]
        changed, it.stopped = not it.stopped, True
        return changed

    def go(self, vcpu: int) -> bool:
        """Let a held processor continue; False when it was not held."""
        it = self._vcpus[vcpu]
        changed, it.stopped = it.stopped, False
        return changed

    def reset(self) -> list[int]:
        """Machine reset: all processors off and not held; returns those whose open call is dropped unanswered."""
        dropped = [vcpu for vcpu, it in enumerate(self._vcpus) if it.wait is not Wait.NONE]
        self._vcpus = [VcpuState(line=it.line) for it in self._vcpus]
        self._ended.clear()
        return dropped

    def save(self) -> VcpusState:
        """A copy. Ends that were not taken yet are not in it: take them first."""
        return VcpusState([msgspec.structs.replace(it) for it in self._vcpus])

    def load(self, state: VcpusState) -> None:
        """Take over `state`; raises MalformedMessage unless it fits this VM and holds together."""
        if len(state.vcpus) != len(self._vcpus):
            raise MalformedMessage(f"{len(state.vcpus)} processors, this VM has {len(self._vcpus)}")
        for vcpu, it in enumerate(state.vcpus):
            waiting = it.wait is not Wait.NONE
            if waiting and (not it.started or it.prodded or (it.wait is Wait.CEDE and it.line)):
                raise MalformedMessage(f"processor {vcpu} waits for what has come already")
        self._vcpus = [msgspec.structs.replace(it) for it in state.vcpus]
        self._ended.clear()

    def _caller(self, vcpu: int) -> VcpuState | None:
        """The processor that issues a call; None for one that is off or waits already: it cannot issue any."""
        if not 0 <= vcpu < len(self._vcpus):
            return None
        it = self._vcpus[vcpu]
        return it if it.started and it.wait is Wait.NONE else None

    def _wait(self, it: VcpuState, wait: Wait) -> HCode | None:
        if it.prodded:
            it.prodded = False
            return HCode.H_SUCCESS
        it.wait = wait
        return None

    def _end(self, vcpu: int) -> None:
        self._vcpus[vcpu].wait = Wait.NONE
        self._ended.append(vcpu)
