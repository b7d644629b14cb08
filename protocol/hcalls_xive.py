"""Hypercalls of the XIVE exploitation mode: named, not handled. This machine offers XICS alone."""

from __future__ import annotations

from protocol.declare import Reg
from protocol.hcalls_table import FLAGS, declare_unhandled, words

_LISN = Reg("lisn")
"""Logical interrupt source number."""
_QUEUE = (Reg("target"), Reg("priority"))
_CONFIG = (*_QUEUE, Reg("event_number"))

declare_unhandled(0x3A8, "H_INT_GET_SOURCE_INFO", (FLAGS, _LISN), words("info", "management", "trigger", "page_shift"))
declare_unhandled(0x3AC, "H_INT_SET_SOURCE_CONFIG", (FLAGS, _LISN, *_CONFIG))
declare_unhandled(0x3B0, "H_INT_GET_SOURCE_CONFIG", (FLAGS, _LISN), _CONFIG)
declare_unhandled(0x3B4, "H_INT_GET_QUEUE_INFO", (FLAGS, *_QUEUE), words("notification_page", "page_shift"))
declare_unhandled(0x3B8, "H_INT_SET_QUEUE_CONFIG", (FLAGS, *_QUEUE, *words("queue_page", "queue_shift")))
declare_unhandled(0x3BC, "H_INT_GET_QUEUE_CONFIG", (FLAGS, *_QUEUE), words("config", "queue_page", "queue_shift"))
declare_unhandled(0x3C0, "H_INT_SET_OS_REPORTING_LINE", (FLAGS, Reg("line")))
declare_unhandled(0x3C4, "H_INT_GET_OS_REPORTING_LINE", (FLAGS, *words("target", "line")))
declare_unhandled(0x3C8, "H_INT_ESB", (FLAGS, _LISN, *words("offset", "data")), words("value"))
declare_unhandled(0x3CC, "H_INT_SYNC", (FLAGS, _LISN))
declare_unhandled(0x3D0, "H_INT_RESET", (FLAGS,))
