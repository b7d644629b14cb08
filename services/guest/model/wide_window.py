"""The dynamic DMA window: all of RAM mapped once, so that no buffer costs a hypercall.

Beside the 32-bit window a new one lies at a 64-bit bus address, and a device needs as many address bits. Where the
32-bit window is given up first, the new one takes its place at bus address 0: RAM is mapped to itself.

Source: PAPR 7.3.11; Linux `arch/powerpc/platforms/pseries/iommu.c` (enable_ddw).
"""

from __future__ import annotations

from protocol.codes import HCode, RtasStatus
from protocol.hcalls import H_PUT_TCE
from services.guest.model.cpu import Cpu, Step
from services.guest.model.iommu import TCE_READ, TCE_WRITE
from services.guest.model.state import Machine, WideWindow

PAGE_SHIFTS = {1 << 8: 21, 1 << 2: 24, 1 << 1: 16, 1 << 0: 12}
"""Bit in the mask of ibm,query-pe-dma-window to page shift."""
MAX_ADDRESS_BITS = 64
TCES_A_STEP = 64
_WORD = 0xFFFFFFFF


class WideWindows:
    """Makes the window that `state` names; `work` until it says None."""

    def __init__(self, cpu: Cpu, machine: Machine, state: WideWindow) -> None:
        self._cpu = cpu
        self._machine = machine
        self._state = state

    @property
    def leads_anywhere(self) -> bool:
        """Whether there is such a window."""
        return bool(self._state.liobn)

    @property
    def leads_to_itself(self) -> bool:
        """Whether every bus address is the guest address behind it."""
        return bool(self._state.liobn) and self._state.base == 0

    def work(self, config_addr: int, *, at_zero: bool) -> Step[None] | None:
        """The next step on the way to the window; None when there is one, or none can be had."""
        state = self._state
        if not state.tried:
            return self._create(config_addr, at_zero)
        return self._map_some() if state.liobn and state.n_mapped < self._n_tces else None

    def give_back(self, config_addr: int) -> Step[None]:
        """Leave the windows as the machine starts with them, for whoever comes next; devices are quiet."""
        if self._state.tried:
            yield from self._reset(config_addr)
            self._state.tried, self._state.liobn, self._state.n_mapped = False, 0, 0

    @property
    def _n_tces(self) -> int:
        return -(-self._machine.memory_bytes >> self._state.page_shift)

    def _create(self, config_addr: int, at_zero: bool) -> Step[None]:
        """May be run again from its beginning, until it counts as tried."""
        shifts = yield from self._shifts(config_addr, at_zero)
        if shifts is not None:
            if at_zero:
                yield from self._cpu.rtas("ibm,remove-pe-dma-window", (self._machine.window.liobn,), 1)
            made = yield from self._make(config_addr, shifts, at_zero)
            if at_zero and not made:
                yield from self._reset(config_addr)
        self._state.tried = True

    def _shifts(self, config_addr: int, at_zero: bool) -> Step[tuple[int, int] | None]:
        """Page shift and window shift of a window for all of RAM; None when none can be had."""
        rets = yield from self._cpu.rtas("ibm,query-pe-dma-window", self._device(config_addr), 5)
        status, n_left, largest_tces, page_mask, _ = rets
        page_shift = max((shift for bit, shift in PAGE_SHIFTS.items() if page_mask & bit), default=0)
        if status != RtasStatus.SUCCESS or not page_shift or not (n_left or at_zero):
            return None
        window_shift = max(page_shift, (self._machine.memory_bytes - 1).bit_length())
        return (page_shift, window_shift) if 1 << window_shift - page_shift <= largest_tces else None

    def _make(self, config_addr: int, shifts: tuple[int, int], at_zero: bool) -> Step[bool]:
        """Whether there is a window now, at a bus address that such a window can have."""
        args = (*self._device(config_addr), *shifts)
        status, liobn, high, low = yield from self._cpu.rtas("ibm,create-pe-dma-window", args, 4)
        page_shift, window_shift = shifts
        base = high << 32 | low
        fits = base % (1 << page_shift) == 0 and base + (1 << window_shift) <= 1 << MAX_ADDRESS_BITS
        if status != RtasStatus.SUCCESS or not fits or (at_zero and base):
            return False
        self._state.liobn, self._state.base, self._state.page_shift = liobn, base, page_shift
        return True

    def _reset(self, config_addr: int) -> Step[None]:
        yield from self._cpu.rtas("ibm,reset-pe-dma-window", self._device(config_addr), 1)

    def _device(self, config_addr: int) -> tuple[int, int, int]:
        buid = self._machine.buid
        return config_addr, buid >> 32, buid & _WORD

    def _map_some(self) -> Step[None]:
        state = self._state
        for index in range(state.n_mapped, min(self._n_tces, state.n_mapped + TCES_A_STEP)):
            gpa = index << state.page_shift
            code, *_ = yield from self._cpu.hcall(H_PUT_TCE, state.liobn, state.base + gpa, gpa | TCE_READ | TCE_WRITE)
            if code != HCode.H_SUCCESS:
                # Without all of RAM behind it the window is of no use; it stays as it is, and nobody is told of it.
                state.liobn = 0
                return
            state.n_mapped = index + 1
