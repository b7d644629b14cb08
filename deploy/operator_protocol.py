"""What commands and the launcher say to each other on `launcher.sock`: a length, then a MessagePack Struct.

A connection carries any number of requests, one at a time. Each shows the token that lies beside the socket: the
services run as the same user, and Landlock keeps them from reading files there, but not from connecting. The launcher
hangs up on them.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec

from protocol.errors import UserError

MAX_FRAME_BYTES = 16 << 20
DEBUG = "debug"
"""The order after whose answer a connection carries a session at the prompt of a process (protocol.debugging)."""

LENGTH = struct.Struct(">I")


class Request(msgspec.Struct, frozen=True):
    """An order or question; `what` is one of the orders in `deploy.operator_socket`."""

    token: str
    what: str
    arguments: dict[str, Any] = {}


class Response(msgspec.Struct, frozen=True):
    """The result, or the one line that says why there is none."""

    result: Any = None
    error: str | None = None


def frame(message: Request | Response) -> bytes:
    """The message with its length in front; raises UserError for a request with what fits into none."""
    try:
        data = msgspec.msgpack.encode(message)
    except (OverflowError, UnicodeEncodeError) as error:
        if not isinstance(message, Request):
            raise
        raise UserError(f"{message.what}: {_why_unfit(error)}") from None
    return LENGTH.pack(len(data)) + data


def _why_unfit(error: OverflowError | UnicodeEncodeError) -> str:
    return "a number is too large" if isinstance(error, OverflowError) else "a name or path that is no UTF-8"
