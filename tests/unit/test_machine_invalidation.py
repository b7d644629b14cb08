"""What tlbie and tlbiel invalidate."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.guest.machine.invalidation import Invalidation, OfPage, OfProcess, Whole, invalidation
from tests.unit import power_asm as asm
from tests.unit.power_asm import R4, R7

KERNEL = 0xC000_0000_0000_0000
PID = 7
OF_PROCESS, OF_PARTITION, OF_ALL = 1 << 10, 2 << 10, 3 << 10
SET_1 = 1 << 12
PAGE_4K, PAGE_64K, PAGE_2M, PAGE_1G = (ap << 5 for ap in (0b000, 0b101, 0b001, 0b010))
TLB, WALKS, ALL, CLUSTER = range(4)


def of(instruction: int, rb: int, pid: int = PID) -> Invalidation:
    gprs = [0] * 32
    gprs[R4], gprs[R7] = rb, pid << 32
    return invalidation(instruction, gprs)


@pytest.mark.parametrize(
    ("rb", "page"),
    [
        (0x1234_5000 | PAGE_4K, OfPage(0x1234_5000, 12, PID)),
        (0x1234_5000 | PAGE_64K, OfPage(0x1234_0000, 16, PID)),
        (0x1234_5000 | PAGE_2M, OfPage(0x1220_0000, 21, PID)),
        (0x1_2345_6000 | PAGE_1G, OfPage(0x1_0000_0000, 30, PID)),
        (KERNEL | 0x8000 | PAGE_4K, OfPage(KERNEL | 0x8000, 12, 0)),
    ],
)
@pytest.mark.parametrize("instruction", [asm.tlbie(R4, R7), asm.tlbiel(R4, R7), asm.tlbie(R4, R7, ric=ALL)])
def test_a_page_has_the_size_that_the_operand_says(rb: int, page: OfPage, instruction: int) -> None:
    assert of(instruction, rb) == page


def test_a_process_is_named_by_rs() -> None:
    assert of(asm.tlbie(R4, R7), OF_PROCESS) == OfProcess(PID)
    assert of(asm.tlbiel(R4, R7, ric=ALL), OF_PROCESS) == OfProcess(PID)


def test_process_0_is_the_kernel_whose_pages_are_of_every_process() -> None:
    assert of(asm.tlbie(R4, R7), OF_PROCESS, pid=0) is Whole.EVERYTHING


@pytest.mark.parametrize("scope", [OF_PROCESS, OF_PARTITION, OF_ALL])
def test_of_the_sets_of_the_tlb_only_the_first_holds_something(scope: int) -> None:
    assert of(asm.tlbiel(R4, R7), scope | SET_1) is Whole.NOTHING
    assert of(asm.tlbie(R4, R7), scope | SET_1) is not Whole.NOTHING


def test_walks_of_the_tree_are_not_cached() -> None:
    assert of(asm.tlbie(R4, R7, ric=WALKS), OF_PROCESS) is Whole.NOTHING


@pytest.mark.parametrize(
    ("instruction", "rb"),
    [
        (asm.tlbie(R4, R7), OF_PARTITION),
        (asm.tlbie(R4, R7), OF_ALL),
        (asm.tlbie(R4, R7), 0x1000 | 0b111 << 5),
        (asm.tlbie(R4, R7, ric=CLUSTER), 0x1000),
        (asm.tlbie(R4, R7, prs=0), 0x1000),
        (asm.tlbie(R4, R7, radix=0), 0x1000),
        (asm.tlbiel(R4, R7, radix=0), OF_ALL),
    ],
)
def test_what_is_not_understood_invalidates_everything(instruction: int, rb: int) -> None:
    assert of(instruction, rb) is Whole.EVERYTHING


@given(ric=st.sampled_from([TLB, ALL]), address=st.integers(0, (1 << 64) - 1), pid=st.integers(0, (1 << 32) - 1))
def test_the_page_that_is_named_is_among_those_that_go(ric: int, address: int, pid: int) -> None:
    found = of(asm.tlbie(R4, R7, ric=ric), address & ~OF_ALL, pid)

    if isinstance(found, OfPage):
        assert found.address >> found.shift == address >> found.shift
        assert found.pid == (0 if address >> 63 else pid)
    else:
        assert found is Whole.EVERYTHING
