"""What the launcher knows of a VM on its way from one host to another, and what it tells of it.

What processes answer is theirs, so it is cleaned before it is kept: facts with printable names, no more than a few.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import msgspec

from deploy.states import printable
from protocol.vm_state import VmState

MAX_FACTS = 64
_MAX_NUMBER = (1 << 63) - 1


class Phase(StrEnum):
    """What the launcher is doing about it."""

    STARTING = "starting"
    MOVING = "moving"
    IN_DOUBT = "in-doubt"
    COMMITTING = "committing"
    UNDOING = "undoing"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Nothing follows."""
        return self in (Phase.DONE, Phase.FAILED, Phase.CANCELLED)


_LAST_WORDS = {Phase.DONE: "completed", Phase.FAILED: "failed", Phase.CANCELLED: "cancelled"}


class MigrationFacts(msgspec.Struct, kw_only=True):
    """A migration for whoever asks (`pefbox jobinfo`).

    `status` is QEMU's word and `progress` what the source's qemu last said beside it; `seconds` is how long it takes,
    or took.
    """

    vm: str
    source: str
    host: str
    phase: str
    status: str
    reason: str
    since: float
    seconds: float
    progress: dict[str, Any]


@dataclass(frozen=True, slots=True)
class DiskHold:
    """A disk of the incoming qemu, whose lock is taken when the source's qemu is gone. `fd` shares its open file."""

    path: str
    readonly: bool
    fd: int


@dataclass(frozen=True, slots=True)
class VmEnd:
    """A VM that is over at one of the two hosts, and why."""

    state: VmState
    reason: str


@dataclass(slots=True)
class Migration:
    """A VM on its way. `incarnation` and `segment` are those at `host`, where it arrives."""

    vm: str
    source: str
    host: str
    incarnation: int
    secure: bool
    by_monitor: bool = False
    """Its qemu waits to hear whether it is done."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """Limits that were given with it and since, by QEMU's names."""
    segment: str = ""
    phase: Phase = Phase.STARTING
    status: str = "none"
    reason: str = ""
    progress: dict[str, Any] = field(default_factory=dict)
    since_s: float = field(default_factory=time.time)
    ended_s: float | None = None
    cancel_asked: bool = False
    home_end: VmEnd | None = None
    """The VM ended where it lives now; what follows is decided with the migration."""
    arrival_end: VmEnd | None = None
    """The same for the host where it arrives."""
    notices: list[tuple[str, str]] = field(default_factory=list)
    """What the host where it arrives said of it before it counted: (what, detail)."""
    disks: list[DiskHold] = field(default_factory=list)

    @property
    def is_open(self) -> bool:
        """The VM may still turn out to run on either host."""
        return self.phase in (Phase.STARTING, Phase.MOVING, Phase.IN_DOUBT)

    def note(self, answer: dict[str, Any]) -> None:
        """Keep what the source's qemu said."""
        facts = cleaned(answer)
        self.status = str(facts.pop("status", self.status))
        self.reason = str(facts.pop("reason", None) or self.reason)
        facts.pop("role", None)
        self.progress = facts

    def end(self, phase: Phase, reason: str = "") -> None:
        """It is over."""
        self.phase, self.ended_s = phase, time.time()
        self.status, self.reason = _LAST_WORDS[phase], printable(reason)

    def facts(self) -> MigrationFacts:
        """For whoever asks."""
        return MigrationFacts(
            vm=self.vm,
            source=self.source,
            host=self.host,
            phase=self.phase.value,
            status=self.status,
            reason=self.reason,
            since=self.since_s,
            seconds=max(0.0, (self.ended_s or time.time()) - self.since_s),
            progress=self.progress,
        )


def cleaned(answer: dict[str, Any], depth: int = 1) -> dict[str, Any]:
    """The facts in an answer: numbers, texts and truth values, and tables of such; all else is left out."""
    facts: dict[str, Any] = {}
    for name, value in answer.items():
        if len(facts) == MAX_FACTS or not isinstance(name, str):
            continue
        if isinstance(value, str):
            facts[printable(name)] = printable(value)
        elif value is None or _is_number(value):
            facts[printable(name)] = value
        elif isinstance(value, dict) and depth:
            facts[printable(name)] = cleaned(value, depth - 1)
    return facts


def _is_number(value: object) -> bool:
    """One that every reader of the answer can take."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and -_MAX_NUMBER <= value <= _MAX_NUMBER
