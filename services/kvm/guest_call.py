"""A hypercall as its handler sees it, whether it came straight from a normal VM or through the ultravisor."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from services.kvm.ultravisor_port import Answer

Result = list[int]
"""`[code, outputs...]`."""


class GuestCall(NamedTuple):
    """`args` are the declared ones, no more and no fewer; `answer` gives a result later (H_CEDE)."""

    vcpu: int
    args: list[int]
    cause: int
    answer: Answer


AtOnce = Callable[[GuestCall], Result | None]
"""Answers at once; None means that `GuestCall.answer` is called later."""

Waiting = Callable[[GuestCall], Awaitable[Result]]
