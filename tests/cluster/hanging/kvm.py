"""The kvm process, which can be made to hang, and to stop when a VM turns or shares a page."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from typing import Any

from services.kvm.__main__ import MAIN
from services.kvm.service import Kvm
from services.runtime.process import Query, run_service
from tests.cluster.hanging import hang


class HangingKvm(Kvm):
    """As the real one, and the queries `hang` and `stop-at-page-in`."""

    def queries(self) -> dict[str, Query]:
        """By name."""
        return {**super().queries(), "hang": hang, "stop-at-page-in": self._stop_at_page_in}

    async def _stop_at_page_in(self, arguments: dict[str, Any]) -> None:
        """The next H_SVM_PAGE_IN of a VM is served only when somebody has this process go on."""
        own = vars(self._named(arguments).secure)

        async def page_in(*args: int) -> int:
            del own["page_in"]
            os.kill(os.getpid(), signal.SIGSTOP)
            code: int = await self._named(arguments).secure.page_in(*args)
            return code

        own["page_in"] = page_in


if __name__ == "__main__":
    run_service(replace(MAIN, make=HangingKvm))
