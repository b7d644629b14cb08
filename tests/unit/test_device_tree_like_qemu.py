"""Our device tree is QEMU's of the same machine, but for the differences listed here, each with its reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from protocol.hcalls import HCALLS
from protocol.unhandled import UNHANDLED
from services.qemu.device_tree import HYPERTAS
from tests.needs import need_program
from tests.unit.qemu_tree import PROGRAM, Tree, committed_tree, installed_tree, our_tree

PHB = "/pci@800000020000000"
CPU = "/cpus/PowerPC,POWER9@0"
CARD, CONSOLE, BALLOON = f"{PHB}/ethernet@2", f"{PHB}/communication-controller@4", f"{PHB}/legacy-device@6"
DEVICES = (f"{PHB}/scsi@1", CARD, f"{PHB}/legacy-device@3", CONSOLE, f"{PHB}/legacy-device@5", BALLOON)

_HOTPLUG = "nothing can be added to a running machine, so nothing has a connector"
_LISTS_OF_CONNECTORS = ("ibm,drc-types", "ibm,drc-names", "ibm,drc-power-domains", "ibm,drc-indexes")
_NO_SCM = "there is no storage class memory"

QEMU_ALONE: dict[tuple[str, str], str] = {
    **{(path, name): _HOTPLUG for path in ("/", "/cpus", PHB) for name in _LISTS_OF_CONNECTORS},
    **{(path, "ibm,my-drc-index"): _HOTPLUG for path in (CPU, PHB, *DEVICES)},
    (CPU, "ibm,pft-size"): "there is no hashed page table",
    **{("/chosen", f"qemu,graphic-{what}"): "there is no display" for what in ("width", "height", "depth")},
    ("/chosen", "rng-seed"): "the same start gives the same run; a seed that the host knows is none for a secure VM",
    **{("/ibm,persistent-memory", name): _NO_SCM for name in ("", "device_type", "#address-cells", "#size-cells")},
    **{("/rtas", name): "no process answers it: protocol/unhandled.py" for name in UNHANDLED},
}
OURS_ALONE: dict[tuple[str, str], str] = {
    ("/hypervisor", ""): "QEMU has this node when it runs on KVM, as here",
    ("/hypervisor", "compatible"): "QEMU has this node when it runs on KVM, as here",
    (BALLOON, "ibm,req#msi-x"): "QEMU's balloon has the interrupt line alone; every function here has messages",
}
OTHER_VALUE: dict[tuple[str, str], str] = {
    ("/", "model"): "it is not QEMU",
    ("/chosen", "ibm,arch-vec-5-platform-support"): "radix alone, as KVM says of a radix guest; QEMU's TCG has both",
    ("/rtas", "ibm,hypertas-functions"): "groups of calls that no process answers are not offered",
    ("/rtas", "rtas-size"): "the 20 bytes that an ESM blob measures; QEMU's has a log for machine checks behind them",
    (PHB, "ibm,ddw-extensions"): "no window is so large that its size takes two words",
    **{(path, "ibm,loc-code"): "it is not QEMU" for path in DEVICES},
    (CARD, "ibm,req#msi-x"): "a message for each queue and one more, and there is no control queue",
    (CONSOLE, "ibm,req#msi-x"): "a message for each queue and one more; QEMU's queues share one",
    (BALLOON, "reg"): "the BAR of the messages",
}

GROUPS: dict[str, frozenset[str]] = {
    "hcall-pft": frozenset({"H_ENTER", "H_REMOVE", "H_READ", "H_PROTECT"}),
    "hcall-term": frozenset({"H_GET_TERM_CHAR", "H_PUT_TERM_CHAR"}),
    "hcall-dabr": frozenset({"H_SET_DABR"}),
    "hcall-interrupt": frozenset({"H_EOI", "H_CPPR", "H_IPI", "H_XIRR"}),
    "hcall-tce": frozenset({"H_GET_TCE", "H_PUT_TCE"}),
    "hcall-vio": frozenset({"H_VIO_SIGNAL"}),
    "hcall-splpar": frozenset({"H_REGISTER_VPA", "H_CEDE", "H_CONFER", "H_PROD"}),
    "hcall-join": frozenset({"H_JOIN"}),
    "hcall-bulk": frozenset({"H_BULK_REMOVE"}),
    "hcall-set-mode": frozenset({"H_SET_MODE"}),
    "hcall-sprg0": frozenset({"H_SET_SPRG0"}),
    "hcall-copy": frozenset({"H_PAGE_INIT"}),
    "hcall-debug": frozenset({"H_LOGICAL_CI_LOAD", "H_LOGICAL_CI_STORE"}),
    "hcall-vphn": frozenset({"H_HOME_NODE_ASSOCIATIVITY"}),
    "hcall-multi-tce": frozenset({"H_PUT_TCE_INDIRECT", "H_STUFF_TCE"}),
    "hcall-hpt-resize": frozenset({"H_RESIZE_HPT_PREPARE", "H_RESIZE_HPT_COMMIT"}),
    "hcall-watchdog": frozenset({"H_WATCHDOG"}),
}
"""The calls that a guest expects by the name of a group."""
OFFERED_WITHOUT_CALLS = {"hcall-vio": "the virtual I/O bus is there, without a device that signals"}


def installed() -> Tree:
    need_program(PROGRAM, "qemu-system-ppc")
    return installed_tree()


@pytest.mark.parametrize("yardstick", [committed_tree, installed], ids=["committed", "installed"])
def test_the_tree_is_qemu_s_but_for_the_differences_listed(yardstick: Callable[[], Tree]) -> None:
    ours, qemu = our_tree(), yardstick()

    assert qemu.keys() - ours.keys() == QEMU_ALONE.keys() & qemu.keys()
    assert ours.keys() - qemu.keys() == OURS_ALONE.keys()
    assert {key for key in ours.keys() & qemu.keys() if ours[key] != qemu[key]} == OTHER_VALUE.keys()


def test_no_listed_difference_is_gone() -> None:
    rtas = {("/rtas", name) for name in UNHANDLED}

    assert QEMU_ALONE.keys() - rtas <= committed_tree().keys()


def test_both_trees_offer_the_same_groups_but_those_without_an_answer() -> None:
    key = ("/rtas", "ibm,hypertas-functions")
    ours, qemu = our_tree()[key], committed_tree()[key]
    assert ours is not None and qemu is not None

    unanswered = {group for group, calls in GROUPS.items() if calls & UNHANDLED.keys()} - OFFERED_WITHOUT_CALLS.keys()

    assert set(qemu) == GROUPS.keys()
    assert [group for group in qemu if group not in unanswered] == ours == list(HYPERTAS)
    assert all(calls <= HCALLS.by_name.keys() for calls in GROUPS.values())
