"""Two ultravisors with real keys, and a migration between them as far as its handshake."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from services.ultravisor.migration.certificates import NEVER, Trust, issue
from services.ultravisor.migration.exporter import Exporter
from services.ultravisor.migration.handshake import DestinationHandshake, Host, Session, SourceHandshake, Subject
from services.ultravisor.migration.importer import Importer
from services.ultravisor.migration.ledger import Entry
from services.ultravisor.migration.policy import MigrationPolicy
from services.ultravisor.migration.records import ends_at_destination, ends_at_source
from services.ultravisor.page_state import GfnState

PAGE_BYTES = 256
N_PAGES = 8
NOW = 1_800_000_000.0
MEASUREMENT = hashlib.sha256(b"ultravisor").digest()
ROOT = Ed25519PrivateKey.generate()
STATES = bytes([GfnState.SECURE] * 5 + [GfnState.PSEUDO_SHARED_INV, GfnState.SHARED_INV, GfnState.SHARED_IMPLICIT_INV])
STATE = os.urandom(5000)
SUBJECT = Subject("vm1", 3, N_PAGES, MigrationPolicy(may_migrate=True))


@dataclass
class MemoryLedger:
    """Decisions in memory."""

    entries: dict[str, Entry] = field(default_factory=dict)

    def record(self, entry: Entry) -> None:
        self.entries[entry.session] = entry

    def newest(self, session_id: bytes) -> Entry | None:
        return self.entries.get(session_id.hex())

    def settle(self) -> None:
        """Nothing is ever torn."""


class Frames:
    """Secure memory of one side."""

    page_bytes = PAGE_BYTES

    def __init__(self) -> None:
        self.raw = bytearray(N_PAGES * PAGE_BYTES)

    def read(self, gfn: int) -> memoryview:
        return memoryview(self.raw)[gfn * PAGE_BYTES : (gfn + 1) * PAGE_BYTES]

    def expect(self, gfns: Sequence[int]) -> None:
        """It makes no difference here."""

    def write(self, gfn: int, content: bytes | memoryview) -> None:
        self.raw[gfn * PAGE_BYTES : (gfn + 1) * PAGE_BYTES] = content

    def zero(self, gfn: int) -> None:
        self.write(gfn, bytes(PAGE_BYTES))

    def wipe(self) -> None:
        self.raw[:] = bytes(len(self.raw))


def make_host(name: str, root: Ed25519PrivateKey = ROOT, *, expires: int = NEVER, trust: Trust | None = None) -> Host:
    """A host whose identity `root` signed for; it trusts ROOT unless told otherwise."""
    identity = Ed25519PrivateKey.generate()
    certificate = issue(root, name, identity.public_key().public_bytes_raw(), expires)
    trust = trust or Trust(frozenset({ROOT.public_key().public_bytes_raw()}))
    return Host(identity, certificate, MEASUREMENT, trust, lambda: NOW)


def shake_hands(source: Host, destination: Host, subject: Subject = SUBJECT) -> tuple[Session, Session]:
    """Sessions of source and destination; raises MigrationRefused."""
    first = SourceHandshake(source, subject)
    second = DestinationHandshake(destination, first.offer)
    at_source, confirm = first.take_answer(second.answer)
    return at_source, second.take_confirm(confirm)


class Pair:
    """One migration between two hosts."""

    def __init__(self, vm: str = "vm1", source: Host | None = None, destination: Host | None = None) -> None:
        self.source, self.destination = source or make_host("alpha"), destination or make_host("beta")
        sessions = shake_hands(self.source, self.destination, replace_name(vm))
        self.memory, self.frames = Frames(), Frames()
        self.memory.raw[:] = os.urandom(len(self.memory.raw))
        self.memory.zero(3)
        self.book_s, self.book_d = MemoryLedger(), MemoryLedger()
        sealer, opener = ends_at_source(sessions[0])
        self.exporter = Exporter(sessions[0], self.source.identity, self.book_s, sealer, opener, self.memory.read)
        sealer, opener = ends_at_destination(sessions[1])
        self.importer = Importer(sessions[1], self.destination.identity, self.book_d, sealer, opener, self.frames)

    def export_all(self) -> list[bytes]:
        """Every record of a migration with a round in which two pages were written again."""
        exporter = self.exporter
        records = [exporter.pages(range(0, 5)), exporter.pages(range(5, N_PAGES)), exporter.end_epoch()]
        self.memory.write(1, os.urandom(PAGE_BYTES))
        exporter.dirtied([1, 3])
        records += [exporter.pages([1, 3]), exporter.end_epoch()]
        exporter.stop()
        self.memory.write(2, os.urandom(PAGE_BYTES))
        exporter.dirtied([2])
        return [*records, exporter.pages([2]), *exporter.state(STATE), exporter.finish(STATES)]


def replace_name(vm: str) -> Subject:
    return Subject(vm, SUBJECT.lpid, SUBJECT.n_pages, SUBJECT.policy)


def debuggable(host: Host) -> Host:
    return replace(host, debuggable=True)
