"""H_REGISTER_PROC_TBL: kvm takes a radix table that can be one, and refuses anything else."""

from __future__ import annotations

import pytest

from protocol.codes import HCode
from protocol.hcalls import H_REGISTER_PROC_TBL
from tests.unit.kvm_rig import kvm_rig

NEW_RADIX = 0x1C
TABLE = 0x10000


@pytest.mark.parametrize(
    ("args", "code"),
    [
        ((NEW_RADIX, TABLE, 0, 12), HCode.H_SUCCESS),
        ((NEW_RADIX | 1, TABLE, 0, 24), HCode.H_SUCCESS),
        ((0x10, 0, 0, 0), HCode.H_SUCCESS),
        ((NEW_RADIX | 2, TABLE, 0, 12), HCode.H_PARAMETER),
        ((0x18, TABLE, 0, 12), HCode.H_PARAMETER),
        ((NEW_RADIX | 0x100, TABLE, 0, 12), HCode.H_PARAMETER),
        ((NEW_RADIX, TABLE + 8, 0, 12), HCode.H_P2),
        ((NEW_RADIX, TABLE, 5, 12), HCode.H_P3),
        ((NEW_RADIX, TABLE, 0, 25), HCode.H_P4),
    ],
)
async def test_only_an_aligned_radix_table_of_a_possible_size_is_taken(args: tuple[int, ...], code: HCode) -> None:
    with kvm_rig() as rig:
        await rig.start()

        assert await rig.hcall(H_REGISTER_PROC_TBL, *args) == code
