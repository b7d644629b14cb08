"""The virtual terminal of one VM, as the guest's hypercalls reach it.

Its text is kept by `services.runtime.text_buffers`; H_PUT_TERM_CHAR never answers H_BUSY, since printed text always
fits. Source: PAPR 16.6 (H_PUT_TERM_CHAR, H_GET_TERM_CHAR), QEMU `hw/char/spapr_vty.c`.
"""

from __future__ import annotations

from protocol.codes import HCode
from services.runtime.text_buffers import TextBuffers

CALL_BYTES = 16
"""One call moves at most this many bytes, big-endian in two registers."""
VTY_UNIT = 0x7100_0000
"""Unit address of the terminal in the device tree."""
FIRMWARE_TERMNO = 0
"""Firmware prints before it reads the device tree; 0 means the first terminal."""

_SUCCESS: list[int] = [HCode.H_SUCCESS]
_PARAMETER: list[int] = [HCode.H_PARAMETER]
_NOTHING_TYPED: list[int] = [HCode.H_SUCCESS, 0, 0, 0]


class Terminal(TextBuffers):
    """`numbers` are the terminal numbers that a guest may name."""

    def __init__(self, numbers: frozenset[int] = frozenset({FIRMWARE_TERMNO, VTY_UNIT})) -> None:
        super().__init__()
        self._numbers = numbers

    def h_put_term_char(self, termno: int, n_bytes: int, char0_7: int, char8_15: int) -> list[int]:
        """Print up to 16 bytes."""
        if termno not in self._numbers or not 0 <= n_bytes <= CALL_BYTES:
            return _PARAMETER
        self.put((char0_7 << 64 | char8_15).to_bytes(CALL_BYTES, "big")[:n_bytes])
        return _SUCCESS

    def h_get_term_char(self, termno: int) -> list[int]:
        """Take up to 16 typed bytes: `[H_SUCCESS, n_bytes, char0_7, char8_15]`; 0 bytes when nothing was typed."""
        if termno not in self._numbers:
            return _PARAMETER
        if not self.has_typed:
            return _NOTHING_TYPED
        data = self.take_typed(CALL_BYTES)
        registers = int.from_bytes(data.ljust(CALL_BYTES, b"\0"), "big")
        return [HCode.H_SUCCESS, len(data), registers >> 64, registers & (1 << 64) - 1]
