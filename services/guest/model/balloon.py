"""What the kernel does with its balloon: follow the target, in pages of the allocator, as far as it can spare them.

A page in the balloon has a use of its own in the page table, so nothing else is kept of it. In a secure VM the quirk
of the driver (`Rules.gives_pages`) gives none: a private page that the host has "back" is no memory to it, and would be
content lost to the guest.
"""

from __future__ import annotations

from services.guest.model.console import Console
from services.guest.model.cpu import Step
from services.guest.model.pages import PageAllocator, PageUse
from services.guest.model.state import Balloon
from services.guest.model.virtio_balloon import MAX_PAGES, BalloonDriver

KEPT_PAGES = 64
"""Free pages that the kernel keeps for itself, whatever the target."""


class Ballooning:
    """The balloon's content, over the driver's state."""

    def __init__(self, pages: PageAllocator, console: Console, driver: BalloonDriver) -> None:
        self._pages = pages
        self._console = console
        self._driver = driver

    @property
    def _state(self) -> Balloon:
        return self._driver.state

    def work(self) -> Step[None] | None:
        """The next step towards the target, or None when there is nothing to do or the device has to answer first."""
        step = self._next()
        return None if step is None else self._driver.guarded(step)

    def _next(self) -> Step[None] | None:
        state = self._state
        if state.unsaid:
            return self._say_why()
        if state.emptied:
            return self._start_empty()
        if state.answered:
            return self._settle()
        if not state.ready or state.asked:
            return None
        if state.n_pages > state.target:
            return self._deflate(min(state.n_pages - state.target, MAX_PAGES))
        if state.n_pages < state.target:
            return self._inflate_or_refuse(state.target - state.n_pages)
        state.refused = 0
        return None

    def _inflate_or_refuse(self, n_wanted: int) -> Step[None] | None:
        if not self._driver.gives_pages:
            return self._refuse("the VM is secure, the host has no use for its pages")
        n_pages = min(n_wanted, MAX_PAGES, self._pages.n_free - KEPT_PAGES)
        if n_pages <= 0:
            return self._refuse("no more can be spared")
        return self._inflate(n_pages)

    def _inflate(self, n_pages: int) -> Step[None]:
        yield from self._driver.give([self._pages.must_alloc(1, PageUse.BALLOON) for _ in range(n_pages)])

    def _deflate(self, n_pages: int) -> Step[None]:
        yield from self._driver.take_back(self._pages.find(PageUse.BALLOON, n_pages))

    def _refuse(self, reason: str) -> Step[None] | None:
        """Say so, once a target."""
        state = self._state
        if state.refused == state.target:
            return None
        state.refused = state.target
        return self._say(f"{state.target} pages wanted, {state.n_pages} given: {reason}")

    def _settle(self) -> Step[None]:
        """The device has taken note: only now a page that came out is the kernel's own."""
        state = self._state
        gpas, state.asked, state.answered = state.asked, [], False
        state.n_pages += len(gpas) if state.inflating else -len(gpas)
        if not state.inflating:
            for gpa in gpas:
                self._pages.free(gpa, 1)
        yield from self._driver.tell_actual(state.n_pages)

    def _start_empty(self) -> Step[None]:
        """The device was reset and knows of no page any more: they are all the kernel's."""
        state = self._state
        self._pages.change(0, self._pages.n_pages, PageUse.BALLOON, PageUse.FREE)
        state.emptied, state.answered, state.asked, state.n_pages, state.refused = False, False, [], 0, 0
        return
        yield

    def _say_why(self) -> Step[None]:
        unsaid, self._state.unsaid = self._state.unsaid, ""
        return self._say(unsaid)

    def _say(self, text: str) -> Step[None]:
        self._console.say(f"pefbox: balloon: {text}")
        return
        yield
