"""The RTAS services of interrupt sources."""

from __future__ import annotations

import pytest

from protocol.codes import RtasStatus
from protocol.rtas import GET_XIVE, INT_OFF, INT_ON, POWER_OFF, SET_XIVE, status_word
from services.kvm import rtas_irq
from services.kvm.xics import LEAST_FAVORED, Xics

MSI = 0x1300
OK = status_word(RtasStatus.SUCCESS)
BAD = status_word(RtasStatus.PARAMETER_ERROR)


def controller() -> Xics:
    """One edge source, two servers."""
    xics = Xics(2)
    xics.add_source(MSI, level_triggered=False)
    return xics


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
