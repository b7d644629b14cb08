"""The interrupt controller: nothing is lost, nothing comes twice, the more favored comes first."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from protocol.codes import HCode, RtasStatus
from protocol.errors import MalformedMessage
from protocol.rtas import GET_XIVE, INT_OFF, INT_ON, POWER_OFF, SET_XIVE, status_word
from services.kvm import rtas_irq
from services.kvm.xics import IPI_SOURCE, LEAST_FAVORED, MAX_SOURCE, MAX_SOURCES, Xics

LSI, OTHER_LSI = 0x1200, 0x1201
MSI, OTHER_MSI = 0x1300, 0x1301
OPEN = 0xFF
OK = status_word(RtasStatus.SUCCESS)
BAD = status_word(RtasStatus.PARAMETER_ERROR)


def controller(n_servers: int = 2) -> Xics:
    """Two level and two edge sources of priority 5 at server 0; servers accept everything."""
    xics = Xics(n_servers)
    for number in (LSI, OTHER_LSI):
        xics.add_source(number, level_triggered=True)
    for number in (MSI, OTHER_MSI):
        xics.add_source(number, level_triggered=False)
    for number in (LSI, OTHER_LSI, MSI, OTHER_MSI):
        xics.configure(number, 0, 5, 5)
    for server in range(n_servers):
        xics.h_cppr(server, OPEN)
    return xics


def accept(xics: Xics, server: int = 0) -> int:
    """The source that H_XIRR takes, 0 for none."""
    return xics.h_xirr(server)[1] & 0xFFFFFF


def end(xics: Xics, number: int, cppr: int = OPEN, server: int = 0) -> None:
    xics.h_eoi(server, cppr << 24 | number)


def test_an_edge_raises_the_line_until_it_is_accepted() -> None:
    xics = controller()

    xics.set_irq(MSI, True)

    assert xics.take_line_changes() == [(0, True)]
    assert xics.h_xirr(0) == [HCode.H_SUCCESS, OPEN << 24 | MSI]
    assert xics.take_line_changes() == [(0, False)]
    assert not xics.line(0)


def test_accepting_sets_the_priority_and_ending_restores_it() -> None:
    xics = controller()
    xics.set_irq(MSI, True)

    accept(xics)
    assert xics.h_ipoll(0) == [HCode.H_SUCCESS, 5 << 24, LEAST_FAVORED]
    end(xics, MSI)

    assert xics.h_ipoll(0) == [HCode.H_SUCCESS, OPEN << 24, LEAST_FAVORED]


def test_accepting_when_nothing_waits_gives_source_0() -> None:
    xics = controller()

    assert xics.h_xirr(0) == [HCode.H_SUCCESS, OPEN << 24]


def test_a_second_edge_before_acceptance_merges() -> None:
    xics = controller()
    xics.set_irq(MSI, True)
    xics.set_irq(MSI, True)

    assert accept(xics) == MSI
    end(xics, MSI)

    assert accept(xics) == 0


def test_an_edge_during_service_comes_after_the_end() -> None:
    xics = controller()
    xics.set_irq(MSI, True)
    accept(xics)

    xics.set_irq(MSI, True)
    assert not xics.line(0)
    end(xics, MSI)

    assert accept(xics) == MSI


def test_a_low_edge_line_is_no_edge() -> None:
    xics = controller()

    xics.set_irq(MSI, False)

    assert not xics.line(0)


def test_a_level_comes_again_while_it_stays_up() -> None:
    xics = controller()
    xics.set_irq(LSI, True)

    assert accept(xics) == LSI
    assert accept(xics) == 0
    end(xics, LSI)
    assert accept(xics) == LSI
    xics.set_irq(LSI, False)
    end(xics, LSI)

    assert accept(xics) == 0


def test_ending_a_source_that_is_not_in_service_presents_nothing_twice() -> None:
    xics = controller()
    xics.set_irq(LSI, True)
    accept(xics)
    end(xics, LSI)

    end(xics, LSI)

    assert accept(xics) == LSI
    assert accept(xics) == 0


def test_the_more_favored_displaces_the_presented_and_both_arrive() -> None:
    xics = controller()
    xics.configure(OTHER_MSI, 0, 3, 3)
    xics.set_irq(MSI, True)

    xics.set_irq(OTHER_MSI, True)

    assert accept(xics) == OTHER_MSI
    end(xics, OTHER_MSI)
    assert accept(xics) == MSI


def test_an_equal_priority_waits() -> None:
    xics = controller()
    xics.set_irq(OTHER_MSI, True)
    xics.set_irq(MSI, True)

    assert accept(xics) == OTHER_MSI
    assert not xics.line(0)
    end(xics, OTHER_MSI)
    assert accept(xics) == MSI


def test_lowering_cppr_takes_the_presented_back() -> None:
    xics = controller()
    xics.set_irq(MSI, True)
    xics.take_line_changes()

    xics.h_cppr(0, 5)
    assert xics.take_line_changes() == [(0, False)]
    xics.h_cppr(0, 6)

    assert accept(xics) == MSI


def test_a_server_that_accepts_nothing_keeps_what_comes() -> None:
    xics = Xics()
    xics.add_source(MSI, level_triggered=False)
    xics.configure(MSI, 0, 0, 0)
    xics.set_irq(MSI, True)

    assert not xics.line(0)
    xics.h_cppr(0, 1)

    assert accept(xics) == MSI


def test_a_masked_source_keeps_its_edge() -> None:
    xics = controller()
    xics.configure(MSI, 0, LEAST_FAVORED, 5)
    xics.set_irq(MSI, True)

    assert not xics.line(0)
    xics.configure(MSI, 0, 5, 5)

    assert accept(xics) == MSI


def test_an_edge_displaced_while_masked_is_not_lost() -> None:
    xics = controller()
    xics.configure(OTHER_MSI, 0, 3, 3)
    xics.set_irq(MSI, True)
    xics.configure(MSI, 0, LEAST_FAVORED, 5)
    xics.set_irq(OTHER_MSI, True)
    assert accept(xics) == OTHER_MSI
    end(xics, OTHER_MSI)
    assert accept(xics) == 0

    xics.configure(MSI, 0, 5, 5)

    assert accept(xics) == MSI


def test_an_edge_displaced_after_it_was_moved_goes_to_its_new_server() -> None:
    xics = controller()
    xics.configure(OTHER_MSI, 0, 3, 3)
    xics.set_irq(MSI, True)
    xics.configure(MSI, 1, 5, 5)

    xics.set_irq(OTHER_MSI, True)

    assert accept(xics, 1) == MSI
    assert accept(xics, 0) == OTHER_MSI


def test_a_waiting_source_that_is_moved_is_presented_at_once() -> None:
    xics = controller()
    xics.h_cppr(0, 0)
    xics.set_irq(MSI, True)

    xics.configure(MSI, 1, 5, 5)

    assert xics.line(1)


def test_an_ipi_is_a_level_of_mfrr() -> None:
    xics = controller()

    xics.h_ipi(1, 4)

    assert xics.h_xirr(1) == [HCode.H_SUCCESS, OPEN << 24 | IPI_SOURCE]
    end(xics, IPI_SOURCE, server=1)
    assert accept(xics, 1) == IPI_SOURCE
    xics.h_ipi(1, LEAST_FAVORED)
    end(xics, IPI_SOURCE, server=1)
    assert accept(xics, 1) == 0


def test_a_more_favored_mfrr_raises_the_presented_ipi() -> None:
    xics = controller()
    xics.h_ipi(0, 6)
    xics.h_ipi(0, 2)

    accept(xics)

    assert xics.h_ipoll(0) == [HCode.H_SUCCESS, 2 << 24, 2]


def test_an_ipi_and_a_source_come_by_priority() -> None:
    xics = controller()
    xics.h_ipi(0, 6)
    xics.set_irq(MSI, True)

    assert accept(xics) == MSI
    assert not xics.line(0)
    end(xics, MSI)
    assert accept(xics) == IPI_SOURCE


def test_xirr_x_adds_the_time() -> None:
    xics = controller()
    xics.set_irq(MSI, True)

    assert xics.h_xirr_x(0, 1234) == [HCode.H_SUCCESS, OPEN << 24 | MSI, 1234]


def test_an_unknown_server_or_source_is_a_parameter_error() -> None:
    xics = controller()

    for result in (
        xics.h_xirr(2),
        xics.h_xirr_x(2, 0),
        xics.h_cppr(2, 0),
        xics.h_eoi(2, 0),
        xics.h_ipi(1 << 40, 0),
        xics.h_ipoll(-1),
    ):
        assert result == [HCode.H_PARAMETER]
    assert xics.set_irq(0x1400, True) is HCode.H_PARAMETER
    assert xics.configure(0x1400, 0, 5, 5) is HCode.H_PARAMETER
    assert xics.configure(MSI, 2, 5, 5) is HCode.H_PARAMETER
    assert xics.configure(MSI, 0, 256, 5) is HCode.H_PARAMETER


def test_ending_an_unknown_source_only_sets_the_priority() -> None:
    xics = controller()

    assert xics.h_eoi(0, 7 << 24 | 0x999999) == [HCode.H_SUCCESS]
    assert xics.h_ipoll(0)[1] == 7 << 24


@pytest.mark.parametrize("number", [0, IPI_SOURCE, 15, MAX_SOURCE + 1, -1])
def test_a_number_that_is_no_source_is_refused(number: int) -> None:
    assert Xics().add_source(number, level_triggered=True) is HCode.H_PARAMETER


def test_the_number_of_sources_is_bounded() -> None:
    xics = Xics()
    for number in range(MAX_SOURCES):
        assert xics.add_source(0x1000 + number, level_triggered=False) is HCode.H_SUCCESS

    assert xics.add_source(0x1000 + MAX_SOURCES, level_triggered=False) is HCode.H_RESOURCE


def test_declaring_a_source_again_keeps_it_and_its_trigger_changes_only_when_idle() -> None:
    xics = controller()
    xics.set_irq(MSI, True)

    assert xics.add_source(MSI, level_triggered=False) is HCode.H_SUCCESS
    assert xics.add_source(MSI, level_triggered=True) is HCode.H_IN_USE
    assert accept(xics) == MSI
    assert xics.add_source(MSI, level_triggered=True) is HCode.H_SUCCESS


def test_a_reset_masks_everything_and_keeps_levels() -> None:
    xics = controller()
    xics.set_irq(LSI, True)
    xics.set_irq(MSI, True)
    xics.h_ipi(0, 1)
    xics.take_line_changes()

    xics.reset()

    assert xics.take_line_changes() == [(0, False)]
    xics.h_cppr(0, OPEN)
    assert accept(xics) == 0
    xics.configure(MSI, 0, 5, 5)
    assert accept(xics) == 0
    xics.configure(LSI, 0, 5, 5)
    assert accept(xics) == LSI


def test_a_loaded_controller_reports_its_lines_and_goes_on() -> None:
    xics = controller()
    xics.set_irq(MSI, True)
    xics.set_irq(LSI, True)
    accept(xics)

    fresh = Xics(2)
    fresh.load(xics.save())
    end(fresh, LSI)

    assert fresh.take_line_changes() == [(0, True)]
    assert accept(fresh) == LSI


def test_a_save_is_apart_from_the_controller() -> None:
    xics = controller()
    state = xics.save()

    xics.set_irq(MSI, True)

    assert not any(source.pending for source in state.sources)


@pytest.mark.parametrize("field", ["xisr", "server", "number", "priority", "cppr", "twice", "fewer"])
def test_a_state_that_does_not_hold_is_refused(field: str) -> None:
    state = controller().save()
    match field:
        case "xisr":
            state.servers[0].xisr = MSI
        case "server":
            state.sources[0].server = 2
        case "number":
            state.sources[0].number = 3
        case "priority":
            state.sources[0].priority = -1
        case "cppr":
            state.servers[1].cppr = 256
        case "twice":
            state.sources.append(state.sources[0])
        case "fewer":
            state.servers.pop()

    with pytest.raises(MalformedMessage):
        Xics(2).load(state)


def test_rtas_routes_masks_and_restores_a_source() -> None:
    xics = controller()

    assert rtas_irq.serve(xics, SET_XIVE, [MSI, 1, 7], 1) == [OK]
    assert rtas_irq.serve(xics, GET_XIVE, [MSI], 3) == [OK, 1, 7]
    assert rtas_irq.serve(xics, INT_OFF, [MSI], 1) == [OK]
    assert rtas_irq.serve(xics, INT_OFF, [MSI], 1) == [OK]
    assert rtas_irq.serve(xics, GET_XIVE, [MSI], 3) == [OK, 1, LEAST_FAVORED]
    assert rtas_irq.serve(xics, INT_ON, [MSI], 1) == [OK]
    assert rtas_irq.serve(xics, GET_XIVE, [MSI], 3) == [OK, 1, 7]


@pytest.mark.parametrize(
    ("token", "args", "n_rets"),
    [
        (SET_XIVE, [MSI, 0], 1),
        (SET_XIVE, [MSI, 0, 5], 2),
        (SET_XIVE, [MSI, 9, 5], 1),
        (SET_XIVE, [MSI, 0, 256], 1),
        (SET_XIVE, [0x1400, 0, 5], 1),
        (GET_XIVE, [MSI], 2),
        (GET_XIVE, [0x1400], 3),
        (INT_OFF, [0x1400], 1),
        (INT_ON, [], 1),
        (INT_ON, [0x1400], 1),
    ],
)
def test_rtas_refuses_a_bad_block(token: int, args: list[int], n_rets: int) -> None:
    assert rtas_irq.serve(controller(), token, args, n_rets) == [BAD]


def test_rtas_of_another_process_is_not_served_here() -> None:
    assert rtas_irq.serve(controller(), POWER_OFF, [0, 0], 1) is None


def test_no_return_word_is_written_where_there_is_no_room() -> None:
    assert rtas_irq.serve(controller(), INT_ON, [MSI], 0) == []


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
        assert [priority for priority in self.deliverable(server) if priority < after] == []
        if number != IPI_SOURCE:
            assert self.due[number], "presented although nothing was due"
            self.due[number] = False
            if number in self.level:
                self.in_service.add(number)

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
