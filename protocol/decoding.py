"""What a MessagePack decoder may raise on hostile bytes."""

from __future__ import annotations

import msgspec

DECODE_ERRORS = (msgspec.MsgspecError, ValueError, OverflowError, RecursionError)
"""Besides its own errors: text that is not UTF-8, integers that do not fit, nesting without end."""
