"""The audit log of a host: one JSON object a line, each line with the SHA-256 of the line before it.

The ultravisor writes through a file descriptor that the launcher opened for it (`open_audit_file`), and opens no
file itself. Whoever changes, removes or inserts a line breaks the chain at that place, and `verify` names it. Lines
cut off at the end are seen only by someone who knows the newest `AuditHead` (`status` shows it). A chain without a
key proves nothing against someone who rewrites all of it.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from protocol.errors import HostFault, UserError

AUDIT_FILE = "audit.jsonl"
MAX_LINE_BYTES = 16 << 10
MAX_TEXT_CHARS = 1024
FIRST_PREDECESSOR = "0" * 64
"""What the first line records of the line before it."""

OPERATOR_EVENTS = frozenset({"debugger-attached", "debugger-detached", "debugger-port", "break-set", "break-hit"})
"""What the launcher has noted: somebody looks into, or interferes with, this ultravisor or a guest."""

Fact = str | int | float | bool | None | list["Fact"] | dict[str, "Fact"]
Facts = Mapping[str, Fact]


class AuditLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line. `time` is UTC, `vm` empty for what concerns the host, `previous` the hash of the line before."""

    sequence: int
    time: str
    vm: str
    event: str
    facts: dict[str, Any]
    previous: str


@dataclass(frozen=True, slots=True)
class AuditHead:
    """The newest line: its sequence (0 when there is none) and its SHA-256 in hex."""

    sequence: int
    hash: str


@dataclass(frozen=True, slots=True)
class AuditReport:
    """Result of `verify`: the newest intact line, and the first broken line (1-based) with the reason, if any."""

    head: AuditHead
    broken_line: int | None = None
    reason: str = ""


class AuditLog:
    """The writing end, of which there is one a host.

    `fd` was opened by `open_audit_file`; `now` gives seconds since the epoch. Raises HostFault when what is there
    is no audit log that can be continued.
    """

    def __init__(self, fd: int, now: Callable[[], float]) -> None:
        self._fd = fd
        self._now = now
        self._lost_lines = 0
        self._size_bytes, self._head, torn_bytes = _resume(fd)
        if torn_bytes:
            self.write("", "audit-torn-line-removed", {"bytes": torn_bytes})

    @property
    def head(self) -> AuditHead:
        """The newest line written."""
        return self._head

    @property
    def lost_lines(self) -> int:
        """Lines that this machine refused to store since the last one that it did."""
        return self._lost_lines

    def write(self, vm: str, event: str, facts: Facts) -> None:
        """Append one line.

        Raises HostFault when the machine cannot store it (a full disk): the log then stays as it was, and the next
        line that is stored is preceded by one that counts the lost ones. Raises TypeError for facts that are bytes:
        memory of a VM has no place here. Long texts are shortened.
        """
        checked = {_shorten(str(name)): _clean(fact) for name, fact in facts.items()}
        try:
            if self._lost_lines:
                self._append("", "audit-lines-lost", {"lines": self._lost_lines})
                self._lost_lines = 0
            self._append(_shorten(vm), _shorten(event), checked)
        except OSError as error:
            self._lost_lines += 1
            raise HostFault(f"the audit log cannot be written: {error.strerror}") from error

    def _append(self, vm: str, event: str, facts: dict[str, Fact]) -> None:
        time = datetime.fromtimestamp(self._now(), UTC).isoformat(timespec="microseconds")
        line = AuditLine(self._head.sequence + 1, time, vm, event, facts, self._head.hash)
        raw = msgspec.json.encode(line)
        if len(raw) > MAX_LINE_BYTES:
            line = msgspec.structs.replace(line, facts={"facts_too_long_bytes": len(raw)})
            raw = msgspec.json.encode(line)
        self._store(raw + b"\n")
        self._head = AuditHead(line.sequence, _hash(raw))

    def _store(self, raw: bytes) -> None:
        # An earlier failure may have left half a line that could not be taken back then.
        if os.fstat(self._fd).st_size != self._size_bytes:
            os.ftruncate(self._fd, self._size_bytes)
        try:
            written = os.write(self._fd, raw)
            if written != len(raw):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(self._fd, self._size_bytes)
            raise
        self._size_bytes += written


def open_audit_file(state_dir: Path, host: str) -> int:
    """A descriptor for `AuditLog`: append only, readable by its owner alone; raises UserError."""
    path = audit_path(state_dir, host)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UserError(f"{path}: cannot open the audit log: {error.strerror}") from None


def audit_path(state_dir: Path, host: str) -> Path:
    """Where a host's audit log lies."""
    return state_dir / host / AUDIT_FILE


def verify(log: BinaryIO, newest: AuditHead | None = None) -> AuditReport:
    """Check the chain from the start of `log`, in bounded memory.

    The first broken line is the one that its successor recorded differently, or that is no line of an audit log.
    With `newest`, a log that ends before it, or has another line there, is broken too.
    """
    head = AuditHead(0, FIRST_PREDECESSOR)
    for raw in _raw_lines(log):
        number = head.sequence + 1
        line = _decode(raw)
        if line is None:
            return AuditReport(head, number, "is no complete line of an audit log")
        if line.sequence != number:
            return AuditReport(head, number, f"has sequence {line.sequence}: lines are missing, added or out of order")
        if line.previous != head.hash:
            if number == 1:
                return AuditReport(head, 1, "names a predecessor: lines before it are missing")
            return AuditReport(head, head.sequence, f"is not the line that line {number} recorded as its predecessor")
        head = AuditHead(number, _hash(raw[:-1]))
        if newest is not None and number == newest.sequence and head.hash != newest.hash:
            return AuditReport(head, number, "is not the line that the ultravisor wrote last")
    if newest is not None and head.sequence < newest.sequence:
        return AuditReport(head, head.sequence + 1, f"is missing: the ultravisor wrote {newest.sequence} lines")
    return AuditReport(head)


def read_lines(log: BinaryIO) -> Iterator[AuditLine]:
    """The lines of a log in order, up to the first that is none; says nothing about the chain."""
    for raw in _raw_lines(log):
        line = _decode(raw)
        if line is None:
            return
        yield line


# -- details --------------------------------------------------------------------------------------------------

_decoder = msgspec.json.Decoder(AuditLine)


def _raw_lines(log: BinaryIO) -> Iterator[bytes]:
    while raw := log.readline(MAX_LINE_BYTES + 2):
        yield raw


def _decode(raw: bytes) -> AuditLine | None:
    if not raw.endswith(b"\n") or len(raw) > MAX_LINE_BYTES + 1:
        return None
    try:
        return _decoder.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        # A member name that is no UTF-8 is not one of msgspec's own errors.
        return None


def _hash(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def _resume(fd: int) -> tuple[int, AuditHead, int]:
    """Size of the log, its newest line, and how many bytes of a line cut off by a crash were removed."""
    try:
        size = os.fstat(fd).st_size
        tail_at = max(0, size - 2 * (MAX_LINE_BYTES + 1))
        tail = os.pread(fd, size - tail_at, tail_at)
        torn_bytes = len(tail) - (tail.rfind(b"\n") + 1)
        if torn_bytes:
            os.ftruncate(fd, size - torn_bytes)
    except OSError as error:
        raise HostFault(f"the audit log cannot be read: {error.strerror}") from error
    tail = tail[: len(tail) - torn_bytes]
    if not tail and tail_at == 0:
        return 0, AuditHead(0, FIRST_PREDECESSOR), torn_bytes
    raw = tail[tail.rfind(b"\n", 0, -1) + 1 :]
    line = _decode(raw)
    if line is None:
        raise HostFault("the newest line of the audit log is damaged; move the log away to start a new one")
    return size - torn_bytes, AuditHead(line.sequence, _hash(raw[:-1])), torn_bytes


def _clean(fact: object) -> Fact:
    if fact is None or isinstance(fact, (bool, float)):
        return fact
    if isinstance(fact, int):
        return int(fact) if -(1 << 63) <= fact < 1 << 64 else hex(fact)[:MAX_TEXT_CHARS]
    if isinstance(fact, str):
        return _shorten(fact)
    if isinstance(fact, (list, tuple)):
        return [_clean(item) for item in fact]
    if isinstance(fact, Mapping):
        return {_shorten(str(name)): _clean(item) for name, item in fact.items()}
    raise TypeError(f"a fact of an audit line cannot be {type(fact).__name__}")


def _shorten(text: str) -> str:
    cut = text if len(text) <= MAX_TEXT_CHARS else text[:MAX_TEXT_CHARS] + "..."
    # Names come from peers and may hold what UTF-8 cannot.
    return cut.encode("utf-8", "backslashreplace").decode()
