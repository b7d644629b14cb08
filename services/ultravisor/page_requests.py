"""H_SVM_PAGE_IN as the ultravisor asks it: again while kvm is busy with the page, several pages at once."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterable

import trio

from protocol.codes import HCode
from protocol.geometry import PAGE_SHIFT, gpa_of
from protocol.hcalls import H_SVM_PAGE_IN
from services.runtime.first_error import first_error_nursery
from services.ultravisor.hypervisor import Hypervisor

MAX_OPEN_PAGE_INS = 32
_BUSY_LIMIT_SECONDS = 0.5
_PAUSE_SECONDS = 0.002
"""About. kvm meets our transient page and tries again too: the same pause on both sides could keep them in step."""


def always() -> bool:
    """For a page that a transient state holds until the answer is there."""
    return True


async def ask_page_in(
    hypervisor: Hypervisor, lpid: int, gfn: int, flags: int, cause: int, still_wanted: Callable[[], bool] = always
) -> int:
    """H_SVM_PAGE_IN, again while kvm is busy with the page and `still_wanted`; its code. Raises CallTimeout.

    Where no transient state holds the page, somebody else's call may change it meanwhile: asked again for a secure
    page that is shared by then, kvm would drop the shared frame.
    """
    args = [gpa_of(gfn), flags, PAGE_SHIFT]
    deadline = trio.current_time() + _BUSY_LIMIT_SECONDS
    while still_wanted():
        result = await hypervisor.ask(lpid, H_SVM_PAGE_IN, args, cause)
        if result[0] != HCode.H_BUSY or trio.current_time() > deadline:
            return result[0]
        await trio.sleep(_PAUSE_SECONDS * random.uniform(0.5, 1.5))
    return HCode.H_BUSY


async def for_each_page(gfns: Iterable[int], work: Callable[[int], Awaitable[None]]) -> None:
    """Run `work` for every GFN, at most MAX_OPEN_PAGE_INS of them open.

    The first PefboxError ends them all and is raised.
    """
    queue = list(gfns)
    if len(queue) == 1:
        await work(queue[0])
        return
    rest = iter(queue)

    async def worker() -> None:
        for gfn in rest:
            await work(gfn)

    async with first_error_nursery() as nursery:
        for _ in range(min(MAX_OPEN_PAGE_INS, len(queue))):
            nursery.start_soon(worker)
