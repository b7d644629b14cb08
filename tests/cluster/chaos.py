"""Migrations to which one thing happens at a chosen step: a process is killed or held up, the link between the hosts is
cut for a while, or the user cancels.

The protocol's states at the end last milliseconds, so each is waited for where it shows first: a line of qemu's log or
of an audit log, or an ultravisor's answer. Signals go straight to the process.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import trio

from deploy.api import RunningCluster, processes_of
from deploy.status import ProcessRow
from protocol.errors import UserError
from services.qemu.migration.source import WORD_SECONDS
from tests.cluster.moving import HOSTS, Traveller

_LOOK_SECONDS = 0.0005
_GIVE_UP_SECONDS = 20.0
_LONGEST_SECONDS = 2.5
_LONGEST_OF_QEMU_SECONDS = 1.0
"""The model kernel gives up a device that does not answer within two seconds."""
_OVER = frozenset({"done", "failed", "cancelled", "in-doubt"})


class Kind(Enum):
    """What happens."""

    NONE = "nothing"
    CANCEL = "cancel"
    KILL = "kill"
    HOLD = "hold"
    """SIGSTOP, and SIGCONT later: nothing is lost, everything is late."""
    CUT = "cut the link"
    """`pefbox link --down`, and `--up` later."""


@dataclass(frozen=True, slots=True)
class Fault:
    """`victim` is a role and `at_home` says of which side; a cancellation and a cut have none."""

    kind: Kind
    victim: str = ""
    at_home: bool = False
    seconds: float = 0.0
    """How long it is held, or the link is cut."""

    def __str__(self) -> str:
        if self.kind is Kind.CUT:
            return f"{self.kind.value} for {self.seconds:.1f} s"
        side = "source" if self.at_home else "destination"
        return f"{self.kind.value} {side} {self.victim}" if self.victim else self.kind.value


@dataclass(frozen=True, slots=True)
class Aim:
    """When to strike: as soon as `sign` shows, and up to `spread_seconds` later."""

    sign: str
    spread_seconds: float


AIMS = (
    Aim("begun", 0.4),
    Aim("qemu setup", 0.015),
    Aim("audit migration-offered", 0.0),
    Aim("qemu active", 0.5),
    Aim("qemu device", 0.05),
    Aim("qemu device", 0.15),
    Aim("phase finished", 0.0),
    Aim("phase checked", 0.0),
    Aim("arrival device", 0.0),
    Aim("arrival device", 0.01),
    Aim("audit migration-token-given", 0.0),
    Aim("audit migration-token-given", 0.003),
    Aim("audit migration-started", 0.0),
    Aim("audit migration-moved", 0.0),
    Aim("audit migration-moved", 0.1),
)
NORMAL_AIMS = (
    Aim("begun", 0.4),
    Aim("qemu setup", 0.015),
    Aim("qemu active", 0.5),
    Aim("qemu device", 0.15),
    Aim("arrival device", 0.01),
    Aim("qemu completed", 0.05),
)
_PHASES_FROM = {
    "finished": frozenset({"finished", "token-given", "moved"}),
    "checked": frozenset({"checked", "ready", "started"}),
}


def faults(dice: random.Random) -> Iterator[Fault]:
    """Ten at a time, in any order: nothing, a cancellation, and something to each of eight processes.

    The first ten kill: they are what a short run has. To later tens two cuts are added, and to every third of them one
    that lasts until the source waits no more for the destination's word.
    """
    roles = ("qemu", "guest", "kvm", "ultravisor")
    chance_to_hold = 0.0
    for n_hands in itertools.count():
        hand = [Fault(Kind.NONE), Fault(Kind.CANCEL)]
        for role in roles:
            for at_home in (True, False):
                kind = Kind.HOLD if dice.random() < chance_to_hold else Kind.KILL
                longest = _LONGEST_OF_QEMU_SECONDS if role == "qemu" else _LONGEST_SECONDS
                hand.append(Fault(kind, role, at_home, dice.uniform(0.1, longest)))
        if n_hands:
            hand += [Fault(Kind.CUT, seconds=dice.uniform(0.1, _LONGEST_SECONDS)) for _ in range(2)]
        if n_hands % 3 == 1:
            hand.append(Fault(Kind.CUT, seconds=WORD_SECONDS + 1))
        dice.shuffle(hand)
        yield from hand
        chance_to_hold = 0.4


def dealt(dice: random.Random, aims: tuple[Aim, ...]) -> Iterator[Aim]:
    """Each of them as often as any other."""
    while True:
        yield from dice.sample(aims, len(aims))


class Signs:
    """What shows how far a migration is, from the moment that this was made."""

    def __init__(self, traveller: Traveller, source: str, host: str) -> None:
        running = traveller.running
        self._running, self._source, self._host = running, source, host
        self._qemu = _Tail(running.paths.log_file("vm1/qemu"))
        self._audits = [_Tail(running.paths.audit_log(name)) for name in HOSTS]

    async def wait(self, aim: Aim) -> None:
        """Returns when it shows."""
        kind, _, word = aim.sign.partition(" ")
        if kind == "begun":
            return
        if kind == "phase":
            await self._until_phase(word)
            return
        shows = self._logged(kind, word)
        while True:
            if shows():
                return
            await trio.sleep(_LOOK_SECONDS)

    def _logged(self, kind: str, word: str) -> Callable[[], bool]:
        if kind == "audit":
            return lambda: any(tail.shows(f'"event":"{word}"') for tail in self._audits)
        event = "migration" if kind == "qemu" else "arrival"
        return lambda: self._qemu.shows(f'"status": "{word}", "event": "{event}"')

    async def _until_phase(self, word: str) -> None:
        # It comes after this, and to ask all the time would only delay it.
        await self.wait(Aim("qemu device", 0.0))
        target = f"{self._source if word == 'finished' else self._host}/ultravisor"
        while True:
            answer = await self._running.process(target).query("migration.status", {"vm": "vm1"})
            if answer["phase"] in _PHASES_FROM[word]:
                return


class _Tail:
    """What is appended to a file."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset, self._text = path, path.stat().st_size if path.exists() else 0, ""

    def shows(self, mark: str) -> bool:
        """Whether a line with `mark` has come."""
        if self._path.exists() and self._path.stat().st_size > self._offset + len(self._text):
            with self._path.open("rb") as file:
                file.seek(self._offset)
                self._text = file.read().decode(errors="replace")
        return mark in self._text


class Victim:
    """The process that something happens to. It is found before, so that the signal is not late."""

    def __init__(self, row: ProcessRow) -> None:
        self.target, self.pid = row.target, row.pid
        self._fd = os.pidfd_open(row.pid)

    def send(self, number: signal.Signals) -> None:
        """Send it a signal, unless it has ended."""
        try:
            signal.pidfd_send_signal(self._fd, number)
        except ProcessLookupError:
            return

    def close(self) -> None:
        """No more signals."""
        os.close(self._fd)


async def find_victim(traveller: Traveller, fault: Fault, source: str, host: str) -> Victim | None:
    """It, as soon as it is there; None when it is gone, or the migration is over before it came."""
    while True:
        status = await traveller.running.status()
        rows = {row.target: row for row in processes_of(status)}
        vm = next(vm for place in status.hosts for vm in place.vms if vm.name == "vm1")
        if fault.victim in ("kvm", "ultravisor"):
            found = rows.get(f"{source if fault.at_home else host}/{fault.victim}")
        elif fault.at_home:
            found = rows.get(f"vm1/{fault.victim}")
        else:
            found = next((row for row in vm.arriving if row.role == fault.victim), None)
        if found is not None:
            try:
                return Victim(found)
            except ProcessLookupError:
                return None
        if vm.migration is None:
            return None


async def strike(traveller: Traveller, fault: Fault, victim: Victim | None) -> int:
    """Do it; when that was, in nanoseconds of the monotonic clock, and 0 if it was too late for it."""
    struck_ns = time.monotonic_ns()
    if fault.kind is Kind.CANCEL:
        try:
            await traveller.vm.cancel_migration()
        except UserError:
            return 0
    elif fault.kind is Kind.CUT:
        await traveller.running.link(*HOSTS, down=True)
    elif victim is not None:
        victim.send(signal.SIGKILL if fault.kind is Kind.KILL else signal.SIGSTOP)
    return struck_ns


async def until_over(traveller: Traveller) -> str:
    """How the migration ended, as soon as it has; raises UserError after `_GIVE_UP_SECONDS` and what a doubt takes."""
    with trio.move_on_after(2 * _GIVE_UP_SECONDS):
        while True:
            facts = await traveller.vm.job_info()
            if facts["phase"] in _OVER:
                return str(facts["phase"])
            await trio.sleep(0.02)
    raise UserError(f"the migration does not end: {await traveller.vm.job_info()}")


async def dead_hosts(running: RunningCluster) -> list[str]:
    """Those whose kvm or ultravisor has ended."""
    hosts = (await running.status()).hosts
    return [host.name for host in hosts if any(row.state in ("failed", "gone") for row in host.processes)]
