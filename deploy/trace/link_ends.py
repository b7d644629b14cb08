"""Which processes of a trace have which link.

The two ends of a message find each other by the link's id: a peer is called by its target, `vm1/guest`, and a process
that moved by its place, `vm1/guest.2`, which only its own file knows.
"""

from __future__ import annotations


class LinkEnds:
    """The ends of links that recorded."""

    def __init__(self) -> None:
        self._processes: dict[str, set[str]] = {}

    def add(self, link: str, process: str) -> None:
        """`process` has an end of `link`."""
        self._processes.setdefault(link, set()).add(process)

    def peer(self, link: str | None, process: str) -> str | None:
        """Who is at the other end; None when it did not record."""
        if link is None:
            return None
        others = self._processes.get(link, set()) - {process}
        # Only an altered trace has a link of three.
        return others.pop() if len(others) == 1 else None
