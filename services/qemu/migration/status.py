"""How far a migration is, in QEMU's words, and what may follow what.

Source: QEMU `qapi/migration.json` (MigrationStatus), `migration/migration.c`. Of its words those for postcopy, COLO and
unplugged devices are left out, as these are not built.
"""

from __future__ import annotations

from enum import StrEnum

from protocol.errors import PefboxError

IN_DOUBT = "in-doubt"
"""A word of our own beside QEMU's: the right to run was given, and nobody at the source knows whether it was taken."""


class MigrationStatus(StrEnum):
    """What query-migrate and the MIGRATION event say."""

    NONE = "none"
    SETUP = "setup"
    ACTIVE = "active"
    PRE_SWITCHOVER = "pre-switchover"
    DEVICE = "device"
    COMPLETED = "completed"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def ended(self) -> bool:
        """Nothing follows but a new migration."""
        return self in _ENDED

    @property
    def running(self) -> bool:
        """One is under way, so that no other may begin."""
        return not self.ended and self is not MigrationStatus.NONE


_S = MigrationStatus
_ENDED = frozenset({_S.COMPLETED, _S.CANCELLED, _S.FAILED})
FOLLOWS: dict[MigrationStatus, frozenset[MigrationStatus]] = {
    _S.NONE: frozenset({_S.SETUP}),
    _S.SETUP: frozenset({_S.ACTIVE, _S.CANCELLING, _S.FAILED}),
    _S.ACTIVE: frozenset({_S.PRE_SWITCHOVER, _S.DEVICE, _S.CANCELLING, _S.FAILED}),
    _S.PRE_SWITCHOVER: frozenset({_S.DEVICE, _S.CANCELLING, _S.FAILED}),
    _S.DEVICE: frozenset({_S.COMPLETED, _S.CANCELLING, _S.FAILED}),
    _S.CANCELLING: frozenset({_S.CANCELLED, _S.FAILED}),
    _S.COMPLETED: frozenset({_S.SETUP}),
    _S.CANCELLED: frozenset({_S.SETUP}),
    _S.FAILED: frozenset({_S.SETUP}),
}


class BadStatus(PefboxError):
    """A step that the migration's status does not allow."""

    def __init__(self, now: MigrationStatus, wanted: MigrationStatus) -> None:
        self.now, self.wanted = now, wanted
        super().__init__(f"a migration that is {now.value} does not become {wanted.value}")


def step(now: MigrationStatus, wanted: MigrationStatus) -> MigrationStatus:
    """`wanted`, if it may follow `now`; raises BadStatus."""
    if wanted not in FOLLOWS[now]:
        raise BadStatus(now, wanted)
    return wanted
