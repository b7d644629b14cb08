"""Hypercalls in which a processor waits, as kvm hears of them: it does not see a cede end by the decrementer."""

from __future__ import annotations

from protocol.codes import HCode
from protocol.hcalls import H_CEDE, H_CONFER, H_PROD
from tests.unit.kvm_rig import kvm_rig


async def test_a_prod_of_the_caller_counts_for_its_next_wait_and_not_for_a_cede_that_it_has_left() -> None:
    with kvm_rig() as rig:
        rig.vm.vcpus.start(0)
        ended: list[list[int]] = []
        rig.vm.reflected_at_once(H_CEDE, 0, [], 0, ended.append)
        assert not ended

        assert await rig.hcall(H_PROD, 0) == HCode.H_SUCCESS

        assert await rig.hcall(H_CONFER, 0, 0) == HCode.H_SUCCESS
