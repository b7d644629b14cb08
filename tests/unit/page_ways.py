"""How a page gets into each of its states."""

from __future__ import annotations

from services.ultravisor.page_state import TRANSITIONS, GfnState, PageEvent


def way_to(state: GfnState) -> list[PageEvent]:
    """The shortest run of events from SECURE."""
    ways: dict[GfnState, list[PageEvent]] = {GfnState.SECURE: []}
    queue = [GfnState.SECURE]
    for at in queue:
        for (old, event), new in TRANSITIONS.items():
            if old is at and new not in ways:
                ways[new] = [*ways[at], event]
                queue.append(new)
    return ways[state]
