"""trio-asyncio, imported in the one way that is quiet on every supported Python."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    # On import it defines a child watcher, which Python 3.12 deprecates and nothing here uses.
    warnings.filterwarnings("ignore", "'AbstractChildWatcher'", DeprecationWarning)
    from trio_asyncio import aio_as_trio as aio_as_trio  # type: ignore[import-untyped]
    from trio_asyncio import open_loop as open_loop
    from trio_asyncio import trio_as_aio as trio_as_aio
