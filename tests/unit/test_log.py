"""The log of a service: what a peer can have it write."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from services.runtime.line_limit import BURST_LINES
from services.runtime.log import Limiter, Log, log_to


class Written:
    """A log and what stands in it; `now` is in seconds."""

    def __init__(self) -> None:
        self.now = 5.0
        self._stream = io.StringIO()
        self.log: Log = log_to(self._stream, "vm1/qemu", Limiter(lambda: self.now))

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._stream.getvalue().splitlines()]


@pytest.fixture
def written() -> Written:
    return Written()


def test_s5_a_peer_that_repeats_itself_does_not_fill_the_disk(written: Written) -> None:
    for attempt in range(BURST_LINES + 7):
        written.log.warning("device fault", device="disk0", reason=f"attempt {attempt}")
    assert len(written.lines()) == BURST_LINES

    written.now += 1
    written.log.warning("device fault", device="disk0", reason="later")

    assert written.lines()[-1]["left_out_before"] == 7


def test_one_vm_link_or_event_takes_nothing_from_another(written: Written) -> None:
    for _ in range(BURST_LINES + 1):
        written.log.bind(vm="vm1").warning("refused")

    written.log.bind(vm="vm2").warning("refused")
    written.log.bind(vm="vm1").error("VM failed")
    written.log.bind(link="alpha-kvm").warning("refused")

    assert len(written.lines()) == BURST_LINES + 3
    assert "left_out_before" not in written.lines()[-1]
