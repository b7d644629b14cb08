"""Secure VM support of KVM: the hypercalls by which the ultravisor drives it, and paging out for the host.

A VM's switch has three marks, as in Linux `book3s_hv_uvmem.c`: START set by H_SVM_INIT_START, DONE by
H_SVM_INIT_DONE, and none again after an abort or a reset. A GFN with an ultracall under way is `busy`; whoever meets
it gets H_BUSY and comes again, so nobody holds one page while waiting for another.
"""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from enum import Enum
from typing import TypeVar

import trio

from protocol.codes import HCode, UCode
from protocol.errors import HostFault
from protocol.geometry import PAGE_SHIFT, gfn_of, gpa_of
from protocol.hcalls import H_PAGE_IN_NONSHARED, H_PAGE_IN_SHARED
from protocol.messages import MAP_INVALIDATE, InvalidateBody, Range
from protocol.ucalls import (
    UV_PAGE_IN,
    UV_PAGE_INVAL,
    UV_PAGE_OUT,
    UV_REGISTER_MEM_SLOT,
    UV_SVM_TERMINATE,
    UV_UNREGISTER_MEM_SLOT,
)
from services.kvm.memory import VmMemory
from services.kvm.page_state import KvmState
from services.kvm.ultravisor_port import UltravisorPort
from services.runtime.link import Link
from shared.real_address import real_address

MAX_OPEN_PAGE_CALLS = 32
OUT_PART_PAGES = 32
"""One invalidation of the guest serves them all."""
IN_PART_PAGES = 16
"""Two parts take turns: while the ultravisor works on one, this side prepares the other."""
_RETRY_SECONDS = 0.002
_MAX_RETRY_SECONDS = 0.05
_RETRY_LIMIT_SECONDS = 1.0
_SERVED_SECONDS = 2.0
"""So long what ends a switch or a secure VM is asked for again while the ultravisor has too many calls open."""


class Switch(Enum):
    """How far the VM is in turning secure."""

    NONE = "none"
    START = "start"
    DONE = "done"


class SecurePages:
    """The secure side of one VM in KVM."""

    def __init__(
        self,
        lpid: int,
        memory: VmMemory,
        ultravisor: UltravisorPort,
        guest: Link,
        *,
        allowed: bool,
        started: Callable[[], bool],
    ) -> None:
        """`started` says whether the VM was started and is not being reset."""
        self._lpid = lpid
        self._memory = memory
        self._ultravisor = ultravisor
        self._guest = guest
        self._allowed = allowed
        self._started = started
        self._unsure: set[int] = set()
        """SECURE GFNs whose page-out got U_BUSY: an ultravisor that was stopped may put the image there yet."""
        self.switch = Switch.NONE

    # -- the switch -------------------------------------------------------------------------------------------

    async def init_start(self, cause: int) -> HCode:
        """H_SVM_INIT_START: register every memory slot with the ultravisor."""
        if self.switch is not Switch.NONE or not self._started():
            # A reset has found no switch to end: one that was on its way must not begin behind its back.
            return HCode.H_STATE
        self.switch = Switch.START
        # What its balloon gave away counts as ordinary zeroed pages from here on.
        self._memory.bring_back(range(self._memory.n_pages))
        if not self._allowed:
            return HCode.H_AUTHORITY
        registered: list[int] = []
        for slot in self._memory.slots.values():
            args = [self._lpid, slot.gpa, slot.size_bytes, 0, slot.slot]
            if (await self._ultravisor.ucall(UV_REGISTER_MEM_SLOT, args, cause))[0] != UCode.U_SUCCESS:
                await self._unregister(registered, cause)
                return HCode.H_PARAMETER
            registered.append(slot.slot)
        self._memory.unmap_all()
        everything = InvalidateBody([Range(0, self._memory.n_pages)])
        await self._guest.call(MAP_INVALIDATE, everything, cause)
        return HCode.H_SUCCESS

    async def _unregister(self, slots: list[int], cause: int) -> None:
        for slot in slots:
            await self._ultravisor.ucall(UV_UNREGISTER_MEM_SLOT, [self._lpid, slot], cause)

    def init_done(self) -> HCode:
        """H_SVM_INIT_DONE: every page that is still normal is dropped, since the ultravisor ignores its content."""
        if self.switch is not Switch.START:
            return HCode.H_UNSUPPORTED
        normal = [gfn for slot in self._memory.slots.values() for gfn in slot.gfns]
        try:
            self._memory.drop_secure(g for g in normal if self._memory.state(g) is KvmState.NORMAL)
        except HostFault:
            return HCode.H_STATE
        self.switch = Switch.DONE
        return HCode.H_SUCCESS

    async def init_abort(self, cause: int) -> HCode:
        """H_SVM_INIT_ABORT: take every page back; what it returns is what the VM gets for its UV_ESM."""
        if self.switch is Switch.NONE:
            return HCode.H_UNSUPPORTED
        if self.switch is Switch.DONE:
            return HCode.H_STATE
        deadline = trio.current_time() + _SERVED_SECONDS
        for gfn in self._memory.in_state(KvmState.SECURE, KvmState.SHARED):
            await _while_busy(functools.partial(self._give_back, gfn, cause), deadline)
            if self.switch is not Switch.START:
                # A reset or the end of the VM came between: the frames are no longer this switch's.
                return HCode.H_STATE
            self._memory.set_state(gfn, KvmState.NORMAL)
        self.switch = Switch.NONE
        await self._terminate(cause, _SERVED_SECONDS)
        return HCode.H_PARAMETER

    def arrive(self) -> None:
        """The VM comes from another host as a secure one; the ultravisors move what is the ultravisor's."""
        self.switch = Switch.DONE

    async def off(self, cause: int, patience_s: float = _SERVED_SECONDS) -> bool:
        """The VM is reset or destroyed (KVM_PPC_SVM_OFF): end it in the ultravisor, take its frames back.

        False, and it is still there, when the ultravisor was busy for longer than `patience_s`.
        """
        if self.switch is Switch.NONE:
            return True
        code = await self._terminate(cause, patience_s)
        if code in _BUSY:
            return False
        self.switch = Switch.NONE
        self._unsure.clear()
        self._memory.forget_secure()
        return code == UCode.U_SUCCESS

    async def _give_back(self, gfn: int, cause: int) -> int:
        # A call that may be served yet is not made a second time, which would zero the frame.
        return (await self._ultravisor.ucall_lasting(UV_PAGE_OUT, self._page_args(gfn), cause))[0]

    async def _terminate(self, cause: int, patience_s: float) -> int:
        async def terminate() -> int:
            return (await self._ultravisor.ucall(UV_SVM_TERMINATE, [self._lpid], cause))[0]

        return await _while_busy(terminate, trio.current_time() + patience_s)

    # -- page in, asked by the ultravisor ---------------------------------------------------------------------

    async def page_in(self, gpa: int, flags: int, shift: int, cause: int) -> HCode:
        """H_SVM_PAGE_IN: give the ultravisor the frame of `gpa`, as a secure page or as a shared one."""
        if self.switch is Switch.NONE:
            return HCode.H_UNSUPPORTED
        if shift != PAGE_SHIFT:
            return HCode.H_P3
        if flags not in (H_PAGE_IN_NONSHARED, H_PAGE_IN_SHARED):
            return HCode.H_P2
        gfn = gfn_of(gpa)
        if gpa != gpa_of(gfn) or not self._memory.in_slots(gfn):
            return HCode.H_PARAMETER
        if gfn in self._memory.busy:
            return HCode.H_BUSY
        self._memory.busy.add(gfn)
        try:
            if flags == H_PAGE_IN_SHARED:
                return await self._page_in_shared(gfn, cause)
            return await self._page_in_secure(gfn, cause)
        except HostFault:
            return HCode.H_PARAMETER
        finally:
            self._memory.busy.discard(gfn)

    async def _page_in_shared(self, gfn: int, cause: int) -> HCode:
        state = self._memory.state(gfn)
        if state in (KvmState.SECURE, KvmState.PAGED_OUT):
            # The frame starts empty: neither the secure content nor an old image is left in it.
            self._memory.punch(gfn)
        code = await self._offer(gfn, cause)
        if code == UCode.U_SUCCESS and self.switch is not Switch.NONE:
            self._memory.set_state(gfn, KvmState.SHARED)
        return _to_hcode(code)

    async def _page_in_secure(self, gfn: int, cause: int) -> HCode:
        if self._memory.state(gfn) is KvmState.SECURE and gfn not in self._unsure:
            return HCode.H_PARAMETER
        self._memory.hide(gfn)
        try:
            return self._took_in(gfn, await self._offer(gfn, cause))
        finally:
            self._memory.show(gfn)

    def _took_in(self, gfn: int, code: int) -> HCode:
        """The ultravisor's answer to the offer of a frame; a frame that it took is punched."""
        if code == UCode.U_SUCCESS and self.switch is not Switch.NONE:
            self._memory.set_state(gfn, KvmState.SECURE)
            self._unsure.discard(gfn)
            try:
                self._memory.punch(gfn)
            except HostFault:
                return HCode.H_PARAMETER
        return _to_hcode(code)

    async def _offer(self, gfn: int, cause: int) -> int:
        return (await self._ultravisor.ucall(UV_PAGE_IN, self._page_args(gfn), cause))[0]

    # -- page out, asked by the host --------------------------------------------------------------------------

    async def make_present(self, gfns: list[int], cause: int) -> HCode:
        """The host wants to touch these frames: have the ultravisor put their images there."""
        deadline = trio.current_time() + _RETRY_LIMIT_SECONDS
        for gfn in gfns:
            # When the ultravisor wants the page too, and has a guest waiting, the host gives way.
            code = await _while_busy(functools.partial(self.page_out, gfn, cause), deadline)
            if code != HCode.H_SUCCESS:
                return code
        return HCode.H_SUCCESS

    async def page_out_asked(self, gpa: int, flags: int, shift: int, cause: int) -> HCode:
        """H_SVM_PAGE_OUT: the ultravisor wants a page out, to free secure memory."""
        if self.switch is Switch.NONE:
            return HCode.H_UNSUPPORTED
        if shift != PAGE_SHIFT:
            return HCode.H_P3
        if flags:
            return HCode.H_P2
        gfn = gfn_of(gpa)
        if gpa != gpa_of(gfn) or not self._memory.in_slots(gfn):
            return HCode.H_PARAMETER
        return await self.page_out(gfn, cause)

    async def page_out(self, gfn: int, cause: int) -> HCode:
        """Page out for any touch by the host: SECURE to PAGED_OUT; anything else is present already."""
        return (await self.page_out_all([gfn], cause))[0]

    async def page_out_all(self, gfns: list[int], cause: int) -> list[HCode]:
        """As `page_out` for each of `gfns`, with their calls open together."""
        codes, moving = [HCode.H_SUCCESS] * len(gfns), []
        try:
            for i, gfn in enumerate(gfns):
                if gfn in self._memory.busy:
                    codes[i] = HCode.H_BUSY
                elif self._memory.state(gfn) is KvmState.SECURE:
                    self._memory.busy.add(gfn)
                    moving.append(i)
                    codes[i] = HCode.H_PARAMETER
            # Once more: a device that looked a frame up just before it was punched may have touched it since. A frame
            # where an image may lie already keeps it.
            self._memory.punch_all(gfns[i] for i in moving if gfns[i] not in self._unsure)
            results = await self._ultravisor.ucalls(UV_PAGE_OUT, [self._page_args(gfns[i]) for i in moving], cause)
            for i, result in zip(moving, results, strict=True):
                codes[i] = self._put_out(gfns[i], result[0])
        except HostFault:
            return codes
        finally:
            for i in moving:
                self._memory.busy.discard(gfns[i])
        return codes

    def _put_out(self, gfn: int, code: int) -> HCode:
        """The ultravisor's answer to UV_PAGE_OUT."""
        if self.switch is not Switch.DONE:
            return _to_hcode(code)
        if code == UCode.U_BUSY:
            self._unsure.add(gfn)
        elif code == UCode.U_SUCCESS or (code == UCode.U_PARAMETER and gfn in self._unsure):
            # U_PARAMETER: it is out already, by the call that nobody answered.
            self._unsure.discard(gfn)
            self._memory.set_state(gfn, KvmState.PAGED_OUT)
            return HCode.H_SUCCESS
        return _to_hcode(code)

    async def page_back_in_all(self, gfns: list[int], cause: int) -> list[HCode]:
        """Offer paged-out images without being asked (reclaim of normal memory), with their calls open together."""
        codes, moving = [HCode.H_PARAMETER] * len(gfns), []
        for i, gfn in enumerate(gfns):
            if gfn in self._memory.busy:
                codes[i] = HCode.H_BUSY
            elif self._memory.state(gfn) is KvmState.PAGED_OUT:
                self._memory.busy.add(gfn)
                self._memory.hide(gfn)
                moving.append(i)
        try:
            results = await self._ultravisor.ucalls(UV_PAGE_IN, [self._page_args(gfns[i]) for i in moving], cause)
            for i, result in zip(moving, results, strict=True):
                codes[i] = self._took_in(gfns[i], result[0])
        finally:
            for i in moving:
                self._memory.show(gfns[i])
                self._memory.busy.discard(gfns[i])
        return codes

    async def reclaim_all(self, gfns: list[int], cause: int) -> list[HCode]:
        """The host takes the frames of shared pages away, content and all: a shared page is the host's.

        Linux does it from its MMU notifier. The page stays shared; the guest's next touch has a frame asked for.
        """
        codes, moving = [HCode.H_PARAMETER] * len(gfns), []
        for i, gfn in enumerate(gfns):
            if gfn in self._memory.busy:
                codes[i] = HCode.H_BUSY
            elif self._memory.state(gfn) is KvmState.SHARED:
                self._memory.busy.add(gfn)
                moving.append(i)
        try:
            calls = [[self._lpid, gpa_of(gfns[i]), PAGE_SHIFT] for i in moving]
            results = await self._ultravisor.ucalls(UV_PAGE_INVAL, calls, cause)
            for i, result in zip(moving, results, strict=True):
                codes[i] = self._take_away(gfns[i], result[0])
        finally:
            for i in moving:
                self._memory.busy.discard(gfns[i])
        return codes

    def _take_away(self, gfn: int, code: int) -> HCode:
        """The ultravisor's answer to UV_PAGE_INVAL; a frame that nobody reaches any more is punched."""
        if self.switch is Switch.NONE or self._memory.state(gfn) is not KvmState.SHARED:
            # A reset came between: the frame is an ordinary one again.
            return HCode.H_PARAMETER
        if code == UCode.U_SUCCESS:
            try:
                self._memory.punch(gfn)
            except HostFault:
                return HCode.H_PARAMETER
        return _to_hcode(code)

    async def move_many(
        self, gfns: Sequence[int], move: Callable[[list[int]], Awaitable[list[HCode]]], part_pages: int
    ) -> Counter[HCode]:
        """Run `move` for all GFNs in parts, at most MAX_OPEN_PAGE_CALLS open; how often each code came."""
        codes: Counter[HCode] = Counter()
        parts = iter([list(gfns[i : i + part_pages]) for i in range(0, len(gfns), part_pages)])

        async def worker() -> None:
            for part in parts:
                codes.update(await move(part))

        async with trio.open_nursery() as nursery:
            for _ in range(MAX_OPEN_PAGE_CALLS // part_pages):
                nursery.start_soon(worker)
        return codes

    def _page_args(self, gfn: int) -> list[int]:
        gpa = gpa_of(gfn)
        return [self._lpid, real_address(self._lpid, gpa), gpa, 0, PAGE_SHIFT]


_BUSY: frozenset[int] = frozenset({UCode.U_RETRY, UCode.U_BUSY, HCode.H_BUSY})
_CodeT = TypeVar("_CodeT", bound=int)


async def _while_busy(ask: Callable[[], Awaitable[_CodeT]], deadline: float) -> _CodeT:
    """The code that `ask` gives, asked again while that says busy, until `deadline`."""
    pause = _RETRY_SECONDS
    while (code := await ask()) in _BUSY and trio.current_time() < deadline:
        await trio.sleep(pause * random.uniform(0.5, 1.5))
        pause = min(2 * pause, _MAX_RETRY_SECONDS)
    return code


def _to_hcode(code: int) -> HCode:
    if code == UCode.U_SUCCESS:
        return HCode.H_SUCCESS
    return HCode.H_BUSY if code in _BUSY else HCode.H_PARAMETER
