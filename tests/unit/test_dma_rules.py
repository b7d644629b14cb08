"""What a driver of each DMA design takes from a device, and how its buffers reach it then: the outcome matrix."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest

from protocol.codes import HCode, UCode
from protocol.geometry import PAGE_BYTES
from protocol.hcalls import H_PUT_TCE, H_RTAS, H_SET_DMA_BYPASS
from protocol.ucalls import UV_SHARE_PAGE
from services.guest.exits import Hypercall, Pause, Ultracall
from services.guest.model.cpu import NoDevice
from services.guest.model.designs import IDENTITY, NO_TRANSLATION, PLATFORM, Rules, rules_for
from services.guest.model.dma import Dma
from services.guest.model.iommu import IoWindow
from services.guest.model.pages import PageAllocator
from services.guest.model.state import Address, Bounce, BusWindow, DmaPath, KernelState, Phase
from services.guest.model.swiotlb import SLOT_BYTES, Direction, Swiotlb
from services.guest.model.wide_window import WideWindows
from shared.dma_designs import DESIGNS, DmaDesign
from tests.unit.model_cpu import RAM_BYTES, make_cpu

DDW_BASE = 1 << 59
CONFIG_ADDR = 1 << 11
T = TypeVar("T")

DIRECT = DmaPath()
WINDOW = DmaPath(address=Address.WINDOW)
SLOT = DmaPath(bounce=Bounce.ALWAYS, shares=True)
SLOT_IN_WINDOW = DmaPath(address=Address.WINDOW, bounce=Bounce.ALWAYS, shares=True)


@dataclass
class Kernel:
    """A kernel of a design, with answers for its calls; `made` are the calls it made."""

    design: DmaDesign
    secure: bool

    def __post_init__(self) -> None:
        self.cpu = make_cpu()
        self.state = KernelState(phase=Phase.KERNEL_DISK, secure=self.secure, dma_design=self.design)
        self.cpu.machine = self.state.machine
        self.state.machine.memory_bytes = RAM_BYTES
        self.wide = WideWindows(self.cpu, self.state.machine, self.state.wide)
        self.answers: dict[int, list[int]] = {}
        self.made: list[int] = []

    @property
    def rules(self) -> Rules:
        return rules_for(self.cpu, self.state, self.wide)

    def run(self, step: Generator[Any, list[int], T]) -> T:
        """Run a step to its end."""
        try:
            exit_ = next(step)
            while True:
                result: list[int] = []
                if isinstance(exit_, Hypercall | Ultracall):
                    self.made.append(exit_.number)
                    result = self.answers.get(exit_.number, [HCode.H_SUCCESS])
                else:
                    assert exit_ is Pause.SLICE_END
                exit_ = step.send(result)
        except StopIteration as stop:
            value: T = stop.value
            return value

    def settle(self, offered: int) -> tuple[int, DmaPath]:
        """The bits taken of `offered`, and the path that follows."""
        rules, pci = self.rules, self.state.blk.pci
        pci.features, pci.config_addr = rules.choose(offered), CONFIG_ADDR
        return pci.features, self.run(rules.open(pci))


def offered_by(design: DmaDesign) -> int:
    """What a device of the design offers."""
    offer = DESIGNS[design].offer
    return (
        (PLATFORM if offer.access_platform != "no" else 0)
        | (NO_TRANSLATION if offer.no_translation else 0)
        | (IDENTITY if offer.identity_address else 0)
    )


@pytest.mark.parametrize(
    ("design", "offered", "taken", "normal", "secure"),
    [
        (DmaDesign.NOTHING, 0, 0, DIRECT, DIRECT),
        (DmaDesign.NOTHING, PLATFORM, 0, DIRECT, DIRECT),
        (DmaDesign.QUIRK, 0, 0, DIRECT, SLOT),
        (DmaDesign.QUIRK, PLATFORM, PLATFORM, WINDOW, SLOT_IN_WINDOW),
        (DmaDesign.IOMMU_ALWAYS, PLATFORM, PLATFORM, WINDOW, SLOT_IN_WINDOW),
        (DmaDesign.BYPASS_PROPERTY, PLATFORM, PLATFORM, WINDOW, SLOT_IN_WINDOW),
        (DmaDesign.NO_TRANSLATION, NO_TRANSLATION, NO_TRANSLATION, DIRECT, SLOT),
        (DmaDesign.NO_TRANSLATION, NO_TRANSLATION | PLATFORM, NO_TRANSLATION, DIRECT, SLOT),
        (DmaDesign.NO_TRANSLATION, PLATFORM, PLATFORM, WINDOW, SLOT_IN_WINDOW),
        (DmaDesign.NO_TRANSLATION, 0, 0, DIRECT, DIRECT),
        (DmaDesign.DMA_POOL, 0, 0, DIRECT, SLOT),
        (DmaDesign.DDW_IDENTITY, 0, 0, DIRECT, DIRECT),
        (DmaDesign.RUNTIME_SWITCH, 0, 0, DIRECT, DIRECT),
        (DmaDesign.RUNTIME_SWITCH, PLATFORM, PLATFORM, WINDOW, SLOT_IN_WINDOW),
        (DmaDesign.ARCH_HOOK, 0, 0, DIRECT, SLOT),
        (DmaDesign.IDENTITY_ADDRESS, PLATFORM | IDENTITY, PLATFORM, WINDOW, SLOT_IN_WINDOW),
    ],
)
def test_what_is_taken_and_where_it_leads(
    design: DmaDesign, offered: int, taken: int, normal: DmaPath, secure: DmaPath
) -> None:
    assert Kernel(design, secure=False).settle(offered) == (taken, normal)
    assert Kernel(design, secure=True).settle(offered) == (taken, secure)


def test_a_normal_vm_leaves_an_optional_bit_and_a_secure_one_takes_it() -> None:
    for design in (DmaDesign.OPTIONAL_PLATFORM, DmaDesign.RESTRICTED_MEMORY):
        assert Kernel(design, secure=False).settle(PLATFORM) == (0, DIRECT)
        assert Kernel(design, secure=True).settle(PLATFORM) == (PLATFORM, SLOT_IN_WINDOW)
    assert Kernel(DmaDesign.OPTIONAL_PLATFORM, secure=True).settle(0) == (0, DIRECT)


@pytest.mark.parametrize(
    ("design", "secure"),
    [(DmaDesign.IOMMU_ALWAYS, False), (DmaDesign.IOMMU_ALWAYS, True), (DmaDesign.RESTRICTED_MEMORY, True)],
)
def test_a_device_without_the_bit_is_refused_before_anything_is_accepted(design: DmaDesign, secure: bool) -> None:
    with pytest.raises(NoDevice, match="ACCESS_PLATFORM"):
        Kernel(design, secure=secure).settle(0)


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("answer", [HCode.H_SUCCESS, HCode.H_FUNCTION, HCode.H_UNSUPPORTED])
def test_a_named_device_is_taken_out_of_the_iommu_where_the_hypervisor_can(secure: bool, answer: HCode) -> None:
    kernel = Kernel(DmaDesign.BYPASS_PROPERTY, secure=secure)
    kernel.state.machine.bypassable = [CONFIG_ADDR]
    kernel.answers[H_SET_DMA_BYPASS.number] = [answer]

    _, path = kernel.settle(PLATFORM)

    assert kernel.made == [H_SET_DMA_BYPASS.number]
    assert path.address is (Address.PHYSICAL if answer == HCode.H_SUCCESS else Address.WINDOW)
    assert path.bounce is (Bounce.ALWAYS if secure else Bounce.NEVER)


def test_a_slot_has_its_address_plus_the_base_of_the_64_bit_window() -> None:
    """The example of the discussion: slot 0x1234000 is bus address 0x0800000001234000."""
    kernel = Kernel(DmaDesign.DDW_IDENTITY, secure=True)
    kernel.state.wide.liobn, kernel.state.wide.base = 0x80000001, DDW_BASE
    _, path = kernel.settle(PLATFORM)
    assert path == DmaPath(address=Address.OFFSET, offset=DDW_BASE, bounce=Bounce.ALWAYS, shares=True)
    assert path.offset + 0x1234000 == 0x0800000001234000


def test_without_the_window_private_pages_are_mapped_rings_and_all() -> None:
    assert Kernel(DmaDesign.DDW_IDENTITY, secure=True).settle(PLATFORM) == (PLATFORM, WINDOW)


@pytest.mark.parametrize(("mask", "reaches"), [(64, True), (32, False), (40, False)])
def test_a_driver_with_a_narrow_mask_does_not_reach_the_64_bit_window(mask: int, reaches: bool) -> None:
    kernel = Kernel(DmaDesign.DDW_IDENTITY, secure=True)
    kernel.state.options = {"dma_mask": mask}
    assert kernel.rules.reaches_window is reaches


@pytest.mark.parametrize(("offset", "secure"), [(0, True), (0x4000_0000, True), (0x4000_0000, False)])
def test_the_hook_of_the_architecture_adds_the_offset_of_the_bus(offset: int, secure: bool) -> None:
    kernel, quirk = Kernel(DmaDesign.ARCH_HOOK, secure=secure), Kernel(DmaDesign.QUIRK, secure=secure)
    kernel.state.options = {"dma_offset": offset}
    _, path = kernel.settle(0)
    if not offset or not secure:
        assert path == quirk.settle(0)[1]
    else:
        assert (path.address, path.offset) == (Address.OFFSET, offset)


def test_a_promise_is_given_only_when_ram_is_mapped_to_itself() -> None:
    kernel = Kernel(DmaDesign.IDENTITY_ADDRESS, secure=True)
    kernel.state.wide.liobn, kernel.state.wide.base = 0x80000000, 0
    assert kernel.settle(PLATFORM | IDENTITY) == (PLATFORM | IDENTITY, SLOT)
    assert kernel.settle(PLATFORM) == (PLATFORM, SLOT)


def test_old_firmware_takes_nothing_and_other_firmware_takes_the_bit() -> None:
    for old, taken in ((True, 0), (False, PLATFORM)):
        kernel = Kernel(DmaDesign.QUIRK, secure=False)
        kernel.state.phase, kernel.state.old_firmware = Phase.BOOT_DISK, old
        assert kernel.settle(PLATFORM)[0] == taken


@pytest.mark.parametrize("design", DmaDesign)
def test_a_secure_vm_with_what_its_design_wants_shares_its_rings_or_is_one_of_those_that_fail(
    design: DmaDesign,
) -> None:
    kernel = Kernel(design, secure=True)
    kernel.state.wide.liobn, kernel.state.wide.base = 0x80000001, DDW_BASE
    offered = offered_by(design) | (PLATFORM if design in (DmaDesign.RUNTIME_SWITCH, DmaDesign.GUEST_POKE) else 0)
    _, path = kernel.settle(offered)
    assert path.shares is (design is not DmaDesign.NOTHING)


# -- from a path to an address -------------------------------------------------------------------------------------


class Mapper(Kernel):
    """A kernel with pool and DMA layer; pages of its RAM from BUFFER on are buffers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pages = PageAllocator(self.cpu, self.state.pages)
        self.pages.set_up(RAM_BYTES, [])
        self.pool = Swiotlb(self.cpu, self.state.pool)
        self.pool.set_up(self.pages, 1, 1)
        self.window = IoWindow(self.cpu, self.state.window)
        self.window.set_up(self.pages, BusWindow(n_bytes=1 << 30))
        self.dma = Dma(self.cpu, self.pages, self.pool, self.window)

    def address(self, path: DmaPath, gpa: int) -> int:
        mapping = self.run(self.dma.map(path, gpa, 100, Direction.TO_DEVICE))
        assert mapping is not None
        address = mapping.addr
        self.run(self.dma.unmap(mapping, 0))
        return address


def test_each_path_gives_its_address() -> None:
    kernel = Mapper(DmaDesign.QUIRK, secure=True)
    gpa = kernel.pages.must_alloc(1)
    pool = kernel.state.pool.base
    assert kernel.address(DIRECT, gpa + 8) == gpa + 8
    assert pool <= kernel.address(SLOT, gpa) < pool + 512 * SLOT_BYTES
    with_offset = DmaPath(address=Address.OFFSET, offset=DDW_BASE, bounce=Bounce.ALWAYS, shares=True)
    assert kernel.address(with_offset, gpa) - DDW_BASE in range(pool, pool + 512 * SLOT_BYTES)
    assert not kernel.made
    assert kernel.address(WINDOW, gpa + 0x123) % 4096 == 0x123
    assert kernel.made[0] == H_PUT_TCE.number


def test_a_limit_bounces_what_is_above_it_and_nothing_below() -> None:
    kernel = Mapper(DmaDesign.DMA_LIMIT, secure=True)
    gpa = kernel.pages.must_alloc(1)
    limited = DmaPath(bounce=Bounce.ABOVE_LIMIT, limit=gpa + 100, shares=True)
    assert kernel.address(limited, gpa) == gpa
    assert kernel.address(limited, gpa + 1) >= kernel.state.pool.base
    assert kernel.settle(0)[1].limit == kernel.state.pool.base + 512 * SLOT_BYTES


@pytest.mark.parametrize(("path", "shared"), [(DIRECT, False), (SLOT, True), (WINDOW, False), (SLOT_IN_WINDOW, True)])
def test_rings_are_shared_before_the_device_is_told_of_them_where_the_path_says_so(path: DmaPath, shared: bool) -> None:
    kernel = Mapper(DmaDesign.QUIRK, secure=shared)
    kernel.answers[UV_SHARE_PAGE.number] = [UCode.U_SUCCESS]
    gpa = kernel.dma.alloc_coherent()
    addr = kernel.run(kernel.dma.open_coherent(path, gpa))
    assert (UV_SHARE_PAGE.number in kernel.made) is shared
    assert (addr == gpa) is (path.address is Address.PHYSICAL)
    assert kernel.cpu.load(gpa, PAGE_BYTES) == bytes(PAGE_BYTES)


# -- the dynamic window -------------------------------------------------------------------------------------


def test_a_machine_without_dynamic_windows_has_none() -> None:
    kernel = Kernel(DmaDesign.DDW_IDENTITY, secure=True)
    step = kernel.wide.work(CONFIG_ADDR, at_zero=False)
    assert step is not None
    kernel.run(step)
    assert (kernel.state.wide.tried, kernel.state.wide.liobn) == (True, 0)
    assert H_RTAS.number not in kernel.made
    assert kernel.wide.work(CONFIG_ADDR, at_zero=False) is None
    assert not kernel.wide.leads_to_itself
