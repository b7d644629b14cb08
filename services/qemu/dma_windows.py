"""The TCE tables that kvm makes for this machine: asked for by message, mapped when their descriptor comes."""

from __future__ import annotations

import mmap
from collections.abc import Callable

import trio

from protocol import messages as m
from protocol.codes import HCode
from protocol.errors import PefboxError
from services.runtime.cause import CAUSE
from services.runtime.link import Link
from services.runtime.log import Log
from shared.memfd import map_sealed, unmap
from shared.tce import ENTRY_BYTES, TceTable

TABLE_SECONDS = 0.8
"""Of the second that an RTAS call may take."""
_TAG = "tce-table:"


class DmaWindows:
    """Asks kvm over `link`. `use` and `drop` tell the devices which tables they translate through."""

    def __init__(self, link: Link, use: Callable[[TceTable], None], drop: Callable[[int], None], log: Log) -> None:
        self._link = link
        self._use = use
        self._drop = drop
        self._log = log
        self._awaited: dict[int, tuple[m.TceWindowBody, trio.Event]] = {}
        self._tables: dict[int, tuple[TceTable, mmap.mmap]] = {}

    async def create(self, window: m.TceWindowBody) -> bool:
        """Have kvm make an empty table, and use it; False when there is none within TABLE_SECONDS."""
        arrived = trio.Event()
        self._awaited[window.liobn] = (window, arrived)
        try:
            with self._link.patience.bound(TABLE_SECONDS):
                status = await self._link.call(m.TCE_WINDOW_CREATE, window, CAUSE.get())
                if status.code != HCode.H_SUCCESS:
                    self._log.warning("kvm made no TCE table", liobn=f"{window.liobn:#x}", code=status.code)
                    return False
                await arrived.wait()
                return True
        except PefboxError as error:
            self._log.warning("no TCE table", liobn=f"{window.liobn:#x}", reason=str(error))
            return False
        finally:
            self._awaited.pop(window.liobn, None)
        self._log.warning("a TCE table did not arrive", liobn=f"{window.liobn:#x}")
        await self._forget(window.liobn)
        return False

    async def remove(self, liobn: int) -> None:
        """Stop to use a table and have kvm forget it."""
        self._drop(liobn)
        held = self._tables.pop(liobn, None)
        if held is not None:
            table, mapping = held
            table.release()
            unmap(mapping)
        await self._forget(liobn)

    async def _forget(self, liobn: int) -> None:
        try:
            await self._link.call(m.TCE_WINDOW_REMOVE, m.LiobnBody(liobn), CAUSE.get())
        except PefboxError as error:
            self._log.warning("a TCE table stays", liobn=f"{liobn:#x}", reason=str(error))

    def take(self, tag: str, fd: int) -> bool:
        """A descriptor from the launcher; False when it is none that was asked for. Raises HostFault."""
        liobn = _liobn(tag)
        awaited = None if liobn is None else self._awaited.get(liobn)
        if awaited is None:
            return False
        window, arrived = awaited
        mapping = map_sealed(fd, window.n_tces * ENTRY_BYTES)
        table = TceTable(window, memoryview(mapping))
        self._tables[window.liobn] = (table, mapping)
        self._use(table)
        arrived.set()
        return True


def _liobn(tag: str) -> int | None:
    try:
        return int(tag.removeprefix(_TAG), 16) if tag.startswith(_TAG) else None
    except ValueError:
        return None
