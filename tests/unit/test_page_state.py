"""States of a secure VM's frames (S2) and their images (S3), under any order of events."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from protocol.geometry import PAGE_BYTES
from services.ultravisor.page_crypto import PageSealer
from services.ultravisor.page_state import (
    HOST_READABLE,
    TRANSIENT,
    TRANSITIONS,
    BadTransition,
    GfnState,
    PageEvent,
    PageStates,
)

N_PAGES = 4
GFNS = st.integers(0, N_PAGES - 1)
OF_HYPERVISOR = frozenset(
    {PageEvent.HV_PAGE_IN, PageEvent.HV_INVAL, PageEvent.OUT_BEGIN, PageEvent.OUT_DONE, PageEvent.OUT_FAILED}
    | {PageEvent.IN_BEGIN, PageEvent.IN_DONE, PageEvent.IN_FAILED}
)
OF_ESM = frozenset({PageEvent.MAKE_IMPLICIT, PageEvent.MAKE_PSEUDO})


def reachable(start: GfnState, events: frozenset[PageEvent]) -> set[GfnState]:
    found, todo = {start}, [start]
    while todo:
        state = todo.pop()
        for event in events:
            new = TRANSITIONS.get((state, event))
            if new is not None and new not in found:
                found.add(new)
                todo.append(new)
    return found


@pytest.mark.parametrize("state", [GfnState.SECURE, GfnState.PAGED_OUT, GfnState.HV_UNSHARED, GfnState.PSEUDO_SHARED])
def test_nothing_that_the_hypervisor_does_makes_a_page_readable(state: GfnState) -> None:
    assert not reachable(state, OF_HYPERVISOR) & HOST_READABLE


def test_without_a_share_of_the_guest_a_page_that_was_secure_is_never_readable() -> None:
    without = frozenset(PageEvent) - OF_ESM - {PageEvent.SHARE}

    assert not reachable(GfnState.SECURE, without) & HOST_READABLE


@pytest.mark.parametrize("state", sorted(TRANSIENT))
def test_every_transient_state_can_be_left_by_the_operation_that_holds_it(state: GfnState) -> None:
    assert reachable(state, frozenset(PageEvent)) - TRANSIENT


def test_every_state_is_reached_from_secure() -> None:
    assert reachable(GfnState.SECURE, frozenset(PageEvent)) == set(GfnState)


def test_an_event_that_the_state_does_not_know_changes_nothing() -> None:
    states = PageStates(N_PAGES)
    before = states.save(), list(states.counts)

    for event in PageEvent:
        if (GfnState.SECURE, event) in TRANSITIONS:
            continue
        with pytest.raises(BadTransition) as refused:
            states.apply(2, event)
        assert (refused.value.gfn, refused.value.state, refused.value.event) == (2, GfnState.SECURE, event)

    assert (states.save(), list(states.counts)) == before


class ReadablePages(RuleBasedStateMachine):
    """S2: whatever happens in whatever order, a readable page is one that the guest has asked to share."""

    def __init__(self) -> None:
        super().__init__()
        self.states = PageStates(N_PAGES)
        self.asked: set[int] = set()

    @rule(gfn=GFNS, event=st.sampled_from(sorted(set(PageEvent) - OF_ESM)))
    def happen(self, gfn: int, event: PageEvent) -> None:
        before = self.states[gfn]
        expected = TRANSITIONS.get((before, event))
        if expected is None:
            with pytest.raises(BadTransition):
                self.states.apply(gfn, event)
            return
        assert self.states.apply(gfn, event) is expected
        if event is PageEvent.SHARE:
            self.asked.add(gfn)
        elif expected is GfnState.SECURE:
            self.asked.discard(gfn)

    @invariant()
    def readable_pages_were_shared_by_the_guest(self) -> None:
        assert set(self.states.in_state(*HOST_READABLE)) <= self.asked

    @invariant()
    def counts_are_those_of_the_states(self) -> None:
        assert self.states.counts == [len(self.states.in_state(state)) for state in GfnState]
        assert sum(self.states.counts) == len(self.states) == N_PAGES


class Images(RuleBasedStateMachine):
    """S3: only the newest image of a page, unaltered and of this page, is taken; a refused one changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.sealers = [PageSealer(lpid=5, incarnation=1), PageSealer(lpid=5, incarnation=2), PageSealer(6, 1)]
        self.content: dict[tuple[int, int], bytes] = {}
        self.newest: dict[tuple[int, int], bytes] = {}
        self.images: list[bytes] = []

    @rule(vm=st.integers(0, 2), gfn=GFNS)
    def seal(self, vm: int, gfn: int) -> None:
        page = bytearray(os.urandom(32).ljust(PAGE_BYTES, b"\1"))
        image = bytes(self.sealers[vm].seal(gfn, memoryview(page)))
        assert image not in self.images
        assert page[:32] not in image
        self.images.append(image)
        self.newest[vm, gfn] = image
        self.content[vm, gfn] = bytes(page)

    @precondition(lambda self: self.images)
    @rule(vm=st.integers(0, 2), gfn=GFNS, data=st.data())
    def open(self, vm: int, gfn: int, data: st.DataObject) -> None:
        image = bytearray(data.draw(st.sampled_from(self.images)))
        flipped = data.draw(st.none() | st.integers(0, PAGE_BYTES * 8 - 1))
        if flipped is not None:
            image[flipped // 8] ^= 1 << flipped % 8
        good = self.newest.get((vm, gfn)) == bytes(image)
        page = bytearray(b"\7" * PAGE_BYTES)

        taken = self.sealers[vm].open(gfn, image + bytearray(16), memoryview(page))

        assert taken is good
        if good:
            assert bytes(page) == self.content[vm, gfn]
        else:
            # Untouched, or zeroed after the cipher had written what it then refused.
            assert bytes(page) in (b"\7" * PAGE_BYTES, bytes(PAGE_BYTES))
        if good:
            del self.newest[vm, gfn]

    @rule(vm=st.integers(0, 2), gfn=GFNS)
    def forget(self, vm: int, gfn: int) -> None:
        self.sealers[vm].forget(gfn)
        self.newest.pop((vm, gfn), None)


TestReadablePages = ReadablePages.TestCase
TestReadablePages.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
TestImages = Images.TestCase
TestImages.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_equal_pages_have_different_images() -> None:
    sealer = PageSealer(5, 1)
    page = memoryview(bytearray(PAGE_BYTES))

    images = {bytes(sealer.seal(gfn, page)) for gfn in (1, 2, 1)}

    assert len(images) == 3
