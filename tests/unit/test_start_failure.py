"""What a process tells the launcher when it cannot go on."""

from __future__ import annotations

from protocol.errors import HostFault
from services.runtime.process import _reason


def test_a_failure_inside_a_nursery_is_one_line_for_the_operator() -> None:
    group = ExceptionGroup("nursery", [ExceptionGroup("nursery", [HostFault("cannot bind link l")])])

    assert _reason(group) == "cannot bind link l"
    assert _reason(HostFault("truncated")) == "truncated"


def test_a_mistake_of_our_own_keeps_its_trace() -> None:
    assert _reason(ExceptionGroup("nursery", [HostFault("a"), KeyError("b")])) is None
