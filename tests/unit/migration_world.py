"""A migration with everything that can go wrong in it, small enough to try every order of events.

Source and destination are the real objects; the cipher is symbolic (what is sealed cannot be read or made without the
key), the rest of the machine is as much as the protocol needs of it: three pages that a guest writes, a stream that
somebody holds, processes that die, an operator who recovers. `actions` says what may happen next, `do` lets it happen
and checks the invariants.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import pickle
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.errors import HostFault
from services.ultravisor.migration import recovery
from services.ultravisor.migration.certificates import issue
from services.ultravisor.migration.exporter import Exporter, ExportPhase
from services.ultravisor.migration.handshake import Session, Subject
from services.ultravisor.migration.importer import Importer, ImportPhase
from services.ultravisor.migration.ledger import Entry, Ledger, LedgerTorn
from services.ultravisor.migration.policy import MigrationPolicy
from services.ultravisor.migration.records import (
    HEADER,
    TAG_BYTES,
    Direction,
    RecordKind,
    RecordOpener,
    RecordSealer,
)
from services.ultravisor.migration.refusals import MigrationRefused
from services.ultravisor.migration.statements import Word, sign
from services.ultravisor.page_state import GfnState
from shared.page_batch import Page, encode_pages

N_PAGES = 3
N_ROUNDS = 2
WINDOW = 2
"""Records on their way at once."""
PAGE_BYTES = 16
SHARED_GFN = 2
STATES = bytes([GfnState.SECURE, GfnState.SECURE, GfnState.SHARED_INV])
STATE = b"processor"

T = TypeVar("T")
SideT = TypeVar("SideT", Exporter, Importer)
Action = tuple[str, int]
Message = tuple[bool, bytes]
"""Whether it is a statement (else a record), as qemu's stream marks it; and its bytes."""
Way = tuple[Action, "Way | None"]
"""The last action, and how it came to it."""
_TAKERS = {
    RecordKind.PAGES: Importer._take_pages,
    RecordKind.EPOCH_END: Importer._take_epoch_end,
    RecordKind.STATE: Importer._take_state,
    RecordKind.FINAL: Importer._take_final,
}
_FAULTS = ("crash", "cut", "full", "torn", "tamper", "operator")
STORED = 1
"""Argument of what shows it: what was torn was stored."""
_MAY_CANCEL = (ExportPhase.COPYING, ExportPhase.STOPPED, ExportPhase.FINISHED)


class Violation(AssertionError):
    """An invariant does not hold."""


class SymbolicAead:
    """AES-GCM as a model sees it: a ciphertext is a name for what was sealed, known to nobody without the key."""

    _vault: ClassVar[dict[bytes, tuple[bytes, ...]]] = {}

    def __init__(self, key: bytes) -> None:
        self._key = key

    def encrypt_into(self, nonce: bytes, data: memoryview, associated_data: bytes | None, into: memoryview, /) -> int:
        sealed = (self._key, nonce, bytes(data), associated_data or b"")
        name = hashlib.sha256(pickle.dumps(sealed)).digest()[:TAG_BYTES]
        self._vault[name] = sealed
        into[:] = name.ljust(len(data) + TAG_BYTES, b"\0")
        return len(into)

    def decrypt_into(self, nonce: bytes, data: memoryview, associated_data: bytes | None, into: memoryview, /) -> int:
        sealed = self._vault.get(bytes(data[:TAG_BYTES]))
        if sealed is None or any(data[TAG_BYTES:]):
            raise InvalidTag
        key, nonce_then, content, associated_then = sealed
        if (key, nonce_then, associated_then) != (self._key, nonce, associated_data or b""):
            raise InvalidTag
        into[:] = content
        return len(into)


@functools.lru_cache
def _private(seed: bytes) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(seed)


@functools.lru_cache(maxsize=1 << 12)
def _sign(seed: bytes, message: bytes) -> bytes:
    return _private(seed).sign(message)


@dataclass(frozen=True)
class Identity:
    """An identity key that can be copied with the world."""

    seed: bytes

    def sign(self, message: bytes) -> bytes:
        return _sign(self.seed, message)

    @property
    def public(self) -> bytes:
        return _private(self.seed).public_key().public_bytes_raw()


SOURCE, DESTINATION = Identity(b"s" * 32), Identity(b"d" * 32)
_ROOT = _private(b"r" * 32)
_SUBJECT = Subject("vm1", 1, N_PAGES, MigrationPolicy(may_migrate=True))
SESSION_ID = hashlib.sha256(b"session").digest()
_AT_SOURCE = Session(SESSION_ID, _SUBJECT, issue(_ROOT, "beta", DESTINATION.public), b"k" * 32, b"l" * 32)
_AT_DESTINATION = Session(SESSION_ID, _SUBJECT, issue(_ROOT, "alpha", SOURCE.public), b"l" * 32, b"k" * 32)
OTHER_SESSION_ID = hashlib.sha256(b"other session").digest()


@dataclass
class Book:
    """A ledger that survives its ultravisor; `broken` is a full disk, `tears` one that may have stored all the same."""

    entries: dict[bytes, Entry] = field(default_factory=dict)
    broken: bool = False
    tears: bool = False
    torn: Entry | None = None
    """What may have been stored: a crash shows whether it was."""

    def clone(self) -> Book:
        return Book(dict(self.entries), self.broken, self.tears, self.torn)

    def record(self, entry: Entry) -> None:
        if self.tears:
            self.torn = entry
            raise LedgerTorn("perhaps no space left")
        if self.broken:
            raise HostFault("no space left")
        self.entries[bytes.fromhex(entry.session)], self.torn = entry, None

    def settle(self) -> None:
        if self.tears:
            raise HostFault("no space left")

    def reveal(self, *, was_stored: bool) -> None:
        """Whoever reads it next finds what was torn, or does not."""
        if was_stored and self.torn is not None:
            self.entries[bytes.fromhex(self.torn.session)] = self.torn
        self.torn = None

    def newest(self, session_id: bytes) -> Entry | None:
        return self.entries.get(session_id)


@dataclass
class PageStore:
    """Secure memory of one side."""

    pages: list[bytes] = field(default_factory=lambda: [bytes(PAGE_BYTES)] * N_PAGES)
    page_bytes: int = PAGE_BYTES

    def read(self, gfn: int) -> memoryview:
        return memoryview(self.pages[gfn])

    def expect(self, gfns: Sequence[int]) -> None:
        """It makes no difference here."""

    def write(self, gfn: int, content: bytes | memoryview) -> None:
        self.pages[gfn] = bytes(content)

    def zero(self, gfn: int) -> None:
        self.pages[gfn] = bytes(PAGE_BYTES)

    def wipe(self) -> None:
        self.pages = [bytes(PAGE_BYTES)] * N_PAGES


def _shallow(thing: T) -> T:
    """As `copy.copy`, for plain objects, at a tenth of its cost."""
    new = object.__new__(type(thing))
    new.__dict__.update(thing.__dict__)
    return new


def content_of(gfn: int, version: int) -> bytes:
    """What the guest writes: never zero, and nothing that is in any message in plain."""
    return f"page {gfn} v{version} secret"[:PAGE_BYTES].encode().ljust(PAGE_BYTES, b"!")


@dataclass(frozen=True)
class Parts:
    """The classes of both sides; a seeded fault replaces one."""

    exporter: type[Exporter] = Exporter
    importer: type[Importer] = Importer
    sealer: type[RecordSealer] = RecordSealer
    opener: type[RecordOpener] = RecordOpener
    word_of_destination: Callable[[Ledger, Ed25519PrivateKey, bytes, Collection[bytes]], bytes] = (
        recovery.word_of_destination
    )


@dataclass(frozen=True)
class Bounds:
    """How often the guest writes; how often each thing may go wrong in one run, and how many in all."""

    writes: int = 1

    crashes: int = 1
    cuts: int = 1
    tampering: int = 1
    full_disks: int = 1
    orders: int = 1
    """An operator who cancels at the source, or abandons at the destination."""
    total: int = 2


class World:
    """One state of the whole."""

    def __init__(self, parts: Parts, bounds: Bounds) -> None:
        self.bounds, self.parts = bounds, parts
        self.memory = PageStore([content_of(gfn, 0) for gfn in range(N_PAGES)])
        self.frames = PageStore()
        self.book_s, self.book_d = Book(), Book()
        self.dirty: set[int] = set()
        self.n_writes = self.round = 0
        self.to_d: list[Message] = []
        self.to_s: list[Message] = []
        self.old: list[Message] = []
        """Records that the holder of the stream kept."""
        self.linked = True
        self.source_lives = True
        """The guest's memory and processes at the source."""
        self.destination_lives = True
        self.d_ran = False
        self.given = False
        """The source was past the point where it alone decides."""
        self.let_go = False
        """An operator had the destination give up for a source that lived."""
        self.reported = False
        """The source's qemu was told that the destination gave up."""
        self.faults: tuple[str, ...] = ()
        to_d, to_s = Direction.TO_DESTINATION, Direction.TO_SOURCE
        session = _AT_SOURCE
        self.exporter: Exporter | None = parts.exporter(
            session,
            SOURCE,  # type: ignore[arg-type]
            self.book_s,
            parts.sealer(session.send_key, session.session_id, to_d, aead=SymbolicAead),
            parts.opener(session.receive_key, session.session_id, to_s, aead=SymbolicAead),
            self.memory.read,
        )
        session = _AT_DESTINATION
        self.importer: Importer | None = parts.importer(
            session,
            DESTINATION,  # type: ignore[arg-type]
            self.book_d,
            parts.sealer(session.send_key, session.session_id, to_s, aead=SymbolicAead),
            parts.opener(session.receive_key, session.session_id, to_d, aead=SymbolicAead),
            self.frames,
        )

    def clone(self) -> World:
        """A copy in which something else may happen (by hand: a search makes a million of them)."""
        new = _shallow(self)
        new.memory, new.frames = PageStore(list(self.memory.pages)), PageStore(list(self.frames.pages))
        new.book_s, new.book_d = self.book_s.clone(), self.book_d.clone()
        new.dirty, new.to_d, new.to_s = set(self.dirty), list(self.to_d), list(self.to_s)
        new.exporter = self.exporter and new._with_own_parts(self.exporter, new.book_s, _read_page=new.memory.read)
        new.importer = self.importer and new._with_own_parts(self.importer, new.book_d, _frames=new.frames)
        if new.exporter is not None:
            new.exporter._owed = set(new.exporter._owed)
        if new.importer is not None:
            new.importer._take = {kind: getattr(new.importer, take.__name__) for kind, take in _TAKERS.items()}
        return new

    def _with_own_parts(self, side: SideT, book: Book, **parts: object) -> SideT:
        new = _shallow(side)
        new._ledger, new._sealer, new._opener = book, _shallow(side._sealer), _shallow(side._opener)
        new._versions, new._state = _shallow(side._versions), bytearray(side._state)
        new._versions._epochs = side._versions._epochs[:]
        for name, part in parts.items():
            setattr(new, name, part)
        return new

    # -- what is true -----------------------------------------------------------------------------------------

    @property
    def runs_at_source(self) -> bool:
        """Whether the VM may execute there now."""
        return self.source_lives and self.exporter is not None and self.exporter.guest_may_run

    @property
    def runs_at_destination(self) -> bool:
        """Whether the VM may execute there now."""
        return self.destination_lives and self.importer is not None and self.importer.guest_may_run

    def check(self) -> None:
        """Raise Violation unless S1, S3 and S6 hold here."""
        if self.runs_at_source and self.runs_at_destination:
            raise Violation("S6: the VM runs on both sides")
        if self.runs_at_source and self.d_ran:
            raise Violation("S6: the VM runs at the source, and had run at the destination")
        private = [page for gfn, page in enumerate(self.memory.pages) if gfn != SHARED_GFN]
        if self.runs_at_destination and not self.d_ran:
            if self.source_lives and self.frames.pages[:SHARED_GFN] != private:
                raise Violation("S3: the VM started with an old page")
            if any(self.frames.pages[SHARED_GFN]):
                raise Violation("S1: what a page held before it was shared came back")
            if self.importer is not None and (self.importer.state, self.importer.states) != (STATE, STATES):
                raise Violation("S3: the VM started without its state")
            self.d_ran = True
        exporter = self.exporter
        if exporter is not None and exporter.phase is ExportPhase.TOKEN_GIVEN and not exporter._in_doubt:
            self.given = True
        if self.book_s.newest(SESSION_ID) is not None:
            self.given = True
        if any(b"secret" in raw for _, raw in (*self.to_d, *self.to_s)):
            raise Violation("S1: a page is on the stream in plain")
        wiped = not any(any(page) for page in self.frames.pages)
        if self.importer is not None and self.importer.phase is ImportPhase.ABANDONED and not wiped:
            raise Violation("S1: what came of the VM was not wiped")

    def check_end(self) -> None:
        """Nothing can happen any more: raise Violation unless the VM runs on one side, or died with its host."""
        if self.runs_at_source or self.runs_at_destination:
            return
        source_died, destination_died = not self.source_lives, not self.destination_lives
        given_up = destination_died or self.let_go or "operator-abandons" in self.faults
        if (self.d_ran and destination_died) or (source_died and (given_up or not self.given)):
            return
        raise Violation("S6: the VM runs nowhere, though a host that could run it lives")

    @property
    def _d_could_start(self) -> bool:
        return self.importer is not None and self.importer.phase is ImportPhase.READY

    def key(self) -> Hashable:
        """Equal for worlds in which the same can happen."""
        exporter, importer = self.exporter, self.importer
        return (
            exporter and (exporter.phase, exporter.owed, exporter.epoch, *_ends(exporter)),
            importer and (importer.phase, importer.epoch, importer.state, *_ends(importer)),
            *(tuple(value) if isinstance(value, list) else value for value in self._plain()),
        )

    def _plain(self) -> tuple[object, ...]:
        books = tuple(
            (book.broken, book.tears, book.torn, *book.entries.values()) for book in (self.book_s, self.book_d)
        )
        stream = (tuple(self.to_d), tuple(self.to_s), tuple(self.old) if self.linked else ())
        lives = (self.linked, self.source_lives, self.destination_lives)
        flags = (*lives, self.d_ran, self.given, self.let_go, self.reported)
        pages = (tuple(self.memory.pages), tuple(self.frames.pages))
        return (books, stream, flags, pages, frozenset(self.dirty), self.n_writes, self.round, self.faults)

    # -- what may happen --------------------------------------------------------------------------------------

    def actions(self) -> Iterator[Action]:
        """Everything that may happen next."""
        if self.runs_at_source and self.n_writes < self.bounds.writes and self._before_end:
            yield from (("write", gfn) for gfn in range(N_PAGES))
        if self.linked and self.source_lives and len(self.to_d) < WINDOW and self._sending:
            yield "drive", 0
        if self.to_d and self.linked:
            yield "deliver-d", 0
        if self.to_s and self.linked:
            yield "deliver-s", 0
        yield from self._reactions()
        yield from self._faults()

    def _reactions(self) -> Iterator[Action]:
        """What the ultravisors do of themselves once nothing comes any more, and what the operator does."""
        exporter, importer = self.exporter, self.importer
        silent = not self.linked or not (self.to_d or self.to_s)
        stuck = silent and exporter is not None and exporter.phase is ExportPhase.FINISHED
        if (not self.linked or self.reported or stuck) and self._may_cancel:
            yield "cancel", 0
        if not self.linked and importer is not None and importer.phase in (ImportPhase.RECEIVING, ImportPhase.CHECKED):
            yield "give-up", 0
        if silent and self._open:
            yield "recover-d", 0
            yield "recover-s", 0
        books = (self.book_s, self.book_d)
        if any(book.broken or book.tears for book in books):
            yield "make-room", 0
            if any(book.torn for book in books):
                yield "make-room", STORED

    @property
    def _may_cancel(self) -> bool:
        return self.exporter is not None and self.exporter.phase in _MAY_CANCEL

    @property
    def _before_end(self) -> bool:
        """What the guest does after the source took it back is of no interest."""
        return self.exporter is not None and self.exporter.phase is not ExportPhase.RETURNED

    @property
    def _sending(self) -> bool:
        return self.exporter is not None and self.exporter.phase in (ExportPhase.COPYING, ExportPhase.STOPPED)

    @property
    def _open(self) -> bool:
        """Whether an operator has something to resolve."""
        waits_s = self.exporter is not None and self.exporter.phase is ExportPhase.TOKEN_GIVEN
        return waits_s or self._d_could_start

    def _faults(self) -> Iterator[Action]:
        if len(self.faults) >= self.bounds.total:
            return
        for name, side in (("operator-cancels", self.exporter), ("operator-abandons", self.importer)):
            if side is not None and self.faults.count(name) < self.bounds.orders:
                yield name, 0
        for name, limit in (
            ("crash-uv-s", self.bounds.crashes),
            ("crash-uv-d", self.bounds.crashes),
            ("crash-qemu-s", self.bounds.crashes),
            ("crash-qemu-d", self.bounds.crashes),
            ("cut", self.bounds.cuts),
            ("full-disk-s", self.bounds.full_disks),
            ("full-disk-d", self.bounds.full_disks),
            ("torn-disk-s", self.bounds.full_disks),
            ("torn-disk-d", self.bounds.full_disks),
        ):
            if self.faults.count(name) < limit:
                yield name, 0
        for name, book in (("crash-uv-s", self.book_s), ("crash-uv-d", self.book_d)):
            if book.torn is not None and self.faults.count(name) < self.bounds.crashes:
                yield name, STORED
        if self.linked and sum(name.startswith("tamper") for name in self.faults) < self.bounds.tampering:
            if self.to_d and not self.to_d[0][0]:
                yield "tamper-foreign", 0
            if self.to_d:
                yield "tamper-drop", 0
                yield "tamper-alter", 0
                yield "tamper-repeat", 0
            if len(self.to_d) > 1:
                yield "tamper-swap", 0
            if self.old:
                yield "tamper-replay", 0
            if self.to_s:
                yield "tamper-lose-answer", 0
            yield "tamper-forge-word", 0
            yield "tamper-foreign-word", 0

    # -- how it happens ---------------------------------------------------------------------------------------

    def do(self, action: Action) -> None:
        """Let it happen; raises Violation."""
        name, argument = action
        if name.startswith(_FAULTS):
            self.faults = tuple(sorted((*self.faults, name)))
        getattr(self, "_do_" + name.replace("-", "_"))(argument)
        self.check()

    def _do_write(self, gfn: int) -> None:
        self.n_writes += 1
        self.memory.pages[gfn] = content_of(gfn, self.n_writes)
        self.dirty.add(gfn)

    def _do_drive(self, _: int) -> None:
        exporter = self.exporter
        assert exporter is not None
        exporter.dirtied(self.dirty)
        self.dirty.clear()
        if exporter.owed:
            self._send(exporter.pages([min(exporter.owed)]))
        elif exporter.phase is ExportPhase.COPYING:
            self.round += 1
            self._send(exporter.end_epoch())
            if self.round == N_ROUNDS:
                exporter.stop()
        else:
            for record in exporter.state(STATE):
                self._send(record)
            self._send(exporter.finish(STATES))

    def _send(self, record: bytes) -> None:
        self.to_d.append((False, record))
        self.old = [(False, record)]

    def _do_deliver_d(self, _: int) -> None:
        (is_statement, raw), importer = self.to_d.pop(0), self.importer
        if importer is None:
            return
        try:
            if is_statement:
                self.to_s.append((True, importer.take_token(raw)))
                return
            importer.take(raw)
            if importer.phase is ImportPhase.CHECKED:
                self.to_s.append((False, importer.ready()))
        except MigrationRefused:
            if importer.phase is ImportPhase.ABANDONED:
                self.reported = True

    def _do_deliver_s(self, _: int) -> None:
        (is_statement, raw), exporter = self.to_s.pop(0), self.exporter
        if exporter is None:
            return
        try:
            if is_statement:
                exporter.take_statement(raw)
            else:
                self.to_d.append((True, exporter.take_ready(raw)))
        except MigrationRefused:
            self.reported = True

    def _do_cancel(self, _: int) -> None:
        assert self.exporter is not None
        self.exporter.cancel()

    def _do_operator_cancels(self, _: int) -> None:
        """While the migration goes on; the destination hears of it only when the stream ends."""
        assert self.exporter is not None
        with contextlib.suppress(MigrationRefused):
            self.exporter.cancel()

    def _do_operator_abandons(self, _: int) -> None:
        """At the destination, while the migration goes on."""
        assert self.importer is not None
        with contextlib.suppress(MigrationRefused):
            self.to_s.append((True, self.importer.abandon()))

    def _do_make_room(self, stored: int) -> None:
        self._reveal_d(stored)
        self.book_s.reveal(was_stored=stored == STORED)
        for book in (self.book_s, self.book_d):
            book.broken = book.tears = False

    def _reveal_d(self, stored: int) -> None:
        # One whose ledger says so has started it, even if it died at once.
        self.d_ran |= self.book_d.torn is not None and stored == STORED
        self.book_d.reveal(was_stored=stored == STORED)

    def _do_give_up(self, _: int) -> None:
        assert self.importer is not None
        self.importer.abandon()

    def _do_recover_d(self, _: int) -> None:
        """The operator carries the source's word, or that there is none, to the destination."""
        importer = self.importer
        if importer is None or importer.phase is not ImportPhase.READY:
            return
        if self.exporter is None:
            token = recovery.word_of_source(self.book_s, SOURCE, SESSION_ID)  # type: ignore[arg-type]
        else:
            token = self._token_of(self.exporter)
            if token is None and self.exporter.phase is ExportPhase.TOKEN_GIVEN and not self.source_lives:
                # It may be had later, and only the destination has the VM.
                return
        try:
            if token is None or not self.destination_lives:
                importer.abandon()
                self.let_go = self.source_lives
            else:
                importer.take_token(token)
        except MigrationRefused:
            return

    @staticmethod
    def _token_of(exporter: Exporter) -> bytes | None:
        """None also from one that cannot store that it gave it."""
        with contextlib.suppress(MigrationRefused):
            return exporter.token()
        return None

    def _do_recover_s(self, _: int) -> None:
        """The operator carries the destination's word to the source."""
        exporter, importer = self.exporter, self.importer
        if exporter is None or exporter.phase is not ExportPhase.TOKEN_GIVEN:
            return
        if importer is not None:
            if importer.phase not in (ImportPhase.STARTED, ImportPhase.ABANDONED):
                return
            word = importer.word()
        else:
            word = self.parts.word_of_destination(self.book_d, DESTINATION, SESSION_ID, ())  # type: ignore[arg-type]
        exporter.take_statement(word)

    def _do_crash_uv_s(self, stored: int) -> None:
        self.book_s.reveal(was_stored=stored == STORED)
        self.exporter, self.source_lives = None, False
        self._do_cut(0)

    def _do_crash_uv_d(self, stored: int) -> None:
        self._reveal_d(stored)
        self.importer, self.destination_lives = None, False
        self.frames.wipe()
        self._do_cut(0)

    def _do_crash_qemu_s(self, _: int) -> None:
        self.source_lives = False
        self._do_cut(0)

    def _do_crash_qemu_d(self, _: int) -> None:
        """A process of the VM that comes died: its ultravisor gives up, unless it has started."""
        self.destination_lives = False
        if self.importer is not None and self.importer.phase is not ImportPhase.STARTED:
            # A start that may have been stored is not given up: only the token leads on.
            with contextlib.suppress(MigrationRefused):
                self.importer.abandon()
        self._do_cut(0)

    def _do_cut(self, _: int) -> None:
        self.linked = False
        self.to_d.clear()
        self.to_s.clear()

    def _do_full_disk_s(self, _: int) -> None:
        self.book_s.broken = True

    def _do_full_disk_d(self, _: int) -> None:
        self.book_d.broken = True

    def _do_torn_disk_s(self, _: int) -> None:
        self.book_s.tears = True

    def _do_torn_disk_d(self, _: int) -> None:
        self.book_d.tears = True

    def _do_tamper_drop(self, _: int) -> None:
        self.to_d.pop(0)

    def _do_tamper_alter(self, _: int) -> None:
        is_statement, raw = self.to_d[0]
        self.to_d[0] = (is_statement, raw[:-1] + bytes([raw[-1] ^ 1]))

    def _do_tamper_repeat(self, _: int) -> None:
        self.to_d.insert(0, self.to_d[0])

    def _do_tamper_swap(self, _: int) -> None:
        self.to_d[0], self.to_d[1] = self.to_d[1], self.to_d[0]

    def _do_tamper_replay(self, _: int) -> None:
        self.to_d.insert(0, self.old[0])

    def _do_tamper_lose_answer(self, _: int) -> None:
        self.to_s.pop(0)

    def _do_tamper_foreign(self, _: int) -> None:
        """The next record is replaced by the one at its place in another migration between the same hosts."""
        _, epoch, sequence, _ = HEADER.unpack_from(self.to_d[0][1])
        sealer = self.parts.sealer(b"o" * 32, OTHER_SESSION_ID, Direction.TO_DESTINATION, aead=SymbolicAead)
        sealer._sequence = sequence
        record = bytes(sealer.seal(RecordKind.PAGES, epoch, *encode_pages([Page(0, b"x" * PAGE_BYTES)])))
        self.to_d[0] = (False, record)

    def _do_tamper_forge_word(self, _: int) -> None:
        """Somebody without the key says that the destination will never start."""
        self.to_s.insert(0, (True, sign(_private(b"f" * 32), Word.ABANDONED, SESSION_ID)))

    def _do_tamper_foreign_word(self, _: int) -> None:
        """The destination said so of another migration."""
        self.to_s.insert(0, (True, sign(_private(DESTINATION.seed), Word.ABANDONED, OTHER_SESSION_ID)))


def _ends(side: Exporter | Importer) -> tuple[object, ...]:
    """What both sides have: versions of the pages, and where they are in the stream."""
    return side._versions._epochs.tobytes(), side._sealer._sequence, side._opener._sequence


@dataclass(frozen=True)
class Found:
    """What a search saw."""

    n_states: int
    n_ends: int
    phases: frozenset[tuple[str, str]]
    """Pairs of phases of source and destination; `-` where the ultravisor died."""


def search(parts: Parts, bounds: Bounds) -> Found:
    """Try every order of events; raises Violation with the way there."""
    start = World(parts, bounds)
    seen = {hash(start.key())}
    todo: list[tuple[World, Way | None]] = [(start, None)]
    n_ends, phases = 0, set()
    while todo:
        world, way = todo.pop()
        phases.add((_phase(world.exporter), _phase(world.importer)))
        moved, here = False, hash(world.key())
        for action in list(world.actions()):
            after = world.clone()
            try:
                after.do(action)
            except Violation as violation:
                raise Violation(f"{violation}; {_names((action, way))}") from None
            key = hash(after.key())
            moved = moved or (key != here and not action[0].startswith(_FAULTS))
            if key not in seen:
                seen.add(key)
                todo.append((after, (action, way)))
        if not moved:
            n_ends += 1
            try:
                world.check_end()
            except Violation as violation:
                raise Violation(f"{violation}; {_names(way)}") from None
    return Found(len(seen), n_ends, frozenset(phases))


def _phase(side: Exporter | Importer | None) -> str:
    return "-" if side is None else side.phase.value


def _names(way: Way | None) -> list[str]:
    names = []
    while way is not None:
        (name, _), way = way
        names.append(name)
    return names[::-1]
