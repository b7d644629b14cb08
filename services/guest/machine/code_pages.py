"""Which page the engine fetches from: the true one, or a shadow copy of ours.

A shadow stands in for a code page that the engine would run wrongly:

- it reads a register that the engine gets wrong (MSR in a secure VM, since the engine cannot hold MSR.S; PURR and
  SPURR), or writes PIDR, of which we have to hear: in the copy each such instruction is a trap, `sc` with a level that
  nothing else uses, and the handler looks up the true instruction in the true page;
- it changed since the engine translated it. A store of the guest's own drops the translations, but one by a device or
  the hypervisor does not: the copy has a fresh engine-physical address, so they are never met again;
- a debugger wants to stop in it (`debug.py`).

Data accesses always see the true page. A page with a shadow is not writable in the engine's TLB: the first store drops
the shadow, the next fetch makes another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

from protocol.geometry import PAGE_SHIFT
from services.guest.machine.engine_memory import SHADOW_BYTES, EngineMemory
from services.guest.machine.partition import SHADOW_BASE

CODE_PAGE_BYTES = 4096
TRAP_LEVEL = 5
TRAP_WORD = 0x44000002 | TRAP_LEVEL << 5
STOP_WORD = 0x0FE0E00F
"""Where a debugger stops: `twi 31,r0,-8177`, whose bytes say the same in either order of them. For no other trap: the
rest of its block was counted when it began, and what leaves the engine is counted anew."""
_STOP = STOP_WORD.to_bytes(4)
N_SLOTS = SHADOW_BYTES // CODE_PAGE_BYTES

_REGISTER_MASK = 0xFC1FFFFF
_MFMSR = 0x7C0000A6
_MFSPURR = 0x7C144AA6
_MFPURR = 0x7C154AA6
_MTPIDR = 0x7C100BA6
_NO_STOPS: frozenset[int] = frozenset()


class ShadowsFull(Exception):
    """Every slot was used once: the engine's translations have to be dropped before one is used again."""


def is_mfmsr(word: int) -> bool:
    """Whether an instruction word reads the MSR."""
    return word & _REGISTER_MASK == _MFMSR


def is_mfpurr(word: int) -> bool:
    """Whether an instruction word reads PURR or SPURR."""
    return word & _REGISTER_MASK in (_MFPURR, _MFSPURR)


def is_mtpidr(word: int) -> bool:
    """Whether an instruction word writes PIDR."""
    return word & _REGISTER_MASK == _MTPIDR


def trap_places(page: bytes, *, little_endian: bool, hide_msr: bool) -> list[int]:
    """Offsets of the instructions of a code page that must be traps; `mfmsr` is one when `hide_msr` is set."""
    places = _places(page, _MFPURR, is_mfpurr, little_endian)
    places += _places(page, _MTPIDR, is_mtpidr, little_endian)
    return places + _places(page, _MFMSR, is_mfmsr, little_endian) if hide_msr else places


def _places(page: bytes, word: int, is_one: Callable[[int], bool], little_endian: bool) -> list[int]:
    order: Literal["little", "big"] = "little" if little_endian else "big"
    # The low half of the word does not depend on the register: searching for it passes over nearly everything.
    half = (word & 0xFFFF).to_bytes(2, order)
    within = 0 if little_endian else 2
    places = []
    at = page.find(half)
    while at >= 0:
        start = at - within
        if start % 4 == 0 and is_one(int.from_bytes(page[start : start + 4], order)):
            places.append(start)
        at = page.find(half, at + 1)
    return places


class CodePages:
    """The code pages of one engine, by engine-physical address of the true page.

    `flush_tlb` makes the engine ask again for every page it uses.
    """

    def __init__(self, memory: EngineMemory, flush_tlb: Callable[[], None]) -> None:
        self._memory = memory
        self._flush_tlb = flush_tlb
        self.hide_msr = False
        self._content: dict[int, bytes] = {}
        self._shadows: dict[int, dict[tuple[bool, frozenset[int] | int], int]] = {}
        """True page to its shadows, by whether they are little-endian and where a debugger stops in them, or the place
        of the only instruction in them."""
        self._by_frame: dict[int, set[int]] = {}
        """The pages of `_content` in normal RAM by their frame of 64 KiB."""
        self._stale: set[int] = set()
        """Pages whose translations at their true address may be of older content."""
        self._plain: set[tuple[int, bool]] = set()
        """Pages of `_content` that need no shadow, by byte order."""
        self._writable: set[int] = set()
        self._marks: memoryview | None = None
        self._written: set[int] = set()
        """Frames that a device wrote since `clear`."""
        self.n_shadows = 0
        self._stops: int | None = None
        """The page of `stops`, where there is one."""

    def clear(self) -> None:
        """The engine has dropped every translation, and its TLB."""
        self._content.clear()
        self._by_frame.clear()
        self._written.clear()
        self._shadows.clear()
        self._stale.clear()
        self._plain.clear()
        self._writable.clear()
        self.n_shadows = 0
        self._stops = None

    def tlb_flushed(self) -> None:
        """No page is writable in the TLB any more."""
        self._writable.clear()

    def fetch(self, page: int, *, little_endian: bool, stops: frozenset[int] = _NO_STOPS) -> int:
        """The engine-physical page to fetch from, for the true `page`; `stops` are offsets of more traps. Raises
        ShadowsFull."""
        content = self._memory.read(page, CODE_PAGE_BYTES)
        if content != self._content.get(page):
            self._note(page, content)
        elif not stops and (page, little_endian) in self._plain:
            return page
        slot = self._shadows.get(page, {}).get((little_endian, stops))
        if slot is not None:
            return slot
        # The guest may change its byte order within a page, and the engine asks for no page because of that.
        other = trap_places(content, little_endian=not little_endian, hide_msr=self.hide_msr)
        places = trap_places(content, little_endian=little_endian, hide_msr=self.hide_msr)
        if not places and not other and not stops and page not in self._stale:
            self._plain.add((page, little_endian))
            return page
        copy = bytearray(content)
        _put(copy, other, _trap(not little_endian))
        _put(copy, places, _trap(little_endian))
        _put(copy, stops, _STOP)
        return self._keep(page, (little_endian, stops), self._take_slot(copy))

    def fetch_one(self, page: int, offset: int, *, little_endian: bool) -> int:
        """As `fetch`, of a page that has only its instruction at `offset`, and traps else. Raises ShadowsFull."""
        content = self._memory.read(page, CODE_PAGE_BYTES)
        if content != self._content.get(page):
            self._note(page, content)
        slot = self._shadows.get(page, {}).get((little_endian, offset))
        if slot is not None:
            return slot
        copy = bytearray(_STOP * (CODE_PAGE_BYTES // 4))
        word = content[offset : offset + 4]
        is_trap = trap_places(word, little_endian=little_endian, hide_msr=self.hide_msr)
        copy[offset : offset + 4] = _trap(little_endian) if is_trap else word
        return self._keep(page, (little_endian, offset), self._take_slot(copy))

    def stops(self) -> int:
        """The engine-physical address of a page where a debugger stops everywhere. Raises ShadowsFull."""
        if self._stops is None:
            self._stops = self._take_slot(_STOP * (CODE_PAGE_BYTES // 4))
        return self._stops

    def _keep(self, page: int, key: tuple[bool, frozenset[int] | int], slot: int) -> int:
        self._shadows.setdefault(page, {})[key] = slot
        if page in self._writable:
            self._flush_tlb()
        return slot

    def _note(self, page: int, content: bytes) -> None:
        """`page` is new here, or holds something else than it did."""
        if page in self._content:
            self._stale.add(page)
            self._shadows.pop(page, None)
            self._plain -= {(page, False), (page, True)}
        else:
            self._by_frame.setdefault(page >> PAGE_SHIFT, set()).add(page)
        self._content[page] = content

    def watch(self, marks: memoryview) -> None:
        """Devices set a byte of `marks`, one a frame, before they write it and again with each later write."""
        self._marks = marks

    def look_at_writes(self) -> None:
        """Have the engine ask again for its code pages when a device changed one of them.

        A device marks a frame before the bytes are there, so every frame that was ever marked is compared whenever
        there is a new mark: what tells the guest that its data has come, a ring or an argument block, makes one.
        """
        if self._marks is None:
            return
        marked = bytes(self._marks)
        frame = marked.find(1)
        if frame < 0:
            return
        while frame >= 0:
            self._marks[frame] = 0
            self._written.add(frame)
            frame = marked.find(1, frame + 1)
        pages = (page for frame in self._written & self._by_frame.keys() for page in self._by_frame[frame])
        if any(self._memory.read(page, CODE_PAGE_BYTES) != self._content[page] for page in pages):
            self._flush_tlb()

    def may_write(self, page: int, *, storing: bool) -> bool:
        """Whether the TLB may hold write permission for `page`, which the guest stores to now or may later."""
        if page in self._shadows:
            if not storing:
                return False
            del self._shadows[page]
            self._flush_tlb()
        self._writable.add(page)
        return True

    def _take_slot(self, content: bytes | bytearray) -> int:
        if self.n_shadows == N_SLOTS:
            raise ShadowsFull
        start = self.n_shadows * CODE_PAGE_BYTES
        self._memory.shadow[start : start + CODE_PAGE_BYTES] = content
        self.n_shadows += 1
        return SHADOW_BASE + start


def _put(copy: bytearray, places: Iterable[int], word: bytes) -> None:
    for place in places:
        copy[place : place + 4] = word


def _trap(little_endian: bool) -> bytes:
    return TRAP_WORD.to_bytes(4, "little" if little_endian else "big")
