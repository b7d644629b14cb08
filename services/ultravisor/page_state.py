"""The states of a secure VM's guest frames, and the one function that changes them.

States of a GFN (open-power/ultravisor `svm/svm-pagemap.c`; the numbers are its numbers):

    SECURE          in secure memory; neither hypervisor nor device can read it
    PAGED_OUT       the hypervisor holds an encrypted image; initialisation vector and tag are here
    SHARED          the guest shared it: guest and hypervisor see the same normal frame
    SHARED_IMPLICIT a bounce page of the ultravisor; the guest itself may not touch it
    PSEUDO_SHARED   the guest sees its secure page, the hypervisor a zeroed normal page (the RTAS area)
    ..._INV         as without _INV, but the hypervisor took the normal frame away (UV_PAGE_INVAL)
    HV_SHARING      the hypervisor was asked for a normal frame; HV_SHARED: it gave one
    HV_UNSHARING    the hypervisor was told to drop the normal frame; HV_UNSHARED: it did
    PAGING_OUT, PAGING_IN   an image is being made or checked (ours: the original holds a lock instead)

The transient states are the lock of a page: whoever meets one gets U_RETRY (a guest: H_BUSY) and holds nothing while
it waits. A page leaves a transient state only by the operation that put it there, or by the end of the VM.
"""

from __future__ import annotations

from enum import IntEnum

from protocol.errors import PefboxError


class GfnState(IntEnum):
    """State of one guest frame."""

    SECURE = 0
    PAGED_OUT = 1
    SHARED = 2
    SHARED_INV = 3
    SHARED_IMPLICIT = 4
    SHARED_IMPLICIT_INV = 5
    HV_SHARING = 6
    HV_SHARED = 7
    HV_SHARED_INV = 8
    HV_UNSHARING = 9
    HV_UNSHARING_INV = 10
    HV_UNSHARED = 11
    PSEUDO_SHARED = 12
    PSEUDO_SHARED_INV = 13
    PAGING_OUT = 14
    PAGING_IN = 15


class PageEvent(IntEnum):
    """What can happen to a frame."""

    SHARE = 0
    SHARE_DONE = 1
    SHARE_REVERT = 2
    UNSHARE = 3
    UNSHARE_DONE = 4
    HV_PAGE_IN = 5
    HV_INVAL = 6
    OUT_BEGIN = 7
    OUT_DONE = 8
    OUT_FAILED = 9
    IN_BEGIN = 10
    IN_DONE = 11
    IN_FAILED = 12
    MAKE_IMPLICIT = 13
    MAKE_PSEUDO = 14
    UNSHARE_REVERT = 15


_S, _E = GfnState, PageEvent

TRANSITIONS: dict[tuple[GfnState, PageEvent], GfnState] = {
    # The guest shares a page.
    (_S.SECURE, _E.SHARE): _S.HV_SHARING,
    (_S.HV_SHARING, _E.HV_PAGE_IN): _S.HV_SHARED,
    (_S.HV_SHARED, _E.HV_PAGE_IN): _S.HV_SHARED,
    (_S.HV_SHARED, _E.HV_INVAL): _S.HV_SHARED_INV,
    (_S.HV_SHARED_INV, _E.HV_INVAL): _S.HV_SHARED_INV,
    (_S.HV_SHARED_INV, _E.HV_PAGE_IN): _S.HV_SHARED,
    (_S.HV_SHARED, _E.SHARE_DONE): _S.SHARED,
    (_S.HV_SHARED_INV, _E.SHARE_DONE): _S.SHARED_INV,
    # The hypervisor refused part of a range: what it never took is secure again, what it took is unshared.
    (_S.HV_SHARING, _E.SHARE_REVERT): _S.SECURE,
    (_S.HV_SHARED, _E.SHARE_REVERT): _S.HV_UNSHARING,
    (_S.HV_SHARED_INV, _E.SHARE_REVERT): _S.HV_UNSHARING_INV,
    # The guest takes a page back.
    (_S.SHARED, _E.UNSHARE): _S.HV_UNSHARING,
    (_S.SHARED_INV, _E.UNSHARE): _S.HV_UNSHARING_INV,
    (_S.HV_UNSHARING, _E.HV_INVAL): _S.HV_UNSHARING_INV,
    (_S.HV_UNSHARING_INV, _E.HV_INVAL): _S.HV_UNSHARING_INV,
    (_S.HV_UNSHARING, _E.HV_PAGE_IN): _S.HV_UNSHARED,
    (_S.HV_UNSHARING_INV, _E.HV_PAGE_IN): _S.HV_UNSHARED,
    (_S.HV_UNSHARED, _E.UNSHARE_DONE): _S.SECURE,
    # The guest did not acknowledge: nobody asked the hypervisor for anything yet, so the page stays shared.
    (_S.HV_UNSHARING, _E.UNSHARE_REVERT): _S.SHARED,
    (_S.HV_UNSHARING_INV, _E.UNSHARE_REVERT): _S.SHARED_INV,
    (_S.HV_UNSHARED, _E.UNSHARE_REVERT): _S.SHARED_INV,
    # The hypervisor moves the normal frame of a page that it shares.
    (_S.SHARED, _E.HV_INVAL): _S.SHARED_INV,
    (_S.SHARED_INV, _E.HV_INVAL): _S.SHARED_INV,
    (_S.SHARED, _E.HV_PAGE_IN): _S.SHARED,
    (_S.SHARED_INV, _E.HV_PAGE_IN): _S.SHARED,
    (_S.SHARED_IMPLICIT, _E.HV_INVAL): _S.SHARED_IMPLICIT_INV,
    (_S.SHARED_IMPLICIT_INV, _E.HV_INVAL): _S.SHARED_IMPLICIT_INV,
    (_S.SHARED_IMPLICIT, _E.HV_PAGE_IN): _S.SHARED_IMPLICIT,
    (_S.SHARED_IMPLICIT_INV, _E.HV_PAGE_IN): _S.SHARED_IMPLICIT,
    (_S.PSEUDO_SHARED, _E.HV_INVAL): _S.PSEUDO_SHARED_INV,
    (_S.PSEUDO_SHARED_INV, _E.HV_INVAL): _S.PSEUDO_SHARED_INV,
    (_S.PSEUDO_SHARED, _E.HV_PAGE_IN): _S.PSEUDO_SHARED,
    (_S.PSEUDO_SHARED_INV, _E.HV_PAGE_IN): _S.PSEUDO_SHARED,
    # Page out and in.
    (_S.SECURE, _E.OUT_BEGIN): _S.PAGING_OUT,
    (_S.PAGING_OUT, _E.OUT_DONE): _S.PAGED_OUT,
    (_S.PAGING_OUT, _E.OUT_FAILED): _S.SECURE,
    (_S.PAGED_OUT, _E.IN_BEGIN): _S.PAGING_IN,
    (_S.PAGING_IN, _E.IN_DONE): _S.SECURE,
    (_S.PAGING_IN, _E.IN_FAILED): _S.PAGED_OUT,
    # The ultravisor's own pages, declared during ESM.
    (_S.SECURE, _E.MAKE_IMPLICIT): _S.SHARED_IMPLICIT,
    (_S.SECURE, _E.MAKE_PSEUDO): _S.PSEUDO_SHARED,
}

TRANSIENT = frozenset(
    {
        _S.HV_SHARING,
        _S.HV_SHARED,
        _S.HV_SHARED_INV,
        _S.HV_UNSHARING,
        _S.HV_UNSHARING_INV,
        _S.HV_UNSHARED,
        _S.PAGING_OUT,
        _S.PAGING_IN,
    }
)
HOST_READABLE = frozenset({_S.SHARED, _S.SHARED_INV, _S.SHARED_IMPLICIT, _S.SHARED_IMPLICIT_INV})
"""States in which the hypervisor sees what the guest (or the ultravisor for it) writes."""


class BadTransition(PefboxError):
    """An event that the frame's state does not allow. `state` says what the frame is."""

    def __init__(self, gfn: int, state: GfnState, event: PageEvent) -> None:
        self.gfn, self.state, self.event = gfn, state, event
        super().__init__(f"gfn {gfn:#x} is {state.name}, which knows no {event.name}")


class PageStates:
    """The state of every frame of one secure VM: a byte a GFN. `counts` keeps how many frames each state has."""

    def __init__(self, n_pages: int) -> None:
        self._states = bytearray(n_pages)
        self.counts = [0] * len(GfnState)
        self.counts[GfnState.SECURE] = n_pages

    def __len__(self) -> int:
        return len(self._states)

    def __getitem__(self, gfn: int) -> GfnState:
        return _BY_VALUE[self._states[gfn]]

    def apply(self, gfn: int, event: PageEvent) -> GfnState:
        """Let `event` happen to `gfn`; returns its new state, raises BadTransition and changes nothing otherwise."""
        state = _BY_VALUE[self._states[gfn]]
        new = _NEXT[state << _EVENT_BITS | event]
        if new is None:
            raise BadTransition(gfn, state, event)
        self._states[gfn] = new
        self.counts[state] -= 1
        self.counts[new] += 1
        return new

    def in_state(self, *states: GfnState) -> list[int]:
        """Every GFN in one of `states`."""
        wanted = {int(state) for state in states}
        return [gfn for gfn, state in enumerate(self._states) if state in wanted]

    def save(self) -> bytes:
        """The states, a byte a GFN."""
        return bytes(self._states)

    def load(self, states: bytes) -> None:
        """What `save` gave; as many frames as these."""
        if len(states) != len(self._states):
            raise ValueError(f"{len(states)} states of {len(self._states)} frames")
        self._states[:] = states
        self.counts[:] = [states.count(state) for state in GfnState]


_BY_VALUE = list(GfnState)
_EVENT_BITS = 4
_NEXT: list[GfnState | None] = [None] * (len(GfnState) << _EVENT_BITS)
"""TRANSITIONS by number: a look-up that hashes no enum."""
for (_state, _event), _new in TRANSITIONS.items():
    _NEXT[_state << _EVENT_BITS | _event] = _new
