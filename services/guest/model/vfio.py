"""VFIO: a device lent to a process, whose driver may then give the device any address it wants.

VFIO pins pages of the process and maps them in the DMA window, each at the bus address that is its guest address, so
that a ring works whether the device translates or not. The process then has the device fill a buffer of its own, and a
page of the kernel that was never mapped (the canary). Between them stands the IOMMU alone, so the rule is that only a
device is lent that cannot be made to pass it by; the option `vfio_rule` turns the rule off.

Source: VIRTIO 1.4, section 6.1; Linux `drivers/vfio/vfio_iommu_spapr_tce.c`; the question of the discussion named in
`shared.dma_designs` what becomes of ACCESS_PLATFORM_NO_TRANSLATION with an unprivileged driver.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

from protocol.geometry import PAGE_BYTES
from services.guest.model.cpu import LATER_NS, NoDevice, Step
from services.guest.model.designs import NO_TRANSLATION, PLATFORM
from services.guest.model.pages import PageUse
from services.guest.model.parts import Parts
from services.guest.model.state import Address, Vfio
from services.guest.model.swiotlb import Direction
from services.guest.model.user_driver import UserDriver, try_features
from services.guest.model.virtqueue import ANSWER_LIMIT_NS, QueueBroken

N_BYTES = 4096
"""Of each request."""
CANARY_BYTE = 0xA5
N_SHOWN = 8
_BIT_NAMES = {0: "no bit", PLATFORM: "ACCESS_PLATFORM", NO_TRANSLATION: "NO_TRANSLATION"}


class Stage(IntEnum):
    """What is done next; each is a step, or several of the same kind."""

    NONE = 0
    TAKE = 1
    CHECK = 2
    MAP = 3
    NEGOTIATE = 4
    START = 5
    FILL_OWN = 6
    FILL_CANARY = 7
    STOP = 8
    UNMAP = 9
    GIVE_BACK = 10
    DONE = 11


class Lending:
    """The virtio-rng lent to a process and taken back, over `parts.state.vfio`."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._state: Vfio = parts.state.vfio
        self._process = UserDriver(parts.cpu, parts.rng.transport, self._state.queue)
        self._stages: dict[Stage, Callable[[], Step[None]]] = {
            Stage.TAKE: self._take,
            Stage.CHECK: self._check,
            Stage.MAP: self._map,
            Stage.NEGOTIATE: self._negotiate,
            Stage.START: self._start,
            Stage.FILL_OWN: self._fill_own,
            Stage.FILL_CANARY: self._fill_canary,
            Stage.STOP: self._stop,
            Stage.UNMAP: self._unmap,
            Stage.GIVE_BACK: self._give_back,
        }

    @property
    def active(self) -> bool:
        """Whether the device is lent, or the outcome not yet fetched."""
        return self._state.stage != Stage.NONE

    def begin(self) -> None:
        """Start; nothing is active."""
        state = self._state
        state.refusal = state.error = state.after = ""
        state.mapped, state.taken, state.asked_ns, state.n_overwritten = [], 0, 0, 0
        state.stage = Stage.TAKE

    def work(self) -> Step[None] | None:
        """The next step; None when it is over."""
        stage = Stage(self._state.stage)
        return self._guarded(stage) if stage in self._stages else None

    def outcome(self) -> str:
        """The answer line, when `work` says None; nothing is active afterwards."""
        state = self._state
        state.stage = Stage.NONE
        if state.error:
            return f"error own buffer not filled: {state.error}"
        return f"ok {self._describe()}"

    def _describe(self) -> str:
        state = self._state
        if state.refusal:
            return f"refused: {state.refusal}"
        taken = f"the process took {_BIT_NAMES[state.taken]}"
        if not state.n_overwritten:
            return f"own buffer filled, canary intact; {taken}"
        before = f"{CANARY_BYTE:02x}" * N_SHOWN
        return f"own buffer filled, canary overwritten {state.n_overwritten} bytes, {before} is {state.after}; {taken}"

    def _guarded(self, stage: Stage) -> Step[None]:
        """A device that breaks its rules or is gone ends the lending."""
        try:
            yield from self._stages[stage]()
        except (NoDevice, QueueBroken) as error:
            self._state.error = self._state.error or str(error)
            if stage < Stage.STOP:
                self._state.stage = Stage.STOP
                return
            self._state.stage = Stage.DONE
            self._parts.rng.give_up(str(error))

    # -- the kernel's part --------------------------------------------------------------------------------------------

    def _take(self) -> Step[None]:
        yield from self._parts.rng.release()
        self._state.stage = Stage.CHECK

    def _check(self) -> Step[None]:
        state = self._state
        if self._parts.state.options.get("vfio_rule", True):
            state.refusal = yield from self._rule()
        if state.refusal:
            state.stage = Stage.STOP
            return
        if not state.pages:
            uses = (PageUse.BUFFER, PageUse.BUFFER, PageUse.KERNEL)
            state.pages = [self._parts.pages.must_alloc(1, use) for use in uses]
        for page, value in zip(state.pages, (0, 0, CANARY_BYTE), strict=True):
            self._parts.cpu.fill(page, PAGE_BYTES, value)
        state.stage = Stage.MAP

    def _rule(self) -> Step[str]:
        """Why the device is not lent; empty when it is."""
        parts = self._parts
        if parts.state.secure:
            return "the pages of a process are private in a secure VM, and no device reads or writes them"
        if not (yield from parts.rng.transport.read_features()) & PLATFORM:
            return "the device does not offer ACCESS_PLATFORM and reaches all of memory"
        for bits in (0, NO_TRANSLATION):
            if (yield from try_features(parts.rng.transport, bits)):
                return f"the device serves a driver that takes {_BIT_NAMES[bits]} and reaches all of memory then"
        if parts.wide.leads_anywhere:
            return "all of memory is mapped in the DMA window"
        if sharer := self._sharer():
            return f"{sharer} of the kernel uses the same DMA window"
        return ""

    def _sharer(self) -> str:
        """A device whose buffers the process could reach, since they are mapped where its own are."""
        parts = self._parts
        users = [("the disk", parts.dma.liobn)] if parts.blk.translated and parts.state.blk.ready else []
        users += [
            (driver.name, driver.liobn)
            for driver in parts.extras
            if driver.state.ready and driver.path.address is Address.WINDOW
        ]
        return next((name for name, liobn in users if liobn == parts.rng.liobn), "")

    def _map(self) -> Step[None]:
        """Ring and buffer, one a step; where RAM is mapped to itself already there is nothing to do."""
        state, parts = self._state, self._parts
        own = state.pages[:2]
        if parts.wide.leads_to_itself or len(state.mapped) == len(own):
            state.stage = Stage.NEGOTIATE
            return
        page = own[len(state.mapped)]
        if (yield from parts.window.map_to_itself(page, PAGE_BYTES, Direction.BIDIRECTIONAL)):
            state.mapped.append(page)
        else:
            state.refusal, state.stage = f"bus address {page:#x} is taken", Stage.STOP

    def _stop(self) -> Step[None]:
        yield from self._parts.rng.transport.reset()
        self._state.stage = Stage.UNMAP

    def _unmap(self) -> Step[None]:
        state = self._state
        if not state.mapped:
            state.stage = Stage.GIVE_BACK
            return
        page = state.mapped.pop()
        yield from self._parts.window.unmap(page, self._parts.window.n_io_pages(page, PAGE_BYTES))

    def _give_back(self) -> Step[None]:
        yield from self._parts.start_extra(self._parts.rng)
        self._state.stage = Stage.DONE

    # -- the process's part -------------------------------------------------------------------------------------------

    def _negotiate(self) -> Step[None]:
        self._state.taken = yield from self._process.negotiate()
        self._state.stage = Stage.START

    def _start(self) -> Step[None]:
        ring, _, _ = self._state.pages
        yield from self._process.start(ring)
        self._state.stage = Stage.FILL_OWN

    def _fill_own(self) -> Step[None]:
        state = self._state
        _, buffer, _ = state.pages
        n_written = yield from self._fill(buffer)
        if n_written is None:
            return
        if n_written != N_BYTES or not any(self._parts.cpu.load(buffer, N_BYTES)):
            raise NoDevice("the device gave up" if n_written < 0 else f"{n_written} bytes")
        state.stage = Stage.FILL_CANARY

    def _fill_canary(self) -> Step[None]:
        state = self._state
        *_, canary = state.pages
        # Where a dynamic window has all of RAM, its base is for anybody to guess; else it is 0.
        if (yield from self._fill(self._parts.state.wide.base + canary)) is None:
            return
        found = self._parts.cpu.load(canary, PAGE_BYTES)
        state.n_overwritten = PAGE_BYTES - found.count(CANARY_BYTE)
        state.after = found[:N_SHOWN].hex()
        state.stage = Stage.STOP

    def _fill(self, addr: int) -> Step[int | None]:
        """Ask once, then look every LATER_NS: what the device says; -1 when it does not answer."""
        state, clock = self._state, self._parts.cpu.clock
        if not state.asked_ns:
            state.asked_ns = clock.now_ns()
            yield from self._process.ask(addr, N_BYTES)
            return None
        answer = yield from self._process.answer()
        if answer is None and clock.now_ns() < state.asked_ns + ANSWER_LIMIT_NS:
            self._parts.state.wake_ns = clock.now_ns() + LATER_NS
            return None
        state.asked_ns = 0
        return -1 if answer is None else answer
