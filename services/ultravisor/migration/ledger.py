"""The decisions of migrations and snapshots that must outlive a crash of the ultravisor that took them.

Two decide who runs the VM: the source's GIVEN (the destination may start, the source may not) and the destination's
STARTED (it did). Each is stored before anything follows from it. What a destination has not stored as STARTED it can
never start after a crash, since keys and pages are gone; so a promise not to start needs no entry.

Of a snapshot it is SAVED (the VM is in it, and runs here no more), then RESTORED or VOID: `snapshot.book`.
"""

from __future__ import annotations

import os
from enum import Enum
from typing import Protocol

import msgspec

from protocol.decoding import DECODE_ERRORS
from protocol.errors import HostFault
from services.ultravisor.migration.certificates import PublicKey

_MAX_LEDGER_BYTES = 16 << 20


class Decision(Enum):
    """What was decided about one migration or snapshot."""

    GIVEN = "given"
    STARTED = "started"
    CLOSED = "closed"
    SAVED = "saved"
    RESTORED = "restored"
    VOID = "void"


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One decision: `session` in hex names the migration or snapshot, `peer` is the identity of the other ultravisor,
    of a snapshot the own, in hex.
    """

    session: str
    vm: str
    peer: str
    decision: Decision

    @classmethod
    def of(cls, session_id: bytes, vm: str, peer: PublicKey, decision: Decision) -> Entry:
        """From raw bytes."""
        return cls(session_id.hex(), vm, peer.hex(), decision)


class LedgerTorn(HostFault):
    """The entry could not be stored, and whether it was nobody can say."""


class Ledger(Protocol):
    """Where decisions are kept."""

    def record(self, entry: Entry) -> None:
        """Store, and return once a crash cannot undo it.

        Raises HostFault when it was not stored, LedgerTorn when it may have been.
        """

    def newest(self, session_id: bytes) -> Entry | None:
        """The newest entry of a migration."""

    def settle(self) -> None:
        """After LedgerTorn: find out what was stored. Raises HostFault while nobody can say."""


class FileLedger:
    """JSON lines behind a descriptor opened for appending and reading. Raises HostFault when they are no ledger."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._entries: dict[str, Entry] = {}
        self._size_bytes = 0
        self._torn = False
        self._scan()

    def record(self, entry: Entry) -> None:
        """As Ledger.record."""
        # What a failed write left behind counts as whatever it is, before anything is put behind it.
        self.settle()
        raw = msgspec.json.encode(entry) + b"\n"
        if self._size_bytes + len(raw) > _MAX_LEDGER_BYTES:
            raise HostFault("the ledger of migrations is full")
        try:
            if os.write(self._fd, raw) != len(raw):
                raise OSError("it was stored in part")
            os.fsync(self._fd)
        except OSError as error:
            self._take_back(error)
            raise HostFault(f"the ledger of migrations cannot be written: {error}") from None
        self._size_bytes += len(raw)
        self._entries[entry.session] = entry

    def newest(self, session_id: bytes) -> Entry | None:
        """As Ledger.newest."""
        return self._entries.get(session_id.hex())

    def settle(self) -> None:
        """As Ledger.settle."""
        if self._torn:
            self._scan()

    def open_entries(self) -> list[Entry]:
        """Tokens that were given and never answered: what an operator may have to resolve."""
        return [entry for entry in self._entries.values() if entry.decision is Decision.GIVEN]

    def of_vm(self, vm: str) -> list[Entry]:
        """The newest entry of each migration and snapshot of a VM, in the order in which these began.

        What a failed write left behind counts, too. Raises HostFault when that cannot be read.
        """
        self.settle()
        return [entry for entry in self._entries.values() if entry.vm == vm]

    def _take_back(self, cause: OSError) -> None:
        try:
            os.ftruncate(self._fd, self._size_bytes)
            os.fsync(self._fd)
        except OSError:
            self._torn = True
            raise LedgerTorn(f"the ledger of migrations cannot be written: {cause}") from None

    def _scan(self) -> None:
        """Take whole lines for what is stored, and cut off one that is not whole: it was never acted on."""
        try:
            raw = os.pread(self._fd, _MAX_LEDGER_BYTES + 1, 0)
            whole, _, fragment = raw.rpartition(b"\n")
            if fragment:
                os.ftruncate(self._fd, len(raw) - len(fragment))
            os.fsync(self._fd)
        except OSError as error:
            raise HostFault(f"the ledger of migrations cannot be read: {error.strerror}") from None
        if len(raw) > _MAX_LEDGER_BYTES:
            raise HostFault("the ledger of migrations is too long")
        try:
            entries = [msgspec.json.decode(line, type=Entry) for line in whole.splitlines()]
        except DECODE_ERRORS as error:
            raise HostFault(f"the ledger of migrations is damaged: {error}") from None
        self._entries = {entry.session: entry for entry in entries}
        self._size_bytes = len(raw) - len(fragment)
        self._torn = False
