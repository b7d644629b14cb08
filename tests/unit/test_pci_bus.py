"""Configuration space, BAR sizing, decoding, and the host bridge's windows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.qemu.msix import MsixTable
from services.qemu.pci_bus import Bar, PciFunction, PciIdentity
from services.qemu.phb import MEM32_BUS, MsiSources, PciHostBridge
from services.qemu.testing import TestPort
from shared.interrupt_sources import MSI_BASE, SOURCES_END
from shared.pci import Command, Config, OfSpace, devfn_of


class Scratch:
    """A region that remembers what was stored."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.stored: list[tuple[int, int, int]] = []

    def load(self, offset: int, size_bytes: int) -> int:
        return offset

    def store(self, offset: int, size_bytes: int, value: int) -> None:
        self.stored.append((offset, size_bytes, value))


def plugged(slot: int = 2) -> tuple[PciHostBridge, PciFunction, dict[OfSpace, Scratch]]:
    bridge = PciHostBridge(TestPort())
    function = PciFunction(PciIdentity(0x1234, 0x5678, 0x010000, 1, 0x1AF4, 2))
    regions = {OfSpace.IO: Scratch(0x100), OfSpace.MEM32: Scratch(0x1000), OfSpace.MEM64: Scratch(1 << 32)}
    function.add_bar(Bar(0, OfSpace.IO, regions[OfSpace.IO]))
    function.add_bar(Bar(1, OfSpace.MEM32, regions[OfSpace.MEM32]))
    function.add_bar(Bar(2, OfSpace.MEM64, regions[OfSpace.MEM64], prefetchable=True))
    bridge.bus.plug(devfn_of(slot), function)
    return bridge, function, regions


def test_writing_ones_to_a_bar_gives_its_size() -> None:
    _, function, _ = plugged()
    for register in range(Config.BAR0, Config.BAR0 + 16, 4):
        function.write_config(register, 4, 0xFFFFFFFF)

    assert function.read_config(Config.BAR0, 4) == 0xFFFFFF01
    assert function.read_config(Config.BAR0 + 4, 4) == 0xFFFFF000
    assert function.read_config(Config.BAR0 + 8, 4) == 0x0000000C
    assert function.read_config(Config.BAR0 + 12, 4) == 0xFFFFFFFF


@given(st.integers(0, 255), st.sampled_from([1, 2, 4]), st.integers(0, 0xFFFFFFFF))
def test_no_write_changes_what_is_read_only(offset: int, size: int, value: int) -> None:
    _, function, _ = plugged()
    offset -= offset % size

    function.write_config(offset, size, value & (1 << size * 8) - 1)

    assert function.read_config(Config.VENDOR_ID, 4) == 0x56781234
    assert function.read_config(Config.REVISION, 4) == 0x01000001
    assert function.read_config(Config.BAR0, 1) & 3 == 1
    assert function.read_config(Config.BAR0 + 8, 1) & 0xF == 0xC


def test_an_unassigned_function_answers_nowhere() -> None:
    bridge, function, _ = plugged()
    function.write_config(Config.COMMAND, 2, Command.MEMORY | Command.IO)

    assert bridge.mmio_load(bridge.mem32.gpa, 4) is None
    assert bridge.mmio_load(bridge.io.gpa, 4) is None


def test_every_window_reaches_its_bar() -> None:
    bridge, function, regions = plugged()
    bridge.assign_bars()
    for bar in function.bars:
        gpa = bridge.gpa_of_bar(function, bar)
        assert gpa is not None
        assert bridge.mmio_load(gpa + 0x40, 4) == 0x40
        assert bridge.mmio_store(gpa + 0x44, 4, 0x1_0000_0007)
        assert regions[bar.space].stored == [(0x44, 4, 7)]


def test_windows_lie_where_qemu_puts_them() -> None:
    bridge, _, _ = plugged()

    assert bridge.buid == 0x800000020000000
    assert (bridge.io.gpa, bridge.mem32.gpa, bridge.mem64.gpa) == (0x200000000000, 0x200080000000, 0x210000000000)
    assert (bridge.mem32.bus, bridge.mem64.bus) == (0x80000000, 0x210000000000)


def test_decoding_follows_command_register_and_bar() -> None:
    bridge, function, _ = plugged()
    bridge.assign_bars()
    first = bridge.gpa_of_bar(function, function.bars[1])
    assert first is not None and bridge.mmio_load(first, 4) == 0

    function.write_config(Config.COMMAND, 2, 0)
    assert bridge.mmio_load(first, 4) is None

    function.write_config(Config.COMMAND, 2, Command.MEMORY)
    function.assign_bar(function.bars[1], MEM32_BUS + 0x100000)
    assert bridge.mmio_load(first, 4) is None
    assert bridge.mmio_load(bridge.mem32.gpa + 0x100000, 4) == 0


def test_an_access_that_leaves_the_region_or_is_unaligned_has_no_answer() -> None:
    bridge, function, _ = plugged()
    bridge.assign_bars()
    gpa = bridge.gpa_of_bar(function, function.bars[1])
    assert gpa is not None

    assert bridge.mmio_load(gpa + 0xFFC, 4) == 0xFFC
    assert bridge.mmio_load(gpa + 0xFFE, 4) is None
    assert bridge.mmio_load(gpa + 0x1000, 4) is None
    assert not bridge.mmio_store(0x1000, 4, 0)


@given(st.integers(0, (1 << 64) - 1), st.sampled_from([1, 2, 4, 8]))
def test_any_address_is_answered_or_refused(gpa: int, size: int) -> None:
    bridge, _, _ = plugged()
    bridge.assign_bars()

    value = bridge.mmio_load(gpa, size)

    assert value is None or gpa >= bridge.io.gpa


@pytest.mark.parametrize(("slot", "pin", "source"), [(0, 1, 0x1200), (1, 1, 0x1201), (3, 2, 0x1200), (5, 4, 0x1200)])
def test_pins_rotate_by_slot(slot: int, pin: int, source: int) -> None:
    assert PciHostBridge(TestPort()).lsi_source(devfn_of(slot), pin) == source


def test_a_shared_line_falls_when_the_last_function_lets_go() -> None:
    port = TestPort()
    bridge = PciHostBridge(port)
    functions = [PciFunction(PciIdentity(1, 1, 0, 0, 1, 1)) for _ in range(2)]
    for slot, function in zip((1, 5), functions, strict=True):
        bridge.bus.plug(devfn_of(slot), function)

    functions[0].set_intx(True)
    functions[1].set_intx(True)
    functions[0].set_intx(False)
    assert port.levels == {0x1201: True}
    functions[1].set_intx(False)

    assert port.levels == {0x1201: False}


def test_a_taken_slot_is_refused() -> None:
    bridge, function, _ = plugged(slot=4)

    with pytest.raises(ValueError, match="taken"):
        bridge.bus.plug(devfn_of(4), function)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 32)), max_size=60))
def test_message_sources_never_overlap(requests: list[tuple[int, int]]) -> None:
    sources = MsiSources(end=MSI_BASE + 128)
    for devfn, n in requests:
        if n == 0:
            sources.release(devfn)
        else:
            sources.allocate(devfn, n)

    taken = [source for block in sources.blocks.values() for source in block]
    assert len(taken) == len(set(taken))
    assert all(MSI_BASE <= source < SOURCES_END and sources.owned(source) for source in taken)


def test_message_sources_run_out() -> None:
    sources = MsiSources(end=MSI_BASE + 4)

    assert sources.allocate(1, 3) == range(MSI_BASE, MSI_BASE + 3)
    assert sources.allocate(2, 2) is None
    assert sources.allocate(1, 4) == range(MSI_BASE, MSI_BASE + 4)


@given(st.integers(0, 0xFFF), st.sampled_from([1, 2, 4, 8]), st.integers(0, (1 << 64) - 1))
def test_any_access_to_the_msix_bar_is_harmless(offset: int, size: int, value: int) -> None:
    sent: list[tuple[int, int]] = []
    table = MsixTable(2, lambda address, data: sent.append((address, data)))

    table.store(offset - offset % size, size, value & (1 << size * 8) - 1)

    assert 0 <= table.load(offset - offset % size, size) < 1 << size * 8
    assert not sent
