"""A private buffer copied into an edu and back into another one: what a device that always translates is good for here.

Each stage is a step of its own, so that one whose hypercall stays busy can be run again.
"""

from __future__ import annotations

import hashlib
from enum import IntEnum

from services.guest.model.cpu import Cpu, Step
from services.guest.model.edu import EduDriver
from services.guest.model.pages import PageAllocator, PageUse
from services.guest.model.state import EduCopy
from services.guest.model.swiotlb import Direction


class Stage(IntEnum):
    """What is done next; OUT is the way into the device, BACK the way back."""

    MAP_OUT = 0
    UNMAP_OUT = 1
    MAP_BACK = 2
    UNMAP_BACK = 3
    DONE = 4


_DIRECTIONS = {Stage.MAP_OUT: Direction.TO_DEVICE, Stage.MAP_BACK: Direction.FROM_DEVICE}


class EduCopier:
    """One copy at a time over `state`, by the device and the mapping device that it names."""

    def __init__(self, cpu: Cpu, pages: PageAllocator, edus: list[EduDriver], state: EduCopy) -> None:
        self._cpu = cpu
        self._pages = pages
        self._edus = edus
        self._state = state

    def start(self, device: int, mapper: int, n_bytes: int) -> None:
        """Copy `n_bytes` through edu `device`, with buffers mapped as for edu `mapper`."""
        state = self._state
        if not state.pages:
            state.pages = [self._pages.must_alloc(1, PageUse.BUFFER) for _ in range(2)]
        source, into = state.pages
        self._cpu.store(source, _pattern(device, n_bytes))
        self._cpu.fill(into, n_bytes)
        state.device, state.mapper, state.n_bytes = device, mapper, n_bytes
        state.stage, state.addresses, state.mapping, state.error = Stage.MAP_OUT, [], None, ""

    @property
    def device(self) -> EduDriver:
        """The edu that copies."""
        return self._edus[self._state.device]

    @property
    def finished(self) -> bool:
        """Whether it is over, well or not."""
        return self._state.stage == Stage.DONE or not self.device.state.ready

    @property
    def matches(self) -> bool:
        """Whether what came back is what was sent."""
        source, into = (self._cpu.load(page, self._state.n_bytes) for page in self._state.pages)
        return source == into

    def work(self) -> Step[None] | None:
        """The next step, if the device does not have to be waited for."""
        if self.finished or self.device.state.submitted_ns:
            return None
        return self._map() if self._state.mapping is None else self._unmap()

    def _map(self) -> Step[None]:
        state = self._state
        stage = Stage(state.stage)
        domain = self._edus[state.mapper].domain
        back = stage is Stage.MAP_BACK
        mapping = yield from domain.dma.map(domain.path, state.pages[back], state.n_bytes, _DIRECTIONS[stage])
        if mapping is None:
            state.error, state.stage = "no room in the DMA pool", Stage.DONE
            return
        state.mapping, state.stage = mapping, stage + 1
        state.addresses.append(mapping.addr)
        yield from self.device.transfer(mapping.addr, state.n_bytes, to_ram=back)

    def _unmap(self) -> Step[None]:
        state, mapping = self._state, self._state.mapping
        assert mapping is not None
        state.mapping, state.stage = None, state.stage + 1
        yield from self._edus[state.mapper].domain.dma.unmap(mapping, state.n_bytes)


def _pattern(number: int, n_bytes: int) -> bytes:
    """Bytes that no other edu was given."""
    return hashlib.shake_256(b"edu %d" % number).digest(n_bytes)
