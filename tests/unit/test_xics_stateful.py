"""The interrupt controller under any order of calls, against a model of edges, levels and acceptances."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from protocol.codes import HCode, RtasStatus
from protocol.rtas import INT_OFF, INT_ON, SET_XIVE, status_word
from services.kvm import rtas_irq
from services.kvm.xics import IPI_SOURCE, LEAST_FAVORED, Xics
from tests.unit.xics_rig import LSI, MSI, OPEN, OTHER_LSI, OTHER_MSI, accept, controller, end

OK = status_word(RtasStatus.SUCCESS)
SERVERS = st.integers(0, 1)
SOURCES = st.sampled_from([LSI, OTHER_LSI, MSI, OTHER_MSI])
PRIORITIES = st.sampled_from([0, 3, 5, 6, LEAST_FAVORED])


class AgainstEdgesAndLevels(RuleBasedStateMachine):
    """Keeps only what devices did and what was accepted, and holds the controller to it."""

    def __init__(self) -> None:
        super().__init__()
        self.xics = controller()
        self.due = {LSI: False, OTHER_LSI: False, MSI: False, OTHER_MSI: False}
        self.level = {LSI: False, OTHER_LSI: False}
        self.in_service: set[int] = set()
        self.mfrr = [LEAST_FAVORED, LEAST_FAVORED]
        self.cppr = [OPEN, OPEN]
        self.lines = [False, False]

    @rule(number=SOURCES, up=st.booleans())
    def device_sets_line(self, number: int, up: bool) -> None:
        self.xics.set_irq(number, up)
        if number in self.level:
            self.level[number] = up
            self.due[number] |= up and number not in self.in_service
        else:
            self.due[number] |= up

    @rule(number=SOURCES, server=SERVERS, priority=PRIORITIES)
    def guest_routes(self, number: int, server: int, priority: int) -> None:
        assert rtas_irq.serve(self.xics, SET_XIVE, [number, server, priority], 1) == [OK]

    @rule(number=SOURCES, on=st.booleans())
    def guest_masks(self, number: int, on: bool) -> None:
        assert rtas_irq.serve(self.xics, INT_ON if on else INT_OFF, [number], 1) == [OK]

    @rule(server=SERVERS, mfrr=PRIORITIES)
    def guest_sends_ipi(self, server: int, mfrr: int) -> None:
        self.xics.h_ipi(server, mfrr)
        self.mfrr[server] = mfrr

    @rule(server=SERVERS, cppr=PRIORITIES)
    def guest_sets_cppr(self, server: int, cppr: int) -> None:
        self.xics.h_cppr(server, cppr)
        self.cppr[server] = cppr

    @rule(server=SERVERS)
    def guest_accepts(self, server: int) -> None:
        code, xirr = self.xics.h_xirr(server)
        number, before = xirr & 0xFFFFFF, xirr >> 24
        assert code == HCode.H_SUCCESS
        assert before == self.cppr[server]
        if not number:
            return
        after = self.xics.h_ipoll(server)[1] >> 24
        assert after < before
        self.cppr[server] = after
        if number != IPI_SOURCE:
            assert self.due[number], "presented although nothing was due"
            self.due[number] = False
            if number in self.level:
                self.in_service.add(number)
        # Only now: what was accepted may have been given a better priority while it was presented.
        assert [priority for priority in self.deliverable(server) if priority < after] == []

    @rule(server=SERVERS, number=SOURCES, cppr=PRIORITIES, sensible=st.booleans())
    def guest_ends(self, server: int, number: int, cppr: int, sensible: bool) -> None:
        if sensible and self.in_service:
            number = min(self.in_service)
        self.xics.h_eoi(server, cppr << 24 | number)
        self.cppr[server] = cppr
        if number in self.in_service:
            self.in_service.remove(number)
            self.due[number] = self.level[number]

    @rule()
    def vm_moves(self) -> None:
        fresh = Xics(2)
        fresh.load(self.xics.save())
        self.lines = [False, False]
        self.xics = fresh

    def wanting(self, number: int) -> bool:
        return self.level[number] and number not in self.in_service if number in self.level else self.due[number]

    def deliverable(self, server: int) -> list[int]:
        """Priorities of what is due at a server and not presented anywhere."""
        sources = [self.xics.source(number) for number in self.due if self.wanting(number)]
        return [s.priority for s in sources if s is not None and s.server == server and not s.presented]

    @invariant()
    def nothing_that_could_be_presented_waits(self) -> None:
        for server in (0, 1):
            _, xirr, mfrr = self.xics.h_ipoll(server)
            assert mfrr == self.mfrr[server]
            waiting = [*self.deliverable(server), self.mfrr[server]]
            if not xirr & 0xFFFFFF:
                assert [p for p in waiting if p < xirr >> 24] == []

    @invariant()
    def a_source_stands_in_one_place(self) -> None:
        standing = [xisr for server in (0, 1) if (xisr := self.xics.h_ipoll(server)[1] & 0xFFFFFF) > IPI_SOURCE]
        presented = [n for n in self.due if (source := self.xics.source(n)) is not None and source.presented]
        assert sorted(standing) == presented

    @invariant()
    def line_changes_tell_the_lines(self) -> None:
        for server, level in self.xics.take_line_changes():
            assert level != self.lines[server]
            self.lines[server] = level
        assert self.lines == [self.xics.line(0), self.xics.line(1)]

    def teardown(self) -> None:
        """Open everything: what is still due arrives once, then it is quiet."""
        for number in self.level:
            self.xics.set_irq(number, False)
            self.level[number] = False
        for server in (0, 1):
            self.xics.h_ipi(server, LEAST_FAVORED)
        for number in self.due:
            source = self.xics.source(number)
            assert source is not None
            self.xics.configure(number, source.server, 5, 5)
        edges_due = {number for number in (MSI, OTHER_MSI) if self.due[number]}
        arrived: list[int] = []
        for server in (0, 1):
            self.xics.h_cppr(server, OPEN)
            while number := accept(self.xics, server):
                arrived.append(number)
                end(self.xics, number, server=server)
        assert sorted(number for number in arrived if number in (MSI, OTHER_MSI)) == sorted(edges_due)


TestAgainstEdgesAndLevels = AgainstEdgesAndLevels.TestCase
TestAgainstEdgesAndLevels.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
