"""The cause of what a task does, for code that is too far from the message to be handed it.

Most code passes the cause id on as an argument. Devices work in tasks of their own, on what several messages asked
for; there the task that serves a message, and each worker, says here on whose behalf it works. A task inherits it.
"""

from __future__ import annotations

from contextvars import ContextVar

CAUSE: ContextVar[int] = ContextVar("cause", default=0)
