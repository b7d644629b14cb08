"""The ultravisor process, which can be made to hang."""

from __future__ import annotations

from dataclasses import replace

from services.runtime.process import Query, run_service
from services.ultravisor.__main__ import MAIN
from services.ultravisor.service import Ultravisor
from tests.cluster.hanging import hang


class HangingUltravisor(Ultravisor):
    """As the real one, and the query `hang`."""

    def queries(self) -> dict[str, Query]:
        """By name."""
        return {**super().queries(), "hang": hang}


if __name__ == "__main__":
    run_service(replace(MAIN, make=HangingUltravisor))
