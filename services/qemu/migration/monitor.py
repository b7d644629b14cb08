"""Migration as users of the monitor see it: QEMU's commands, names and units.

Source: QEMU `qapi/migration.json` (migrate, migrate_cancel, query-migrate, migrate-set-parameters,
query-migrate-parameters, migrate-set-capabilities, query-migrate-capabilities, event MIGRATION).
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec
from msgspec import UNSET, UnsetType

from protocol.errors import UserError
from services.qemu.migration.control import MigrationControl
from services.qemu.migration.parameters import MigrationParameters
from services.qemu.migration.status import MigrationStatus
from services.qemu.qmp import Command, CommandFailed
from services.qemu.qmp.commands import Context
from services.qemu.qmp.events import Event
from services.qemu.qmp.schema import Nothing, Schema

URI_SCHEME = "pefbox:"
EVENTS = "events"
"""The one capability there is: MIGRATION events are told."""
_BITS_A_BYTE = 8
_MEGA = 1_000_000


class MigrationEvent(Event, frozen=True):
    """The migration has another status."""

    name: ClassVar[str] = "MIGRATION"
    status: MigrationStatus


class Migrate(Schema, frozen=True):
    """`uri` is `pefbox:HOST`, a host of the cluster."""

    uri: str


class ParameterChanges(Schema, frozen=True, rename="kebab", omit_defaults=True):
    """What is to be another than it is."""

    max_bandwidth: int | UnsetType = UNSET
    downtime_limit: int | UnsetType = UNSET
    announce_initial: int | UnsetType = UNSET
    announce_max: int | UnsetType = UNSET
    announce_rounds: int | UnsetType = UNSET
    announce_step: int | UnsetType = UNSET


class CapabilityStatus(Schema, frozen=True):
    """A capability and whether it is on."""

    capability: str
    state: bool


class Capabilities(Schema, frozen=True):
    """Arguments of migrate-set-capabilities."""

    capabilities: list[CapabilityStatus]


class RamInfo(Schema, frozen=True, rename="kebab"):
    """How far the pages are; `duplicate` are pages of zeros, `mbps` megabits a second of the last round."""

    transferred: int
    remaining: int
    total: int
    duplicate: int
    normal: int
    normal_bytes: int
    page_size: int
    dirty_pages_rate: int
    dirty_sync_count: int
    mbps: float


class MigrationInfo(Schema, frozen=True, rename="kebab", omit_defaults=True):
    """Result of query-migrate; times in milliseconds."""

    status: MigrationStatus | None = None
    total_time: int | None = None
    expected_downtime: int | None = None
    downtime: int | None = None
    setup_time: int | None = None
    ram: RamInfo | None = None
    error_desc: str | None = None


class MigrationMonitor:
    """The commands over `control`."""

    def __init__(self, control: MigrationControl, page_bytes: int) -> None:
        self._control, self._page_bytes = control, page_bytes
        self.tells_events = False

    def commands(self) -> tuple[Command[Any, Any], ...]:
        """All of them."""
        return (
            Command("migrate", Migrate, Nothing, self.migrate),
            Command("migrate_cancel", Nothing, Nothing, self.migrate_cancel),
            Command("query-migrate", Nothing, MigrationInfo, self.query_migrate),
            Command("migrate-set-parameters", ParameterChanges, Nothing, self.set_parameters),
            Command("query-migrate-parameters", Nothing, MigrationParameters, self.query_parameters),
            Command("migrate-set-capabilities", Capabilities, Nothing, self.set_capabilities),
            Command("query-migrate-capabilities", Nothing, list[CapabilityStatus], self.query_capabilities),
        )

    async def migrate(self, _context: Context, arguments: Migrate) -> Nothing:
        """Begin; it goes on behind the answer, and query-migrate says what became of it."""
        host = arguments.uri.removeprefix(URI_SCHEME)
        if not arguments.uri.startswith(URI_SCHEME) or not host:
            raise CommandFailed(f"uri: {arguments.uri[:80]!r} is none; it is {URI_SCHEME}HOST, a host of the cluster")
        await self._control.ask_move(host)
        return Nothing()

    async def migrate_cancel(self, _context: Context, _arguments: Nothing) -> Nothing:
        """The machine stays; nothing happens when none is under way."""
        self._control.cancel()
        return Nothing()

    async def query_migrate(self, _context: Context, _arguments: Nothing) -> MigrationInfo:
        """How far it is, or what became of the last one; empty before the first."""
        control = self._control
        if control.status is MigrationStatus.NONE:
            return MigrationInfo()
        facts = control.facts()
        done = control.status is MigrationStatus.COMPLETED
        return MigrationInfo(
            status=control.status,
            total_time=facts.get("total_time_ms"),
            expected_downtime=None if done else facts.get("expected_downtime_ms"),
            downtime=facts.get("downtime_ms") if done else None,
            setup_time=facts.get("setup_time_ms"),
            ram=self._ram(facts) if facts else None,
            error_desc=control.reason or None,
        )

    def _ram(self, facts: dict[str, Any]) -> RamInfo:
        return RamInfo(
            transferred=facts["transferred_bytes"],
            remaining=facts["remaining_bytes"],
            total=facts["total_bytes"],
            duplicate=facts["zero_pages"],
            normal=facts["data_pages"],
            normal_bytes=facts["data_pages"] * self._page_bytes,
            page_size=self._page_bytes,
            dirty_pages_rate=facts["dirty_pages_per_second"],
            dirty_sync_count=facts["round"],
            mbps=facts["bytes_per_second"] * _BITS_A_BYTE / _MEGA,
        )

    async def set_parameters(self, _context: Context, arguments: ParameterChanges) -> Nothing:
        """Other limits, at once."""
        try:
            self._control.set_parameters(msgspec.to_builtins(arguments))
        except UserError as error:
            raise CommandFailed(str(error)) from None
        return Nothing()

    async def query_parameters(self, _context: Context, _arguments: Nothing) -> MigrationParameters:
        """The limits."""
        return self._control.parameters

    async def set_capabilities(self, _context: Context, arguments: Capabilities) -> Nothing:
        """Switch `events`; every other capability of QEMU's is refused, as it is not built."""
        for wanted in arguments.capabilities:
            if wanted.capability != EVENTS and wanted.state:
                raise CommandFailed(f"Capability '{wanted.capability[:80]}' is not built; there is: {EVENTS}")
        for wanted in arguments.capabilities:
            if wanted.capability == EVENTS:
                self.tells_events = wanted.state
        return Nothing()

    async def query_capabilities(self, _context: Context, _arguments: Nothing) -> list[CapabilityStatus]:
        """Those there are."""
        return [CapabilityStatus(capability=EVENTS, state=self.tells_events)]
