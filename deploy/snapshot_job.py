"""What the launcher knows of a snapshot that is being taken or restored, and what it tells of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

from deploy.migration_record import cleaned
from deploy.states import printable


class SnapshotKind(StrEnum):
    """What is being done."""

    SAVE = "snapshot"
    RESTORE = "restore"


class SnapshotPhase(StrEnum):
    """How far it is."""

    STARTING = "starting"
    SAVING = "saving"
    COMMITTING = "committing"
    LOADING = "loading"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    IN_DOUBT = "in-doubt"
    """The VM is off, and nobody could say whether the file became its only state: restoring it will tell."""

    @property
    def ended(self) -> bool:
        """Nothing follows."""
        return self in (SnapshotPhase.DONE, SnapshotPhase.FAILED, SnapshotPhase.CANCELLED, SnapshotPhase.IN_DOUBT)


class SnapshotFacts(msgspec.Struct, kw_only=True):
    """For whoever asks. `progress` is what the VM's qemu said last; `seconds` is how long it takes, or took."""

    vm: str
    kind: str
    file: str
    phase: str
    reason: str
    since: float
    seconds: float
    progress: dict[str, Any]


@dataclass(slots=True)
class SnapshotJob:
    """One snapshot or restore."""

    vm: str
    kind: SnapshotKind
    path: Path
    phase: SnapshotPhase = SnapshotPhase.STARTING
    status: str = "none"
    """The word of the VM's qemu."""
    reason: str = ""
    publish_error: str = ""
    """Why the file could not get its name."""
    progress: dict[str, Any] = field(default_factory=dict)
    since_s: float = field(default_factory=time.time)
    ended_s: float | None = None

    @property
    def restores(self) -> bool:
        """Whether the VM is to go on out of the file."""
        return self.kind is SnapshotKind.RESTORE

    def note(self, answer: object) -> None:
        """Keep what qemu said."""
        if not isinstance(answer, dict):
            return
        facts = cleaned(answer)
        self.status = str(facts.pop("status", self.status))
        self.reason = str(facts.pop("reason", None) or self.reason)
        facts.pop("ready", None)
        self.progress = facts

    def end(self, phase: SnapshotPhase, reason: str = "") -> None:
        """It is over."""
        self.phase, self.ended_s, self.reason = phase, time.time(), printable(reason)

    def facts(self) -> SnapshotFacts:
        """For whoever asks."""
        return SnapshotFacts(
            vm=self.vm,
            kind=self.kind.value,
            file=str(self.path),
            phase=self.phase.value,
            reason=self.reason,
            since=self.since_s,
            seconds=max(0.0, (self.ended_s or time.time()) - self.since_s),
            progress=self.progress,
        )
