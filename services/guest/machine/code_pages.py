"""Which page the engine fetches from: the true one, or a shadow copy of ours.

A shadow stands in for a code page that the engine would run wrongly:

- it has instructions in whose place others must stand (`replaced.py`);
- it changed since the engine translated it: the copy has a fresh engine-physical address, so the old translations are
  never met again. Of a store of the guest's own the engine drops only those that it hits first, of one through another
  effective address or by a device none;
- a debugger wants to stop in it (`debug.py`).

Data accesses always see the true page. A code page is not writable in the engine's TLB: with the first store it stops
being one, and the next fetch makes it one again, which is slow where code and data that changes share a page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from protocol.geometry import PAGE_BYTES, PAGE_SHIFT
from services.guest.machine.engine_memory import SHADOW_BYTES, EngineMemory
from services.guest.machine.partition import SHADOW_BASE
from services.guest.machine.registers import WORD_BYTES
from services.guest.machine.replaced import Replacement, needed, useful

CODE_PAGE_BYTES = 4096
STOP_WORD = 0x0FE0E00F
"""Where a debugger stops: `twi 31,r0,-8177`, whose bytes say the same in either order of them. For no other trap: the
rest of its block was counted when it began, and what leaves the engine is counted anew."""
_STOP = STOP_WORD.to_bytes(4)
N_SLOTS = SHADOW_BYTES // CODE_PAGE_BYTES
MAX_WRITABLE = 1 << 16
"""Pages that are known to be writable in the TLB, before it has to ask for all of them again."""

_NO_STOPS: frozenset[int] = frozenset()


class ShadowsFull(Exception):
    """Every slot was used once: the engine's translations have to be dropped before one is used again."""


class CodePages:
    """The code pages of one engine, by engine-physical address of the true page.

    `ask_again` makes the engine ask again for each of these pages that it uses.
    """

    def __init__(self, memory: EngineMemory, ask_again: Callable[[Iterable[int]], None]) -> None:
        self._memory = memory
        self._ask_again = ask_again
        self.hide_msr = False
        self._content: dict[int, bytes] = {}
        self._shadows: dict[int, dict[tuple[bool, frozenset[int] | int], int]] = {}
        """True page to its shadows, by whether they are little-endian and where a debugger stops in them, or the place
        of the only instruction in them."""
        self._by_frame: dict[int, set[int]] = {}
        """The pages of `_content` by their engine-physical frame of 64 KiB, normal or secure."""
        self._stale: set[int] = set()
        """Pages whose translations at their true address may be of older content."""
        self._plain: set[tuple[int, bool]] = set()
        """Pages of `_content` that need no shadow, by byte order."""
        self._writable: set[int] = set()
        """Pages that may be writable in the TLB by an entry of their own, none of which is in `_content`."""
        self._writable_frames: set[int] = set()
        """Frames whose pages may be writable by one entry for all of them, none of which is in `_content`."""
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
        self.tlb_flushed()
        self.n_shadows = 0
        self._stops = None

    def tlb_flushed(self) -> None:
        """No page is writable in the TLB any more."""
        self._writable.clear()
        self._writable_frames.clear()

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
        found = needed(content, little_endian=not little_endian, hide_msr=self.hide_msr)
        found += needed(content, little_endian=little_endian, hide_msr=self.hide_msr)
        found += useful(content, little_endian=little_endian)
        if not found and not stops and page not in self._stale:
            self._plain.add((page, little_endian))
            return page
        copy = bytearray(content)
        _put(copy, found)
        _put(copy, ((stop, _STOP) for stop in stops))
        return self._keep(page, (little_endian, stops), self._take_slot(copy))

    def fetch_one(self, page: int, offset: int, *, little_endian: bool) -> int:
        """As `fetch`, of a page that has only its instruction at `offset`, and traps else. Raises ShadowsFull."""
        content = self._memory.read(page, CODE_PAGE_BYTES)
        if content != self._content.get(page):
            self._note(page, content)
        slot = self._shadows.get(page, {}).get((little_endian, offset))
        if slot is not None:
            return slot
        copy = bytearray(_STOP * (CODE_PAGE_BYTES // WORD_BYTES))
        word = content[offset : offset + WORD_BYTES]
        found = needed(word, little_endian=little_endian, hide_msr=self.hide_msr)
        found += useful(word, little_endian=little_endian)
        copy[offset : offset + WORD_BYTES] = found[0][1] if found else word
        return self._keep(page, (little_endian, offset), self._take_slot(copy))

    def stops(self) -> int:
        """The engine-physical address of a page where a debugger stops everywhere. Raises ShadowsFull."""
        if self._stops is None:
            self._stops = self._take_slot(_STOP * (CODE_PAGE_BYTES // WORD_BYTES))
        return self._stops

    def _keep(self, page: int, key: tuple[bool, frozenset[int] | int], slot: int) -> int:
        self._shadows.setdefault(page, {})[key] = slot
        return slot

    def _note(self, page: int, content: bytes) -> None:
        """`page` is new here, or holds something else than it did."""
        frame = page >> PAGE_SHIFT
        # Who fetches it by another address, or for another process, runs translations of older content.
        ask_again = page in self._content or page in self._writable or frame in self._writable_frames
        if page in self._content:
            self._drop(page)
        self._content[page] = content
        self._by_frame.setdefault(frame, set()).add(page)
        self._writable.discard(page)
        self._writable_frames.discard(frame)
        if ask_again:
            self._ask_again([page])

    def _drop(self, page: int) -> None:
        """`page` is code no longer: its translations are of older content."""
        self._stale.add(page)
        self._shadows.pop(page, None)
        self._plain -= {(page, False), (page, True)}
        self._by_frame[page >> PAGE_SHIFT].discard(page)
        del self._content[page]

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
        changed = [page for page in pages if self._memory.read(page, CODE_PAGE_BYTES) != self._content[page]]
        for page in changed:
            self._drop(page)
        if changed:
            self._ask_again(changed)

    def may_write(self, page: int, *, storing: bool) -> bool:
        """Whether the TLB may hold write permission for `page`, which the guest stores to now or may later."""
        if page in self._content:
            if not storing:
                return False
            self._drop(page)
            self._ask_again([page])
        if len(self._writable) == MAX_WRITABLE:
            self._ask_again(self._writable)
            self._writable.clear()
        self._writable.add(page)
        return True

    def may_write_frame(self, page: int) -> bool:
        """As `may_write` of every page of the frame around `page`, which the guest does not store to now."""
        frame = page >> PAGE_SHIFT
        if self._by_frame.get(frame):
            return False
        self._writable_frames.add(frame)
        return True

    def is_plain_frame(self, page: int, *, little_endian: bool) -> bool:
        """Whether `fetch` would give the true page for every page of the frame around `page`."""
        start = page & -PAGE_BYTES
        pages = self._by_frame.get(page >> PAGE_SHIFT, set())
        if len(pages) < PAGE_BYTES // CODE_PAGE_BYTES or any((one, little_endian) not in self._plain for one in pages):
            return False
        # What was code may be something else now: only a fetch compares.
        content = self._memory.read(start, PAGE_BYTES)
        return all(content.startswith(self._content[one], one - start) for one in pages)

    def _take_slot(self, content: bytes | bytearray) -> int:
        if self.n_shadows == N_SLOTS:
            raise ShadowsFull
        start = self.n_shadows * CODE_PAGE_BYTES
        self._memory.shadow[start : start + CODE_PAGE_BYTES] = content
        self.n_shadows += 1
        return SHADOW_BASE + start


def _put(copy: bytearray, words: Iterable[Replacement]) -> None:
    for place, word in words:
        copy[place : place + WORD_BYTES] = word
