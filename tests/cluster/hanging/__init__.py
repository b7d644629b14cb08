"""The services as they are, with one more question of the operator: `hang` stops the service loop for a while."""

from __future__ import annotations

import time
from typing import Any


async def hang(arguments: dict[str, Any]) -> dict[str, Any]:
    """Keep the loop busy, as an endless loop or a lock that never comes would; it answers nothing meanwhile."""
    end = time.monotonic() + float(arguments["seconds"])
    while time.monotonic() < end:
        pass
    return {}
