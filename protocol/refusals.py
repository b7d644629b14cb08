"""How a receiver refuses a call for a reason that has nothing to do with what the call does."""

from __future__ import annotations

from enum import Enum

from protocol.codes import HCode, UCode
from protocol.declare import Caller
from protocol.messages import MESSAGES, Body
from protocol.ucalls import UCALLS

HELD_UP_STATES = frozenset({"stopped", "unresponsive"})
"""Of a peer that answers nothing now and, once it goes on, serves whatever it was sent."""


class Refusal(Enum):
    """Why. The value is the pair of codes (hypercall or message, ultracall)."""

    UNKNOWN = (HCode.H_FUNCTION, UCode.U_FUNCTION)
    BUSY = (HCode.H_BUSY, UCode.U_BUSY)
    MALFORMED = (HCode.H_PARAMETER, UCode.U_PARAMETER)
    PERMISSION = (HCode.H_PERMISSION, UCode.U_PERMISSION)
    GONE = (HCode.H_HARDWARE, UCode.U_RETRY)
    """Whoever had to answer is dead, stopped, or met an error of its own."""

    @classmethod
    def of_peer(cls, state: str) -> Refusal:
        """For a call that needed a peer in `state`: one that is only stopped or slow may answer the next try."""
        return cls.BUSY if state in HELD_UP_STATES else cls.GONE


def why_not_served(number: int) -> Refusal:
    """Why a call is refused that this receiver does not serve: an ultracall of another caller, or no such function."""
    ucall = UCALLS.by_number.get(number)
    if ucall is None or ucall.callers == {Caller.FIRMWARE}:
        return Refusal.UNKNOWN
    return Refusal.PERMISSION


def refusal(number: int, why: Refusal) -> Body | list[int]:
    """The reply to call `number` that says only `why`."""
    hcall_code, ucall_code = why.value
    if number in UCALLS.by_number:
        return [int(ucall_code)]
    return reply_of_code(number, hcall_code)


def reply_of_code(number: int, code: int) -> Body | list[int]:
    """The reply to call `number` that says only `code`."""
    message = MESSAGES.get(number)
    if message is None or message.reply is None:
        return [int(code)]
    return message.reply.refused(int(code))
