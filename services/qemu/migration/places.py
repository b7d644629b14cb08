"""Where what lies in the stream buffer, as qemu uses it."""

from __future__ import annotations

from protocol.geometry import STREAM_BUFFER_BYTES

RECORD = 0
"""A record or message of an ultravisor, in either direction."""
NEXT_RECORD = 2 << 20
"""The one after it, while it is on its way."""
DIRTY = 4 << 20
"""A bit a GFN of the largest VM that can be moved, 64 GiB, is 128 KiB."""
KVM_STATE = 8 << 20
KVM_STATE_ROOM_BYTES = STREAM_BUFFER_BYTES - KVM_STATE
