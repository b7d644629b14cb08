"""Recorded frames as the calls they were: names, arguments and results from the declarations.

A call and its reply are one line each. Which of the two ends of a link recorded is chosen so that each message shows
once: the upper end, which is never the guest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import msgpack  # type: ignore[import-untyped]
import msgspec

from protocol.declare import Call
from protocol.errors import MalformedMessage
from protocol.hcalls import HCALLS
from protocol.links import KVM_GUEST, ULTRAVISOR_GUEST, ULTRAVISOR_KVM, name_of
from protocol.ucalls import UCALLS, UV_RETURN
from protocol.wire import MAX_MESSAGE_BYTES, Envelope, MessageKind, decode

MAX_OPEN = 4096
_READ_BYTES = 1 << 20


class RecordedFrame(msgspec.Struct, frozen=True, array_like=True):
    """One entry of a record file (services.runtime.recorder)."""

    t_ns: int
    link: str
    direction: str
    frame: bytes
    payload: bytes | None


class RecordReader:
    """Reads a record file as it grows; an entry that is not all there yet comes with the next `read`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._unpacker = self._new_unpacker()

    def read(self) -> Iterator[RecordedFrame]:
        """What was added since the last time."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                while data := file.read(_READ_BYTES):
                    self._offset += len(data)
                    self._unpacker.feed(data)
                    yield from self._complete()
        except FileNotFoundError:
            return

    def _complete(self) -> Iterator[RecordedFrame]:
        for entry in self._unpacker:
            yield msgspec.convert(entry, RecordedFrame)

    @staticmethod
    def _new_unpacker() -> msgpack.Unpacker:
        return msgpack.Unpacker(max_buffer_size=2 * _READ_BYTES + 4 * MAX_MESSAGE_BYTES, raw=False)


def count_calls(record_file: Path) -> tuple[dict[str, int], dict[str, int]]:
    """How often a guest issued each hypercall and each ultracall, by name, from the record of its process."""
    hypercalls: Counter[str] = Counter()
    ultracalls: Counter[str] = Counter()
    for recorded in RecordReader(record_file).read():
        if recorded.direction != "out":
            continue
        envelope = decode(recorded.frame)
        if envelope.kind is not MessageKind.CALL:
            continue
        if (call := HCALLS.by_number.get(envelope.number)) is not None:
            hypercalls[call.name] += 1
        elif (call := UCALLS.by_number.get(envelope.number)) is not None:
            ultracalls[call.name] += 1
    return dict(sorted(hypercalls.items())), dict(sorted(ultracalls.items()))


class CallDecoder:
    """Turns frames into lines; remembers open calls to show how long each took."""

    def __init__(self, vm: str, lpid: int) -> None:
        self._vm, self._lpid = vm, lpid
        self._open: dict[tuple[str, str, int], int] = {}

    def concerns(self, entry: RecordedFrame) -> bool:
        """Whether a frame belongs to the VM: by its link, or by the lpid that a host link's call names first."""
        owner, _, kind = entry.link.partition(":")
        if owner == self._vm:
            return True
        return kind.startswith(ULTRAVISOR_KVM.name) and self._names_lpid(entry)

    def describe(self, entry: RecordedFrame) -> dict[str, Any]:
        """One message: `t_ns`, `link`, `direction`, `kind`, `cause`, `text`, and for a reply `took_us`."""
        row: dict[str, Any] = {"t_ns": entry.t_ns, "link": entry.link, "direction": entry.direction}
        try:
            envelope = decode(entry.frame)
            row |= {"kind": envelope.kind.name.lower(), "number": envelope.number, "name": name_of(envelope.number)}
            row |= {"correlation": envelope.correlation, "cause": envelope.cause}
            row["text"] = self._text(entry, envelope)
            row |= self._timing(entry, envelope)
        except (MalformedMessage, msgspec.MsgspecError) as error:
            row |= {"kind": "malformed", "text": f"malformed: {error}"}
        if entry.payload is not None:
            row["payload_bytes"] = len(entry.payload)
        return row

    def _names_lpid(self, entry: RecordedFrame) -> bool:
        try:
            envelope = decode(entry.frame)
            body = msgspec.msgpack.decode(envelope.body)
            answered = _answered(envelope, body)
            if answered is not None:
                return self._key(entry, answered, reply=True) in self._open
        except (MalformedMessage, msgspec.MsgspecError):
            return False
        return isinstance(body, list) and bool(body) and body[0] == self._lpid

    def _timing(self, entry: RecordedFrame, envelope: Envelope) -> dict[str, Any]:
        if envelope.kind is MessageKind.CALL:
            if len(self._open) >= MAX_OPEN:
                self._open.pop(next(iter(self._open)))
            self._open[self._key(entry, envelope.correlation, reply=False)] = entry.t_ns
        answered = _answered(envelope, msgspec.msgpack.decode(envelope.body))
        started_ns = self._open.pop(self._key(entry, answered, reply=True), None) if answered is not None else None
        return {"took_us": (entry.t_ns - started_ns) / 1000} if started_ns is not None else {}

    @staticmethod
    def _key(entry: RecordedFrame, correlation: int, *, reply: bool) -> tuple[str, str, int]:
        """A reply goes the other way than its call."""
        direction = {"in": "out", "out": "in"}.get(entry.direction, "") if reply else entry.direction
        return entry.link, direction, correlation

    def _text(self, entry: RecordedFrame, envelope: Envelope) -> str:
        body = msgspec.msgpack.decode(envelope.body)
        call = HCALLS.by_number.get(envelope.number) or UCALLS.by_number.get(envelope.number)
        if call is None or not _are_registers(body):
            return f"{name_of(envelope.number)} {_plain(body)}"
        if envelope.kind is MessageKind.REPLY:
            return f"{call.name} -> {call.describe_result(body[0], body[1:])}" if body else f"{call.name} -> nothing"
        return self._call_text(entry, call, body)

    @staticmethod
    def _call_text(entry: RecordedFrame, call: Call, registers: list[int]) -> str:
        kind = entry.link.partition(":")[2].rpartition(".")[0]
        if kind == ULTRAVISOR_KVM.name and call.number in HCALLS.by_number and len(registers) >= 2:
            # To kvm the ultravisor puts lpid and vcpu in front (protocol.links).
            return f"{call.describe(registers[2:])} of lpid {registers[0]} vcpu {registers[1]}"
        if kind in (KVM_GUEST.name, ULTRAVISOR_GUEST.name) and registers:
            # A guest's processor puts its number in front.
            return f"{call.describe(registers[1:])} of vcpu {registers[0]}"
        return call.describe(registers)


def _answered(envelope: Envelope, body: object) -> int | None:
    """The correlation id that a message answers: its own for a reply, the cookie for UV_RETURN."""
    if envelope.kind is MessageKind.REPLY:
        return envelope.correlation
    if envelope.kind is MessageKind.CALL and envelope.number == UV_RETURN.number and _are_registers(body):
        registers = cast("list[int]", body)
        return registers[1] if len(registers) > 1 else None
    return None


def _are_registers(body: object) -> bool:
    return isinstance(body, list) and all(isinstance(value, int) for value in body)


def _plain(body: object) -> str:
    if isinstance(body, list):
        return f"({', '.join(_plain(value) for value in body)})"
    if isinstance(body, bytes):
        return f"<{len(body)} bytes>"
    return f"{body:#x}" if isinstance(body, int) and not isinstance(body, bool) else str(body)
