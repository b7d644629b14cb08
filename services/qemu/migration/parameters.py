"""What an operator sets of a migration (`migrate-set-parameters`), with QEMU's names, bounds and defaults.

Source: QEMU `qapi/migration.json` (MigrationParameters), `migration/options.c`. Parameters of what is not built
(postcopy, compression, parallel channels, throttling of the guest) are not among them and so are refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from protocol.errors import UserError

MIB = 1 << 20
MAX_BANDWIDTH = 1 << 60
MAX_DOWNTIME_MS = 2_000_000


class MigrationParameters(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """`max_bandwidth` in bytes a second (0: no limit); `downtime_limit` and times of announcements in milliseconds."""

    max_bandwidth: Annotated[int, Meta(ge=0, le=MAX_BANDWIDTH)] = 128 * MIB
    downtime_limit: Annotated[int, Meta(ge=0, le=MAX_DOWNTIME_MS)] = 300
    announce_initial: Annotated[int, Meta(ge=0, le=100_000)] = 50
    announce_max: Annotated[int, Meta(ge=0, le=100_000)] = 550
    announce_rounds: Annotated[int, Meta(ge=0, le=1000)] = 5
    announce_step: Annotated[int, Meta(ge=1, le=10_000)] = 100

    def updated(self, changes: dict[str, Any]) -> MigrationParameters:
        """With `changes` by QEMU's names; raises UserError that names the parameter and what it may be."""
        known = msgspec.to_builtins(self)
        for name in changes:
            if name not in known:
                raise UserError(f"migration parameter {name}: not built; there is: {', '.join(known)}")
        try:
            return msgspec.convert({**known, **changes}, MigrationParameters)
        except msgspec.ValidationError as error:
            raise UserError(f"migration parameter {_place(error)}") from None

    def announcements_ms(self) -> list[int]:
        """When the guest's network address is announced: at once, then each time so long after the one before."""
        later = (self.announce_initial + n * self.announce_step for n in range(self.announce_rounds - 1))
        return [0, *(min(delay, self.announce_max) for delay in later)][: self.announce_rounds]


def _place(error: msgspec.ValidationError) -> str:
    """msgspec says "Expected `int` <= 5 - at `$.name`"; the name comes first here."""
    text, _, path = str(error).partition(" - at `$.")
    return f"{path.rstrip('`')}: {text[:1].lower()}{text[1:]}"
