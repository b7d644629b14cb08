"""Rounds of a live migration: all pages once, then those written meanwhile, until the rest fits into the downtime.

After each round the bandwidth that was reached says how much the allowed downtime carries. When what is dirty is no
more than that, the guest stops and the rest goes; else another round begins. A guest that writes faster than the link
carries is never stopped for it: the operator sees that it does not converge, and raises the limits or cancels.

Source: QEMU `migration/migration.c` (`migration_rate_account`, `migration_iteration_run`), `migration/ram.c`.
"""

from __future__ import annotations

from enum import Enum

import msgspec

NS = 1_000_000_000
_MS_A_SECOND = 1000
MEASURED_BYTES = 1 << 20
"""A round with less content says nothing about the link."""


class Next(Enum):
    """What follows a round."""

    ROUND = "round"
    STOP = "stop"


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far it is. Rates are of the last round that says something; `expected_downtime_ms` if it stopped now, None as
    long as nothing says what the link carries."""

    round: int
    total_bytes: int
    transferred_bytes: int
    remaining_bytes: int
    zero_pages: int
    data_pages: int
    dirty_pages_per_second: int
    bytes_per_second: int
    expected_downtime_ms: int | None
    converges: bool


class Precopy:
    """One migration's rounds. Only counts pages and time; whoever sends tells it."""

    def __init__(self, n_pages: int, page_bytes: int, downtime_limit_ms: int, now_ns: int) -> None:
        self._n_pages, self._page_bytes = n_pages, page_bytes
        self.downtime_limit_ms = downtime_limit_ms
        """May be changed at any time; counts from the end of the round on."""
        self.round = 1
        self._round_began_ns = now_ns
        self._owed_pages = n_pages
        self._round_bytes = self._round_pages = self._round_data_pages = self._transferred_bytes = 0
        self._zero_pages = self._data_pages = 0
        self._bytes_per_second = self._dirty_pages_per_second = 0

    def sent(self, n_bytes: int, *, zero_pages: int, data_pages: int) -> None:
        """So many bytes left, and so many pages in them."""
        self._round_bytes += n_bytes
        self._round_pages += zero_pages + data_pages
        self._round_data_pages += data_pages
        self._transferred_bytes += n_bytes
        self._zero_pages += zero_pages
        self._data_pages += data_pages
        self._owed_pages = max(0, self._owed_pages - zero_pages - data_pages)

    def end_round(self, dirty_pages: int, now_ns: int) -> Next:
        """Everything that was owed is sent, and `dirty_pages` were written meanwhile."""
        took_ns = max(1, now_ns - self._round_began_ns)
        self._measure(took_ns)
        self._dirty_pages_per_second = dirty_pages * NS // took_ns
        self._owed_pages, self._round_began_ns = dirty_pages, now_ns
        self._round_bytes = self._round_pages = self._round_data_pages = 0
        if self._downtime_ms() <= self.downtime_limit_ms:
            return Next.STOP
        self.round += 1
        return Next.ROUND

    def progress(self) -> Progress:
        """For whoever watches."""
        return Progress(
            round=self.round,
            total_bytes=self._n_pages * self._page_bytes,
            transferred_bytes=self._transferred_bytes,
            remaining_bytes=self._owed_pages * self._page_bytes,
            zero_pages=self._zero_pages,
            data_pages=self._data_pages,
            dirty_pages_per_second=self._dirty_pages_per_second,
            bytes_per_second=self._bytes_per_second,
            expected_downtime_ms=self._downtime_ms() if self._bytes_per_second else None,
            converges=self._dirty_pages_per_second * self._page_bytes < max(1, self._bytes_per_second),
        )

    def _measure(self, took_ns: int) -> None:
        if self._round_data_pages * self._page_bytes >= MEASURED_BYTES:
            self._bytes_per_second = self._round_bytes * NS // took_ns
            return
        # Pages of zeros send next to nothing: what counts is how fast pages are done, and only if that is faster.
        done_bytes = self._round_pages * self._page_bytes
        self._bytes_per_second = max(self._bytes_per_second, done_bytes * NS // took_ns)

    def _downtime_ms(self) -> int:
        """To send what is owed at the bandwidth of the last round; rounded up, so that a page is never free."""
        owed_bytes = self._owed_pages * self._page_bytes
        return -(-owed_bytes * _MS_A_SECOND // max(1, self._bytes_per_second))
