"""The data that QMP commands take and return, named as in QEMU.

Source: QEMU `qapi/run-state.json`, `qapi/control.json`, `qapi/misc.json`, `qapi/machine.json`.
"""

from __future__ import annotations

import enum

import msgspec

from shared.machine_type import QEMU_RELEASE


class ErrorClass(enum.StrEnum):
    """What a client can tell errors apart by; the description is for people."""

    GENERIC = "GenericError"
    COMMAND_NOT_FOUND = "CommandNotFound"
    DEVICE_NOT_FOUND = "DeviceNotFound"
    DEVICE_NOT_ACTIVE = "DeviceNotActive"


class RunState(enum.StrEnum):
    """What the virtual machine does."""

    PRELAUNCH = "prelaunch"
    RUNNING = "running"
    PAUSED = "paused"
    SHUTDOWN = "shutdown"
    FINISH_MIGRATE = "finish-migrate"
    POSTMIGRATE = "postmigrate"
    INMIGRATE = "inmigrate"
    GUEST_PANICKED = "guest-panicked"
    INTERNAL_ERROR = "internal-error"

    @property
    def elsewhere(self) -> bool:
        """The machine runs, or may run, on another host: nothing starts, stops or resets it here."""
        return self in (RunState.FINISH_MIGRATE, RunState.POSTMIGRATE, RunState.INMIGRATE)

    @property
    def needs_reset(self) -> bool:
        """The processor cannot go on from here: only a reset leads out."""
        return self in (RunState.SHUTDOWN, RunState.GUEST_PANICKED, RunState.INTERNAL_ERROR)


class ShutdownCause(enum.StrEnum):
    """Why a machine was reset or ended."""

    HOST_ERROR = "host-error"
    HOST_QUIT = "host-qmp-quit"
    HOST_RESET = "host-qmp-system-reset"
    HOST_SIGNAL = "host-signal"
    GUEST_SHUTDOWN = "guest-shutdown"
    GUEST_RESET = "guest-reset"
    GUEST_PANIC = "guest-panic"

    @property
    def by_guest(self) -> bool:
        """The guest did it itself."""
        return self.value.startswith("guest-")


class Schema(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of arguments and results: a JSON object in which no other member may stand."""


class Nothing(Schema, frozen=True):
    """An empty object: no arguments, or nothing to return."""


class Capabilities(Schema, frozen=True):
    """Arguments of qmp_capabilities: the offered capabilities that the client wants."""

    enable: list[str] = []


class StatusInfo(Schema, frozen=True):
    """Result of query-status."""

    running: bool
    status: RunState


class VersionTriple(Schema, frozen=True):
    """A release of QEMU."""

    major: int
    minor: int
    micro: int


class VersionInfo(Schema, frozen=True):
    """Result of query-version, and part of the greeting.

    `qemu` is the release whose machine and monitor this one follows; `package` says what it really is.
    """

    qemu: VersionTriple
    package: str


class CommandInfo(Schema, frozen=True):
    """One row of query-commands."""

    name: str


class NameInfo(Schema, frozen=True):
    """Result of query-name: the name of the virtual machine."""

    name: str


class BalloonTarget(Schema, frozen=True):
    """Arguments of balloon: how many bytes of memory the guest is to have."""

    value: int


class BalloonInfo(Schema, frozen=True):
    """Result of query-balloon: how many bytes of memory the guest has."""

    actual: int


_MAJOR, _MINOR, _MICRO = QEMU_RELEASE
VERSION = VersionInfo(qemu=VersionTriple(major=_MAJOR, minor=_MINOR, micro=_MICRO), package="pefbox")
