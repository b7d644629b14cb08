"""Frames that a normal VM gives back to its host, as the balloon device of its qemu names them.

A discarded frame has no content, for the guest as for the host: the next touch of either brings a zeroed frame. Pages
of a secure VM are refused: they are not the host's to discard, and the guest would lose what it never gave away.
"""

from __future__ import annotations

import trio

from protocol.codes import HCode
from protocol.errors import HostFault, PefboxError
from protocol.messages import MAP_INVALIDATE
from services.kvm.memory import VmMemory
from services.kvm.page_state import KvmState
from services.kvm.uvmem import SecurePages, Switch
from services.runtime.link import Link
from services.runtime.log import Log
from shared.gfn_ranges import invalidations_of

_ACKNOWLEDGE_SECONDS = 1.0


class Discards:
    """The discarded frames of one VM. `marks` are kvm's own dirty marks."""

    def __init__(self, memory: VmMemory, secure: SecurePages, guest: Link, marks: memoryview, log: Log) -> None:
        self._memory = memory
        self._secure = secure
        self._guest = guest
        self._marks = marks
        self._log = log
        self._told_refusal = False
        self._taken: list[set[int]] = []
        """For each open call the frames that it is about to take, busy because of it; a reset empties them."""

    async def discard(self, gfns: list[int], cause: int) -> HCode:
        """Take the frames of `gfns` away, as PAGES_DISCARD says; waits at most a second for the guest."""
        wanted = sorted(set(gfns))
        if not all(gfn < self._memory.n_pages and self._memory.in_slots(gfn) for gfn in wanted):
            return HCode.H_PARAMETER
        if self._secure.switch is Switch.DONE:
            self._refuse(len(wanted))
            return HCode.H_PERMISSION
        if self._secure.switch is Switch.START or not self._memory.busy.isdisjoint(wanted):
            return HCode.H_BUSY
        taken = {gfn for gfn in wanted if self._memory.state(gfn) is KvmState.NORMAL}
        self._memory.busy |= taken
        self._taken.append(taken)
        try:
            return await self._take(taken, cause)
        finally:
            self._let_be(taken)
            self._taken.remove(taken)

    def _let_be(self, taken: set[int]) -> None:
        """The call works on these no longer."""
        self._memory.busy -= taken
        for gfn in taken:
            self._memory.show(gfn)
        taken.clear()

    def reset(self) -> None:
        """The machine is reset: its frames are ordinary ones, those too that a call was about to take."""
        for taken in self._taken:
            self._let_be(taken)
        self._memory.bring_back(range(self._memory.n_pages))
        self._told_refusal = False

    async def _take(self, taken: set[int], cause: int) -> HCode:
        gfns = sorted(taken)
        for gfn in gfns:
            self._memory.map.clear(gfn)
            self._memory.hide(gfn)
        let_go = await self._let_go(gfns, cause)
        # Meanwhile the VM may have begun to turn secure, or been reset: then they are no longer ours.
        if not let_go or self._secure.switch is not Switch.NONE or len(taken) < len(gfns):
            return HCode.H_BUSY
        try:
            self._memory.discard(gfns)
        except HostFault as fault:
            self._log.error("discard failed", reason=str(fault))
            return HCode.H_HARDWARE
        for gfn in gfns:
            self._marks[gfn] = 1
        return HCode.H_SUCCESS

    async def _let_go(self, gfns: list[int], cause: int) -> bool:
        """Whether the guest said that it uses no translation of `gfns` any more."""
        try:
            with trio.fail_after(_ACKNOWLEDGE_SECONDS):
                for body in invalidations_of(gfns):
                    if (await self._guest.call(MAP_INVALIDATE, body, cause)).code != HCode.H_SUCCESS:
                        return False
        except (trio.TooSlowError, PefboxError):
            return False
        return True

    def _refuse(self, n_pages: int) -> None:
        """Once until the next reset: whoever asks again and again does not fill the log."""
        if not self._told_refusal:
            self._log.warning("discard refused", reason="the VM is secure", pages=n_pages)
        self._told_refusal = True
