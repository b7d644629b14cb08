"""The qemu process, which can be made to hang, and to be in doubt about a migration."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from typing import Any

from services.qemu.__main__ import MAIN
from services.qemu.migration import source
from services.qemu.migration.channel import BulkChannel
from services.qemu.migration.destination import DestinationMigration
from services.qemu.migration.stream import FrameKind
from services.qemu.service import Qemu
from services.runtime.process import Query, run_service
from tests.cluster.hanging import hang

WORD_SECONDS = 0.2
_send, _start = BulkChannel.send, DestinationMigration._start


class HangingQemu(Qemu):
    """As the real one, and the queries `hang`, `lose-token` and `stop-at-token`."""

    def queries(self) -> dict[str, Query]:
        """By name."""
        return {**super().queries(), "hang": hang, "lose-token": _lose_token, "stop-at-token": _stop_at_token}


async def _lose_token(_arguments: dict[str, Any]) -> None:
    """The start token does not reach the destination's qemu, and this one soon waits no more for what comes of it."""
    vars(source)["WORD_SECONDS"] = WORD_SECONDS

    async def send(channel: BulkChannel, kind: FrameKind, *parts: bytes | memoryview) -> int:
        return 0 if kind is FrameKind.STATEMENT else await _send(channel, kind, *parts)

    setattr(BulkChannel, "send", send)  # noqa: B010


async def _stop_at_token(_arguments: dict[str, Any]) -> None:
    """When it would wait for the start token it stands still, until somebody has it go on."""

    async def start(arrival: DestinationMigration, *, secure: bool) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)
        await _start(arrival, secure=secure)

    setattr(DestinationMigration, "_start", start)  # noqa: B010


if __name__ == "__main__":
    run_service(replace(MAIN, make=HangingQemu))
