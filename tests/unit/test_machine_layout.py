"""How the engine's structures are found in memory."""

from __future__ import annotations

import ctypes

import pytest

from services.guest.machine import layout
from services.guest.machine.layout import probe


def test_a_pointer_near_the_processor_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = probe()
    searched = layout._Probe()
    processor = layout._word(searched._base + found.processor)
    # The begin of another allocation, the inside of this one, an odd address, and only then the right one.
    pointers = (ctypes.c_uint64 * 4)(processor - 4096, processor + 64, processor + 3, processor)
    monkeypatch.setattr(searched, "_base", ctypes.addressof(pointers))
    monkeypatch.setattr(searched, "_n_bytes", ctypes.sizeof(pointers))

    again = searched.layout()

    assert again.processor == 24
    assert (again.gprs, again.sprs, again.vsrs) == (found.gprs, found.sprs, found.vsrs)
