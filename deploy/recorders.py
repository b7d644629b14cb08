"""Who wants traces while a cluster runs: commands, each for as long as its connection to the launcher lasts.

So recording ends with the last command that wants it, however that ends, and a process that starts meanwhile records
from its start. `up --record` wants it always.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import trio

from deploy.child import Child, QueryRefused
from deploy.targets import is_of
from protocol.errors import PeerGone, UserError

if TYPE_CHECKING:
    from deploy.cluster_run import ClusterRun

_SECONDS = 2.0


class Recorders:
    """`always`: everything is recorded, whoever wants it or not."""

    def __init__(self, *, always: bool) -> None:
        self._always = always
        self._wanted: dict[object, list[str | None]] = {}
        self._n_orders = 0

    @property
    def any(self) -> bool:
        """Whether anything is being recorded."""
        return self._always or bool(self._wanted)

    @property
    def was_asked(self) -> bool:
        """Whether anybody ever wanted more, or less, than what is always recorded."""
        return self._n_orders > 0

    def wants(self, target: str) -> bool:
        """Whether a process is to record."""
        return self._always or any(
            name is None or is_of(target, name) for names in self._wanted.values() for name in names
        )

    def add(self, holder: object, process: str | None) -> None:
        """`holder` wants a process, those of a host or VM, or all, beside what it wants already."""
        self._wanted.setdefault(holder, []).append(process)

    def discard(self, holder: object) -> bool:
        """It wants nothing more; whether it did."""
        if holder not in self._wanted:
            return False
        del self._wanted[holder]
        return True

    def next_order(self, *, on: bool) -> dict[str, bool | int]:
        """The arguments of an order to record or not; they are numbered, for one may overtake another."""
        self._n_orders += 1
        return {"on": on, "number": self._n_orders}


class RecordingBegun(msgspec.Struct):
    """Processes that record from now on, those of them that did before, and those that did not answer."""

    targets: list[str]
    before: list[str]
    silent: list[str]


async def begin_recording(run: ClusterRun, holder: object, process: str | None) -> RecordingBegun:
    """Have `process` record, those of a host or VM, or all, until `end_recording`. Raises UserError for none, or when
    the file of one is full.
    """
    chosen = [child for child in _running(run) if process is None or is_of(child.target, process)]
    if not chosen:
        there = ", ".join(child.target for child in _running(run))
        raise UserError(f'--process: no "{process}" runs; there is: {there or "none"}')
    before = [child.target for child in chosen if run.recorders.wants(child.target)]
    run.recorders.add(holder, process)
    begun = RecordingBegun([], before, [])
    full: list[str] = []
    async with trio.open_nursery() as nursery:
        for child in chosen:
            nursery.start_soon(_begin_one, run, child, begun, full)
    if full:
        end_recording(run, holder)
        raise UserError(f"the trace of {', '.join(full)} is full: the next `pefbox up` begins another")
    begun.targets.sort()
    return begun


async def _begin_one(run: ClusterRun, child: Child, begun: RecordingBegun, full: list[str]) -> None:
    order = run.recorders.next_order(on=True)
    try:
        if not child.state.answers:
            # It is not asked then; so it hears of it when it goes on.
            child.tell("record", order)
        answer = await child.query("record", order, _SECONDS)
    except (PeerGone, QueryRefused):
        begun.silent.append(child.target)
        return
    (full if answer["full"] else begun.targets).append(child.target)


def end_recording(run: ClusterRun, holder: object) -> None:
    """`holder` wants no more; what nobody else wants ends."""
    if not run.recorders.discard(holder):
        return
    for child in _running(run):
        if not run.recorders.wants(child.target):
            try:
                child.tell("record", run.recorders.next_order(on=False))
            except PeerGone as gone:
                run.log.warning("recording not ended", process=child.target, reason=str(gone))


def tell_recording(run: ClusterRun, child: Child) -> None:
    """Its configuration said whether it records; who wants what may have changed between that and now."""
    if run.recorders.was_asked:
        child.tell("record", run.recorders.next_order(on=run.recorders.wants(child.target)))


def _running(run: ClusterRun) -> list[Child]:
    return [child for child in run.living() if child.has_keys]
