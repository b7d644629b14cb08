"""Where a processor sleeps: its links, and what other threads of its process post.

ZMQ_FD is edge-triggered, and any call on its socket may consume the edge. So each link end remembers whether there may
be something that its descriptor no longer tells (`LinkEnd.may_have_message`), and only when there is not does the
processor sleep on the descriptors themselves, which is cheaper than zmq_poll by half of its system calls.
"""

from __future__ import annotations

import os
import queue
import select
from collections.abc import Callable, Sequence

from services.guest.link_end import LinkEnd


class Inbox:
    """Messages of `ends` and posted actions. All but `post` is for the processor's thread."""

    def __init__(self, ends: Sequence[LinkEnd]) -> None:
        self._ends = ends
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._by_fd = {end.fd: end for end in ends}
        self._poll = select.poll()
        for fd in (*self._by_fd, self._wake):
            self._poll.register(fd, select.POLLIN)

    def post(self, action: Callable[[], None]) -> None:
        """Have `action` run by `run_posted`, soon; from any thread."""
        self._posted.put(action)
        os.eventfd_write(self._wake, 1)

    def wait(self, milliseconds: int) -> list[LinkEnd]:
        """Sleep until there may be something, at most so long; the ends that may have a message."""
        ready = [end for end in self._ends if end.may_have_message()]
        if ready:
            return ready
        return [self._by_fd[fd] for fd, _ in self._poll.poll(milliseconds) if fd in self._by_fd]

    def run_posted(self) -> None:
        """Run what was posted."""
        if self._posted.empty():
            return
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            # Put a moment ago, and not rung yet: it will be run now, and the ring finds nothing.
            pass
        while not self._posted.empty():
            self._posted.get()()
