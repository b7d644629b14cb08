"""The RTAS table: tokens as the device tree gives them, shapes of argument blocks, who answers."""

from __future__ import annotations

import pytest

from protocol import rtas
from protocol.codes import RtasStatus
from protocol.declare import Space
from protocol.roles import Role
from protocol.rtas import MAX_BUFFER_BYTES, MAX_WORDS, RTAS, SERVED_BY, TOKEN_BASE, status_word
from protocol.unhandled import UNHANDLED

_SERVICES = """
    display-character get-time-of-day set-time-of-day power-off system-reboot query-cpu-stopped-state start-cpu
    stop-self ibm,get-system-parameter ibm,set-system-parameter ibm,set-xive ibm,get-xive ibm,int-off ibm,int-on
    check-exception event-scan ibm,set-tce-bypass quiesce nvram-fetch nvram-store read-pci-config write-pci-config
    ibm,read-pci-config ibm,write-pci-config ibm,query-interrupt-source-number ibm,change-msi set-indicator
    set-power-level get-power-level get-sensor-state ibm,configure-connector ibm,os-term ibm,set-eeh-option
    ibm,get-config-addr-info2 ibm,read-slot-reset-state2 ibm,set-slot-reset ibm,configure-pe ibm,slot-error-detail
    ibm,query-pe-dma-window ibm,create-pe-dma-window ibm,remove-pe-dma-window ibm,reset-pe-dma-window ibm,suspend-me
    ibm,nmi-register ibm,nmi-interlock
"""
SERVICES = _SERVICES.split()
OWN = {rtas.EXIT: "pefbox,exit"}


def test_tokens_are_numbered_as_in_the_device_tree() -> None:
    numbered = {TOKEN_BASE + n: name for n, name in enumerate(SERVICES)}

    assert {call.number: call.name for call in RTAS} == numbered | OWN


def test_every_service_is_served_by_one_process_or_listed_as_unhandled() -> None:
    served = {RTAS.by_number[token].name for token in SERVED_BY}
    unhandled = UNHANDLED.keys() & RTAS.by_name.keys()

    assert served | unhandled == {*SERVICES, *OWN.values()}
    assert not served & unhandled


def test_kvm_serves_the_interrupt_sources() -> None:
    by_kvm = {RTAS.by_number[token].name for token, role in SERVED_BY.items() if role is Role.KVM}

    assert by_kvm == {"ibm,set-xive", "ibm,get-xive", "ibm,int-off", "ibm,int-on"}


def test_every_block_fits_a_message() -> None:
    assert [call.name for call in RTAS if call.n_args + call.n_rets > MAX_WORDS] == []


def test_every_buffer_is_bounded() -> None:
    memories = [reg.memory for call in RTAS for reg in call.args if reg.memory is not None]

    assert memories
    assert {memory.max_count for memory in memories} == {MAX_BUFFER_BYTES}


@pytest.mark.parametrize(
    ("name", "n_args", "n_rets"),
    [
        ("ibm,set-xive", 3, 1),
        ("ibm,get-xive", 1, 3),
        ("ibm,read-pci-config", 4, 2),
        ("ibm,change-msi", 6, 4),
        ("ibm,query-pe-dma-window", 3, 5),
        ("get-time-of-day", 0, 8),
    ],
)
def test_a_service_has_the_shape_of_papr(name: str, n_args: int, n_rets: int) -> None:
    call = RTAS.by_name[name]

    assert (call.n_args, call.n_rets) == (n_args, n_rets)
    assert call.fits(n_args, n_rets)


def test_change_msi_may_leave_the_interrupt_type_out() -> None:
    call = RTAS.by_number[rtas.CHANGE_MSI]

    assert call.fits(6, 3)
    assert not call.fits(6, 2)


def test_a_negative_status_is_a_32_bit_word() -> None:
    assert status_word(RtasStatus.PARAMETER_ERROR) == 0xFFFFFFFD


def test_an_unknown_service_is_a_parameter_error() -> None:
    assert Space.RTAS.unknown is RtasStatus.PARAMETER_ERROR
