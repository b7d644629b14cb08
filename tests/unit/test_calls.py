"""The call tables: every call of the public headers is there, once, and is either handled or listed with a reason."""

from __future__ import annotations

import itertools
from types import ModuleType

import pytest

from protocol import hcalls, links, ucalls
from protocol.codes import HCode, UCode
from protocol.declare import Call, Caller, CallTable, Direction, Kind, Memory, Reg, Space
from protocol.hcalls import HCALLS
from protocol.rtas import RTAS
from protocol.ucalls import UCALLS
from protocol.unhandled import HANDLED_HCALLS, HANDLED_UCALLS, UNHANDLED, Reason, names_of, undeclared

HCALL_NUMBERS = {
    0x04: "H_REMOVE", 0x08: "H_ENTER", 0x0C: "H_READ", 0x10: "H_CLEAR_MOD", 0x14: "H_CLEAR_REF", 0x18: "H_PROTECT",
    0x1C: "H_GET_TCE", 0x20: "H_PUT_TCE", 0x2C: "H_PAGE_INIT", 0x3C: "H_LOGICAL_CI_LOAD", 0x40: "H_LOGICAL_CI_STORE",
    0x54: "H_GET_TERM_CHAR", 0x58: "H_PUT_TERM_CHAR", 0x64: "H_EOI", 0x68: "H_CPPR", 0x6C: "H_IPI", 0x70: "H_IPOLL",
    0x74: "H_XIRR", 0xDC: "H_REGISTER_VPA", 0xE0: "H_CEDE", 0xE4: "H_CONFER", 0xE8: "H_PROD", 0xFC: "H_REG_CRQ",
    0x100: "H_FREE_CRQ", 0x108: "H_SEND_CRQ", 0x114: "H_REGISTER_LOGICAL_LAN", 0x120: "H_SEND_LOGICAL_LAN",
    0x124: "H_BULK_REMOVE", 0x138: "H_STUFF_TCE", 0x13C: "H_PUT_TCE_INDIRECT", 0x1C8: "H_GET_CPU_CHARACTERISTICS",
    0x298: "H_JOIN", 0x2A8: "H_VIOCTL", 0x2EC: "H_HOME_NODE_ASSOCIATIVITY", 0x2FC: "H_XIRR_X", 0x300: "H_RANDOM",
    0x31C: "H_SET_MODE", 0x328: "H_BLOCK_REMOVE", 0x36C: "H_RESIZE_HPT_PREPARE", 0x370: "H_RESIZE_HPT_COMMIT",
    0x37C: "H_REGISTER_PROC_TBL", 0x380: "H_SIGNAL_SYS_RESET", 0x3A8: "H_INT_GET_SOURCE_INFO", 0x3C8: "H_INT_ESB",
    0x3CC: "H_INT_SYNC", 0x3D0: "H_INT_RESET", 0x3E4: "H_SCM_READ_METADATA", 0x418: "H_SCM_PERFORMANCE_STATS",
    0x448: "H_RPT_INVALIDATE", 0x45C: "H_WATCHDOG", 0xEF00: "H_SVM_PAGE_IN", 0xEF04: "H_SVM_PAGE_OUT",
    0xEF08: "H_SVM_INIT_START", 0xEF0C: "H_SVM_INIT_DONE", 0xEF10: "H_SVM_TPM_COMM", 0xEF14: "H_SVM_INIT_ABORT",
    0xF000: "H_RTAS", 0xF001: "H_LOGICAL_MEMOP", 0xF002: "H_CAS", 0xF003: "H_UPDATE_DT",
    0xF800: "H_SET_PARTITION_TABLE", 0xF804: "H_ENTER_NESTED", 0xF808: "H_TLB_INVALIDATE",
    0xF80C: "H_COPY_TOFROM_GUEST",
}  # fmt: skip

UCALL_NUMBERS = {
    0xF104: "UV_WRITE_PATE", 0xF108: "UV_RESTRICTED_SPR_WRITE", 0xF10C: "UV_RESTRICTED_SPR_READ", 0xF110: "UV_ESM",
    0xF114: "UV_READ_SCOM", 0xF118: "UV_WRITE_SCOM", 0xF11C: "UV_RETURN", 0xF120: "UV_REGISTER_MEM_SLOT",
    0xF124: "UV_UNREGISTER_MEM_SLOT", 0xF128: "UV_PAGE_IN", 0xF12C: "UV_PAGE_OUT", 0xF130: "UV_SHARE_PAGE",
    0xF134: "UV_UNSHARE_PAGE", 0xF138: "UV_PAGE_INVAL", 0xF13C: "UV_SVM_TERMINATE", 0xF140: "UV_UNSHARE_ALL_PAGES",
    0xF144: "UV_READ_MEM", 0xF148: "UV_WRITE_MEM", 0xF14C: "UV_ESMB_GET_FILE", 0xF150: "UV_SEND_SBE_COMMAND",
}  # fmt: skip

_SERVED_HCALLS = """
    H_SVM_PAGE_IN H_SVM_PAGE_OUT H_SVM_INIT_START H_SVM_INIT_DONE H_SVM_INIT_ABORT H_PUT_TCE H_PUT_TCE_INDIRECT
    H_STUFF_TCE H_GET_TCE H_XIRR H_XIRR_X H_CPPR H_IPI H_IPOLL H_EOI H_CEDE H_PROD H_CONFER H_JOIN H_GET_TERM_CHAR
    H_PUT_TERM_CHAR H_RANDOM H_SET_MODE H_REGISTER_PROC_TBL H_LOGICAL_CI_LOAD H_LOGICAL_CI_STORE H_RTAS
    H_REGISTER_VPA H_GET_CPU_CHARACTERISTICS H_SIGNAL_SYS_RESET H_LOGICAL_MEMOP H_CAS H_UPDATE_DT
    H_SET_DMA_BYPASS
"""
SERVED_HCALLS = _SERVED_HCALLS.split()

TABLES = (HCALLS, UCALLS, RTAS)


@pytest.mark.parametrize(("table", "expected"), [(HCALLS, HCALL_NUMBERS), (UCALLS, UCALL_NUMBERS)])
def test_every_documented_call_is_declared_under_its_number(table: CallTable, expected: dict[int, str]) -> None:
    declared = {number: table.by_number[number].name for number in expected if number in table.by_number}

    assert declared == expected


@pytest.mark.parametrize("module", [hcalls, ucalls])
def test_the_python_name_of_a_call_is_its_declared_name(module: ModuleType) -> None:
    calls = {name: value for name, value in vars(module).items() if isinstance(value, Call)}

    assert calls
    assert {name: call.name for name, call in calls.items()} == {name: name for name in calls}


@pytest.mark.parametrize(("table", "prefix"), [(HCALLS, "H_"), (UCALLS, "UV_")])
def test_names_carry_the_prefix_of_their_space(table: CallTable, prefix: str) -> None:
    assert [call.name for call in table if not call.name.startswith(prefix)] == []


def test_no_two_spaces_share_a_name() -> None:
    names = [call.name for table in TABLES for call in table]

    assert len(names) == len(set(names))


def test_hypercalls_and_ultracalls_share_no_number() -> None:
    assert not HCALLS.by_number.keys() & UCALLS.by_number.keys()


def test_a_number_or_name_that_is_taken_is_refused() -> None:
    table = CallTable(Space.HCALL)
    table.declare(4, "H_A", callers=(Caller.VM,), source="here")

    with pytest.raises(ValueError, match="declared twice"):
        table.declare(4, "H_B", callers=(Caller.VM,), source="here")
    with pytest.raises(ValueError, match="declared twice"):
        table.declare(8, "H_A", callers=(Caller.VM,), source="here")


@pytest.mark.parametrize("table", TABLES)
def test_a_memory_count_names_an_argument_of_its_call(table: CallTable) -> None:
    wrong = [
        (call.name, reg.memory.count)
        for call in table
        for reg in call.args
        if reg.memory is not None and isinstance(reg.memory.count, str)
        if reg.memory.count not in {arg.name for arg in call.args}
    ]

    assert wrong == []


@pytest.mark.parametrize("table", TABLES)
def test_argument_names_of_a_call_differ(table: CallTable) -> None:
    wrong = [call.name for call in table if len({reg.name for reg in call.args}) != len(call.args)]

    assert wrong == []


@pytest.mark.parametrize("table", TABLES)
def test_every_call_has_a_caller_and_a_source(table: CallTable) -> None:
    assert [call.name for call in table if not call.callers or not call.source] == []


@pytest.mark.parametrize(("table", "codes"), [(HCALLS, HCode), (UCALLS, UCode)])
def test_errors_are_codes_of_their_space(table: CallTable, codes: type[HCode] | type[UCode]) -> None:
    assert [call.name for call in table for code in call.errors if not isinstance(code, codes)] == []


def test_registers_of_the_processor_come_before_the_arguments() -> None:
    assert ucalls.UV_ESMB_GET_FILE.describe([7, 64]) == "UV_ESMB_GET_FILE(pidr=7, offset=64)"
    assert [call.name for table in TABLES for call in table if call.hardware] == ["UV_ESMB_GET_FILE"]


def test_registers_fit_a_message() -> None:
    # A reflected hypercall carries lpid and vcpu before its arguments.
    assert [call.name for call in HCALLS if 2 + len(call.args) > 16 or 1 + len(call.results) > 16] == []


def test_the_unhandled_list_names_declared_calls_only() -> None:
    assert undeclared() == set()


def test_a_call_has_one_reason() -> None:
    names = list(itertools.chain.from_iterable(names_of(reason) for reason in Reason))

    assert len(names) == len(set(names)) == len(UNHANDLED)


def test_what_a_guest_needs_is_handled() -> None:
    assert {HCALLS.by_name[name].number for name in SERVED_HCALLS} == HANDLED_HCALLS
    assert not UNHANDLED.keys() & set(SERVED_HCALLS)


def test_every_ultracall_of_hypervisor_and_guest_is_handled() -> None:
    expected = {call.number for call in UCALLS if call.callers != {Caller.FIRMWARE}}

    assert expected == HANDLED_UCALLS


def test_a_call_describes_itself_with_its_arguments() -> None:
    assert (
        hcalls.H_PUT_TCE.describe([0x80000000, 0x1000, 0x2003])
        == "H_PUT_TCE(liobn=0x80000000, ioba=0x1000, tce=0x2003)"
    )


def test_a_bounded_buffer_states_its_bound() -> None:
    memory = hcalls.H_PUT_TCE_INDIRECT.args[2].memory

    assert memory == Memory(Direction.IN, "n_tces", 8, 512)


def test_optional_words_widen_what_fits() -> None:
    table = CallTable(Space.RTAS)
    call = table.declare(
        0x2000,
        "service",
        args=(Reg("a", Kind.WORD), Reg("b", Kind.WORD)),
        results=(Reg("c", Kind.WORD), Reg("d", Kind.WORD)),
        callers=(Caller.VM,),
        source="here",
        optional_args=1,
        optional_results=1,
    )

    fitting = [(n_args, n_rets) for n_args in range(5) for n_rets in range(5) if call.fits(n_args, n_rets)]

    assert fitting == [(1, 2), (1, 3), (2, 2), (2, 3)]


def test_a_guest_link_carries_every_guest_call_and_no_call_of_the_ultravisor() -> None:
    upward = links.KVM_GUEST.upward

    assert {HCALLS.by_name[name].number for name in ("H_PUT_TCE", "H_REGISTER_VPA", "H_CAS")} <= upward
    assert not {call.number for call in HCALLS if call.callers == {Caller.ULTRAVISOR}} & upward
