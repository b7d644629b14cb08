"""A VM is sent to and fro while processes are killed and held up and the link is cut, at every step: no write of it is
lost, it runs in one place, and nothing stays behind.

Ten migrations by default; PEFBOX_CHAOS_MIGRATIONS for more, PEFBOX_CHAOS_SEED for others. Of 200 and more each state of
the protocol must have been struck (`make chaos`).
"""

from __future__ import annotations

import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from deploy.api import processes_of
from deploy.memory_segments import SHM_DIR
from protocol.errors import UserError
from services.ultravisor.audit import read_lines, verify
from tests.cluster.chaos import (
    AIMS,
    NORMAL_AIMS,
    Aim,
    Fault,
    Kind,
    Signs,
    Victim,
    dead_hosts,
    dealt,
    faults,
    find_victim,
    strike,
    until_over,
)
from tests.cluster.chaos_guest import Workload
from tests.cluster.chaos_states import EVERY, History, Strike, counted, table
from tests.cluster.moving import HOSTS, Traveller, travelling
from tests.cluster.two_hosts import children_of, is_alive, members_of, until
from tests.conftest import SHOWN

# A destination that starts warm is in the state "launcher: starting" for too short a time to be struck there.
pytestmark = pytest.mark.cold
N_MIGRATIONS = int(os.environ.get("PEFBOX_CHAOS_MIGRATIONS", "10"))
SEED = int(os.environ.get("PEFBOX_CHAOS_SEED", "1"))
FULL = 200
"""From so many on each state is to have been struck."""
LEAST_STRIKES = 5
BANDWIDTH = 24 << 20
"""So little that the rounds take about half a second."""
RECORD_WRITTEN_SECONDS = 1.0
"""Later than that after a step it is in the record."""
DOWNTIME_MS = 2000
"""So much that a guest that writes all the time is stopped for it after a round or two."""
_CLEAN_SECONDS = 8.0
_SEGMENT_OF_VM = 1


class Chaos:
    """A VM, what it does, and what was done to it."""

    def __init__(self, traveller: Traveller, *, secure: bool, dice: random.Random) -> None:
        self._traveller, self._vm, self._running = traveller, traveller.vm, traveller.running
        self._secure, self._dice = secure, dice
        self.work = Workload(traveller)
        self.history = History(traveller.running, time.time_ns() - time.monotonic_ns())
        self.strikes: list[Strike] = []

    async def turn(self, number: int, fault: Fault, aim: Aim) -> None:
        """One migration, and everything that follows from what happens to it."""
        source = await self._vm.host()
        host = next(name for name in HOSTS if name != source)
        await self.work.generation()
        struck = Strike(number, f"{fault} at {aim.sign}", source, host, time.monotonic_ns(), 0)
        say(f"{number:>4} {source} -> {host}: {struck.what}")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.work.pound)
            struck.outcome = await self._migrate(struck, fault, aim)
            if struck.outcome == "in-doubt":
                await self._recover(struck)
            lives = await self._lives()
            self.work.stop()
            if not lives:
                nursery.cancel_scope.cancel()
        await self._bring_back(struck, lives=lives)
        await self._check(struck)
        self.history.read()
        if struck.t_ns:
            self.strikes.append(struck)
        say(f"     {struck.outcome}, on {await self._vm.host()}")

    # -- what happens -----------------------------------------------------------------------------------------

    async def _migrate(self, struck: Strike, fault: Fault, aim: Aim) -> str:
        signs = Signs(self._traveller, struck.source, struck.host)
        await self._vm.begin_migration(struck.host, bandwidth=BANDWIDTH, downtime_limit=DOWNTIME_MS)
        if fault.kind is Kind.NONE:
            return await until_over(self._traveller)
        victim = await find_victim(self._traveller, fault, struck.source, struck.host) if fault.victim else None
        try:
            await self._strike(struck, fault, aim, signs, victim)
            return await until_over(self._traveller)
        finally:
            if victim is not None:
                victim.close()

    async def _strike(self, struck: Strike, fault: Fault, aim: Aim, signs: Signs, victim: Victim | None) -> None:
        if fault.victim and victim is None:
            return
        with trio.fail_after(20):
            await signs.wait(aim)
        await trio.sleep(self._dice.uniform(0, aim.spread_seconds))
        struck.t_ns = await strike(self._traveller, fault, victim)
        if fault.kind is Kind.CUT:
            await trio.sleep(fault.seconds)
            await self._running.link(*HOSTS, down=False)
        elif victim is not None and fault.kind is Kind.HOLD:
            await trio.sleep(fault.seconds)
            victim.send(signal.SIGCONT)
        elif victim is not None:
            # What follows from its end is decided when the launcher has seen it.
            await until(lambda: not is_alive(victim.pid), f"{victim.target} is dead")

    async def _recover(self, struck: Strike) -> None:
        """Neither side can know: the destination's word is carried, if need be out of its ledger."""
        if struck.host in await dead_hosts(self._running):
            await self._running.restart(struck.host)
        await self._vm.recover()
        struck.outcome = "in-doubt, recovered"

    async def _lives(self) -> bool:
        """Whether the VM goes on as it was."""
        row = await self._vm.row()
        return row.state not in ("failed", "off") and await self._vm.host() not in await dead_hosts(self._running)

    async def _bring_back(self, struck: Strike, *, lives: bool) -> None:
        """Restart what was killed."""
        dead = await dead_hosts(self._running)
        for name in dead:
            await self._running.restart(name)
        if lives:
            return
        with_host = await self._vm.host() in dead
        struck.outcome += ", host restarted" if with_host else ", VM restarted"
        if not with_host:
            await self._vm.restart()
        await self.work.boot()
        if self._secure:
            await self._vm.secure()

    # -- what must hold afterwards ----------------------------------------------------------------------------

    async def _check(self, struck: Strike) -> None:
        await self._nothing_left(struck)
        await self.work.check()
        assert await self._traveller.is_secure() is self._secure
        self._check_audits()

    async def _nothing_left(self, struck: Strike) -> None:
        """Returns when what is removed in the background is gone."""
        deadline = time.monotonic() + _CLEAN_SECONDS
        while problems := await self._problems(struck):
            assert time.monotonic() < deadline, problems
            await trio.sleep(0.05)

    async def _problems(self, struck: Strike) -> list[str]:
        """Whatever is left of the VM anywhere but on its host, or is missing there."""
        status = await self._running.status()
        home = await self._vm.host()
        row = await self._vm.row()
        pids = {process.pid for process in processes_of(status)}
        found = [
            f"{process.target} is {process.state}" for process in processes_of(status) if process.state != "running"
        ]
        if row.state != "running" or row.migration is not None or row.arriving:
            found.append(f"the VM is {row.state} {row.reason}, {row.migration}, {row.arriving}")
        if members_of(self._running.launcher_pid) != pids:
            found.append(f"processes {members_of(self._running.launcher_pid)}, known are {pids}")
        segments = [name for name in os.listdir(SHM_DIR) if name.startswith(f"pefbox-{self._running.name}-")]
        if len(segments) != _SEGMENT_OF_VM:
            found.append(f"segments {segments}")
        if self._directories() != _expected_directories(home):
            found.append(f"directories {self._directories() ^ _expected_directories(home)}")
        return found + await self._left_with_keepers(struck.host if home == struck.source else struck.source)

    async def _left_with_keepers(self, away: str) -> list[str]:
        """Secure memory that is in use where the VM is not, and what is still known of it there."""
        found = []
        account = await self._running.process(f"{away}/ultravisor").query("account")
        if account["used_bytes"]:
            found.append(f"{away}/ultravisor has {account['used_bytes']} bytes in use")
        try:
            found.append(f"{away}/kvm: {await self._running.process(f'{away}/kvm').query('vm.status', {'vm': 'vm1'})}")
        except UserError as error:
            if "no VM" not in str(error):
                found.append(f"{away}/kvm: {error}")
        return found

    def _directories(self) -> set[str]:
        """Those of the run directory, without the numbers of incarnations."""
        run_dir = self._running.paths.run_dir
        found = (path.relative_to(run_dir) for path in run_dir.rglob("*") if path.is_dir())
        return {re.sub(r"\.\d+", "", str(path)) for path in found}

    def _check_audits(self) -> None:
        """Of one migration never both: the source went on with the VM, and the destination started it."""
        went_on: set[object] = set()
        started: set[object] = set()
        for host in HOSTS:
            with self._running.paths.audit_log(host).open("rb") as log:
                assert verify(log).broken_line is None
                log.seek(0)
                for line in read_lines(log):
                    if line.event in ("migration-returned", "migration-cancelled"):
                        went_on.add(line.facts["session"])
                    elif line.event == "migration-started":
                        started.add(line.facts["session"])
        # Without a handshake a migration has no name.
        assert not (went_on - {""}) & started


def _expected_directories(home: str) -> set[str]:
    found = {f"{host}.{role}" for host in HOSTS for role in ("kvm", "ultravisor")} | {"vm1.qemu", "vm1.guest"}
    found |= {f"{host}.ultravisor/kvm" for host in HOSTS}
    return found | {f"{home}.kvm/vm1.qemu", f"{home}.kvm/vm1.guest", f"{home}.ultravisor/vm1.guest"}


def say(line: str) -> None:
    """For whoever watches (`-s`), or finds out why it failed."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _fell_out(strikes: list[Strike]) -> str:
    rows = (f"{s.turn:>4} {s.what:<60} {s.outcome:<32} {', '.join(s.states)}" for s in strikes)
    return "\n".join([*rows, "", table(strikes, LEAST_STRIKES)])


async def _run(directory: Path, *, secure: bool, n_migrations: int) -> tuple[list[Strike], str]:
    """That many migrations, then the end of the cluster; what struck, and that for people."""
    dice = random.Random(SEED)
    async with travelling(directory, secure=secure, record=True) as traveller:
        chaos = Chaos(traveller, secure=secure, dice=dice)
        await chaos.work.boot()
        each, aims = faults(dice), dealt(dice, AIMS if secure else NORMAL_AIMS)
        for number in range(n_migrations):
            await chaos.turn(number, next(each), next(aims))
        await trio.sleep(RECORD_WRITTEN_SECONDS)
        chaos.history.read()
        for strike in chaos.strikes:
            strike.states = chaos.history.states_at(strike)
        processes = children_of(traveller.running.launcher_pid)
        assert await traveller.running.down() == 0
        assert not [pid for pid in processes if is_alive(pid)]
        assert not traveller.running.paths.run_dir.exists()
        assert not [name for name in os.listdir(SHM_DIR) if traveller.running.name in name]
    return chaos.strikes, _fell_out(chaos.strikes)


async def test_a_secure_vm_survives_whatever_happens_while_it_moves(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    strikes, shown = await _run(tmp_path, secure=True, n_migrations=N_MIGRATIONS)
    record_property(SHOWN, shown)
    if N_MIGRATIONS >= FULL:
        counts = counted(strikes)
        missed = [state for state in EVERY if counts[state] < LEAST_STRIKES]
        assert not missed, f"struck less than {LEAST_STRIKES} times: {missed}"


async def test_a_normal_vm_survives_it_too(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    _, shown = await _run(tmp_path, secure=False, n_migrations=max(3, N_MIGRATIONS // 5))
    record_property(SHOWN, shown)
