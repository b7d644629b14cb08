"""The guest process, which can be made to hang."""

from __future__ import annotations

from protocol.roles import Role
from services.guest.engines import import_engines
from services.guest.service import Guest
from services.runtime.process import Query, ServiceMain, run_service
from tests.cluster.hanging import hang


class HangingGuest(Guest):
    """As the real one, and the query `hang`."""

    def queries(self) -> dict[str, Query]:
        """By name."""
        return {**super().queries(), "hang": hang}


if __name__ == "__main__":
    run_service(ServiceMain(Role.GUEST, HangingGuest, landlock_dirs=lambda config: None, prepare=import_engines))
