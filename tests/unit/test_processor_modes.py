"""H_REGISTER_PROC_TBL and H_SET_MODE: kvm takes what the processor can do, and refuses anything else."""

from __future__ import annotations

import pytest

from protocol.codes import HCode
from protocol.hcall_values import SetModeResource
from protocol.hcalls import H_REGISTER_PROC_TBL, H_SET_MODE
from tests.unit.kvm_rig import kvm_rig

NEW_RADIX = 0x1C
TABLE = 0x10000
LITTLE_ENDIAN, TRANSLATION = SetModeResource.LITTLE_ENDIAN, SetModeResource.ADDRESS_TRANSLATION_MODE


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


@pytest.mark.parametrize(
    ("args", "code"),
    [
        ((0, LITTLE_ENDIAN, 0, 0), HCode.H_SUCCESS),
        ((1, LITTLE_ENDIAN, 0, 0), HCode.H_SUCCESS),
        ((2, LITTLE_ENDIAN, 0, 0), HCode.H_UNSUPPORTED),
        (((1 << 64) - 1, LITTLE_ENDIAN, 0, 0), HCode.H_UNSUPPORTED),
        ((0, TRANSLATION, 0, 0), HCode.H_SUCCESS),
        ((1, TRANSLATION, 0, 0), HCode.H_UNSUPPORTED),
        ((2, TRANSLATION, 0, 0), HCode.H_UNSUPPORTED),
        ((3, TRANSLATION, 0, 0), HCode.H_SUCCESS),
        ((7, TRANSLATION, 1, 0), HCode.H_P3),
        ((7, TRANSLATION, 0, 1), HCode.H_P4),
        ((0, SetModeResource.DAWR, 0, 0), HCode.H_UNSUPPORTED),
        ((0, 77, 0, 0), HCode.H_P2),
    ],
)
async def test_only_a_mode_that_the_processor_has_is_set(args: tuple[int, ...], code: HCode) -> None:
    with kvm_rig() as rig:
        await rig.start()

        assert await rig.hcall(H_SET_MODE, *args) == code

        assert rig.vm.hcalls.save_modes() == ({args[1]: args[0]} if code is HCode.H_SUCCESS else {})
