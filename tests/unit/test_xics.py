"""The interrupt controller: nothing is lost, nothing comes twice, the more favored comes first."""

from __future__ import annotations

import pytest

from protocol.codes import HCode
from protocol.errors import MalformedMessage
from services.kvm.xics import IPI_SOURCE, LEAST_FAVORED, MAX_SOURCE, MAX_SOURCES, Xics
from tests.unit.xics_rig import LSI, MSI, OPEN, OTHER_MSI, accept, controller, end


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
