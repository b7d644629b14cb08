"""What of a message may be written into a trace: files that, for all that is promised, a host can read (S1).

The links between processes that the host may know everything of are written down as they are. Of the link between
ultravisor and guest only this is, of a call as of its reply: the registers that the declaration names, unless the call
is private; the fields of a message that the tables below leave. A number or a body that nobody declared is a secure
VM's own, and so is a text of its kernel.
"""

from __future__ import annotations

from typing import Any

import msgspec

from protocol import messages as m
from protocol.declare import Call, Caller
from protocol.decoding import DECODE_ERRORS
from protocol.errors import MalformedMessage
from protocol.hcalls import HCALLS
from protocol.links import QEMU_MIGRATION, ULTRAVISOR_GUEST
from protocol.messages import decode_registers, decode_result
from protocol.ucalls import UCALLS
from protocol.wire import Envelope, MessageKind, decode, encode

CONFIDENTIAL_LINKS = frozenset({ULTRAVISOR_GUEST.name, QEMU_MIGRATION.name})
"""Kinds of links of whose messages only `written_form` is kept."""
UNDECLARED = 0
"""The number of a message whose own is not written down."""
_GUESTS = frozenset({Caller.VM, Caller.SVM})
_FIELDS_LEFT: dict[tuple[MessageKind, int], int] = {
    (MessageKind.REPLY, m.SVM_FREEZE.number): 1,
    (MessageKind.CALL, m.SVM_LOAD.number): 1,
    (MessageKind.EVENT, m.GUEST_CRASHED.number): 1,
    (MessageKind.CALL, m.MIGRATION_KEY.number): 0,
}
"""Messages with registers, a text or a key in them: so many of their fields are kept."""


def written_form(frame: bytes) -> tuple[bytes, bool]:
    """A frame of a confidential link as it may be written down, and whether that is less than what travelled."""
    try:
        envelope = decode(frame)
    except MalformedMessage:
        return b"", True
    call = HCALLS.by_number.get(envelope.number) or UCALLS.by_number.get(envelope.number)
    if call is not None:
        return _shortened(frame, envelope, _registers_left(call, envelope))
    message = m.MESSAGES.get(envelope.number)
    if message is None:
        return encode(envelope.kind, UNDECLARED, envelope.correlation, envelope.cause, []), True
    return _shortened(frame, envelope, _fields_left(message, envelope))


def _registers_left(call: Call, envelope: Envelope) -> int:
    """How many registers of a call or its reply are kept: vcpu number or code are the first."""
    if call.private or not call.callers & _GUESTS:
        return 1
    if envelope.kind is MessageKind.REPLY:
        return 1 + len(call.results)
    return 1 + len(call.hardware) + call.n_args


def _fields_left(message: m.Message[Any, Any], envelope: Envelope) -> int:
    kept = _FIELDS_LEFT.get((envelope.kind, envelope.number))
    if kept is not None:
        return kept
    body = message.reply if envelope.kind is MessageKind.REPLY else message.body
    return 0 if body is None else len(body.__struct_fields__)


def _shortened(frame: bytes, envelope: Envelope, n_kept: int) -> tuple[bytes, bool]:
    try:
        values = _values(envelope)
    except (MalformedMessage, *DECODE_ERRORS):
        values, n_kept = [None], 0
    if len(values) <= n_kept:
        return frame, False
    return encode(envelope.kind, envelope.number, envelope.correlation, envelope.cause, values[:n_kept]), True


def _values(envelope: Envelope) -> list[Any]:
    """The registers or fields of a body that is what its number declares; raises MalformedMessage."""
    message = m.MESSAGES.get(envelope.number)
    if message is None:
        is_reply = envelope.kind is MessageKind.REPLY
        return decode_result(envelope.body) if is_reply else decode_registers(envelope.body)
    if envelope.kind is MessageKind.REPLY:
        message.decode_reply(envelope.body)
    else:
        message.decode_body(envelope.body)
    return msgspec.msgpack.decode(envelope.body, type=list[Any])
