"""Why a migration does not go on. Told to the operator and written to the audit log."""

from __future__ import annotations

from enum import Enum

from protocol.errors import PefboxError


class Reason(Enum):
    """What was wrong; the value is how it is said."""

    OTHER_VERSION = "the other ultravisor speaks another version of the migration protocol"
    UNTRUSTED_ROOT = "the other ultravisor's certificate is of a root that is not trusted here"
    REVOKED = "the other ultravisor's identity is revoked"
    EXPIRED = "the other ultravisor's certificate has expired"
    BAD_CERTIFICATE = "the other ultravisor's certificate is not signed by its root"
    UNKNOWN_MEASUREMENT = "the other ultravisor's code is not among the accepted measurements"
    BAD_SIGNATURE = "the other ultravisor does not hold the key of its certificate"
    OTHER_MIGRATION = "the message belongs to another migration"
    POLICY = "the policy of the secure VM does not let it go there"
    DEBUGGABLE = "the destination is debuggable, and the policy of the secure VM forbids that"
    TOO_LARGE = "the secure VM has more frames than the last record can tell of"
    NO_ROOM = "the destination has too little secure memory"
    MALFORMED = "a message is malformed"
    NOT_NEXT = "a record was dropped, repeated or reordered"
    NOT_GENUINE = "a record was altered, or is of another migration, snapshot or direction"
    OUT_OF_PLACE = "a record came where the migration has no place for it"
    NOT_NEWEST = "a page did not arrive in its newest version"
    NOT_WHOLE = "the state did not arrive whole"
    WRONG_PHASE = "the migration is not at that step"
    TOKEN_GIVEN = "the start token was given: only the destination's word brings the secure VM back"
    NOT_THIS_VM = "what comes is not the VM that is expected here"
    NO_IDENTITY = "this host has no identity for migrations"
    NOT_STARTED = "the guest did not take over its state"
    SNAPSHOT_VERSION = "the snapshot is of another version"
    ELSEWHERE = "the snapshot was taken by another ultravisor"
    NOT_SAVED = "this ultravisor has not completed this snapshot, or it was altered"
    RESTORED_BEFORE = "the snapshot was restored already, and the secure VM ran on since"
    BEGAN_SINCE = "the secure VM was started again since the snapshot"
    OLDER_SNAPSHOT = "a newer snapshot of the secure VM was taken"
    NOT_RESTORING = "the VM is not being restored from a snapshot"
    DEBUGGED = "a debugger may be attached here, which the secure VM did not allow when it was saved"
    GUEST_NOT_SAVED = "the guest cannot be saved"
    NOT_STORED = "the decision cannot be stored, so it was not taken"


class MigrationRefused(PefboxError):
    """A peer, a message or a step that did not pass; `reason` says why, `detail` what exactly."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason.value}: {detail}" if detail else reason.value)
