"""What a driver does about DMA, by design: which bits it takes from a device, and how its buffers reach it then.

`Rules` is the driver that knows nothing of secure VMs; each design departs from it in what it must. A design decides
in three places: `prepare` before the features are read, `choose` between features, `open` once they are settled.
"""

from __future__ import annotations

from protocol.codes import HCode
from protocol.hcalls import H_SET_DMA_BYPASS
from services.guest.model.cpu import Cpu, NoDevice, Step
from services.guest.model.state import Address, Bounce, DmaPath, KernelState, Phase, VirtioPci
from services.guest.model.swiotlb import SLOT_BYTES
from services.guest.model.virtio_pci import Transport
from services.guest.model.wide_window import WideWindows
from shared.dma_designs import DmaDesign
from shared.virtio import Feature, has_feature

PLATFORM = 1 << Feature.ACCESS_PLATFORM
NO_TRANSLATION = 1 << Feature.ACCESS_PLATFORM_NO_TRANSLATION
IDENTITY = 1 << Feature.ACCESS_PLATFORM_IDENTITY_ADDRESS
FULL_MASK_BITS = 64
"""What a driver can address unless the option `dma_mask` says less."""


class Rules:
    """`nothing`: no bit is taken, the device gets the address of the buffer itself."""

    has_pool = False
    """Whether a secure VM of this design has a swiotlb pool."""
    pool_at_top = False
    """Whether it lies above all that is allocated later."""
    rings_apart = False
    """Whether rings and command blocks lie apart from all that is allocated otherwise."""
    wants_identity: bool | None = None
    """Whether all of RAM is mapped through a dynamic window before devices are used: True at bus address 0 and
    nowhere else, False beside the 32-bit window, None not at all."""

    def __init__(self, cpu: Cpu, state: KernelState, wide: WideWindows) -> None:
        self._cpu = cpu
        self._state = state
        self._wide = wide

    @property
    def _secure(self) -> bool:
        return self._state.secure

    @property
    def reaches_window(self) -> bool:
        """Whether the drivers' devices can address a window beyond 32 bits."""
        return int(self._state.options.get("dma_mask", FULL_MASK_BITS)) >= FULL_MASK_BITS

    @property
    def gives_pages(self) -> bool:
        """Whether the balloon's driver gives pages to the host; the option `balloon_quirk` is its quirk."""
        return not (self._secure and self._state.options.get("balloon_quirk", True))

    def prepare(self, transport: Transport) -> Step[None]:
        """What comes before the features are read; raises NoDevice when the driver will not go on."""
        return
        yield

    def choose(self, offered: int) -> int:
        """Which of the bits about access to memory the driver takes; raises NoDevice when it will not go on."""
        return 0

    def open(self, pci: VirtioPci) -> Step[DmaPath]:
        """How buffers reach a device whose features are settled."""
        return DmaPath()
        yield

    def _bounced(self, address: Address, offset: int = 0) -> DmaPath:
        """As the DMA API does it: through shared slots in a secure VM."""
        bounce = Bounce.ALWAYS if self._secure else Bounce.NEVER
        return DmaPath(address=address, offset=offset, bounce=bounce, shares=self._secure)

    def _by_bit(self, pci: VirtioPci) -> DmaPath:
        """By the DMA API, and through the window when the device translates."""
        translates = has_feature(pci.features, Feature.ACCESS_PLATFORM)
        return self._bounced(Address.WINDOW if translates else Address.PHYSICAL)


class Firmware(Rules):
    """The boot stage: it takes ACCESS_PLATFORM where it is offered and bounces nothing, since the VM is normal.

    Its rings lie where no kernel comes up, so that what a disk writes late does not end there.
    """

    rings_apart = True

    def choose(self, offered: int) -> int:
        return 0 if self._state.old_firmware else offered & PLATFORM

    def open(self, pci: VirtioPci) -> Step[DmaPath]:
        return self._by_bit(pci)
        yield


class DmaApi(Rules):
    """The bit is taken where it is offered, and buffers go by the DMA API."""

    has_pool = True

    def choose(self, offered: int) -> int:
        return offered & PLATFORM

    def open(self, pci: VirtioPci) -> Step[DmaPath]:
        return self._by_bit(pci)
        yield


class Quirk(DmaApi):
    """The virtio core asks whether this is a secure VM, and uses the DMA API then."""


class IommuAlways(DmaApi):
    """Only devices that demand ACCESS_PLATFORM are driven."""

    def choose(self, offered: int) -> int:
        if not offered & PLATFORM:
            raise NoDevice(f"the device does not offer ACCESS_PLATFORM, which dma={self._state.dma_design} needs")
        return PLATFORM


class BypassProperty(IommuAlways):
    """Where the tree says so, a hypercall takes the device out of the IOMMU before it is started."""

    def open(self, pci: VirtioPci) -> Step[DmaPath]:
        if pci.config_addr not in self._state.machine.bypassable:
            return self._by_bit(pci)
        code, *_ = yield from self._cpu.hcall(H_SET_DMA_BYPASS, self._state.machine.buid, pci.config_addr, 1)
        return self._bounced(Address.PHYSICAL) if code == HCode.H_SUCCESS else self._by_bit(pci)


class NoTranslation(DmaApi):
    """The DMA API, for a device that promises not to translate; one without the promise gets addresses as they are."""

    def choose(self, offered: int) -> int:
        return NO_TRANSLATION if offered & NO_TRANSLATION else super().choose(offered)

    def open(self, pci: VirtioPci) -> Step[DmaPath]:
        return self._by_bit(pci) if pci.features & (NO_TRANSLATION | PLATFORM) else DmaPath()
        yield


class IdentityAddress(IommuAlways):
    """RAM is mapped to itself before any device starts, and the device is told so."""

    wants_identity = True

    def choose(self, offered: int) -> int:
        promised = offered & IDENTITY if self._wide.leads_to_itself else 0
        return super().choose(offered) | promised

    def open(self, pci: VirtioPci) -> Step[DmaPath]:
        return self._bounced(Address.PHYSICAL) if self._wide.leads_to_itself else self._by_bit(pci)
        yield


class DmaLimit(DmaApi):
    """Addresses that a device cannot reach are bounced, and what it can reach is all below a limit.

    The limit must let the pool be reached, wherever it lies; with it goes everything below.
    """

    pool_at_top = True

    def open(self, pci: VirtioPci) -> Step[DmaPath]:
        path = self._by_bit(pci)
        if path.bounce is Bounce.ALWAYS:
            path.bounce, path.limit = Bounce.ABOVE_LIMIT, self._limit
        return path
        yield

    @property
    def _limit(self) -> int:
        pool = self._state.pool
        return pool.base + pool.n_slots * SLOT_BYTES


class DdwIdentity(DmaApi):
    """All of RAM behind a 64-bit window, and slots of the pool given by their address in it.

    A device that cannot address the window gets its rings and buffers mapped one by one, neither shared nor bounced:
    Linux shares and bounces in the direct path alone.
    """

    wants_identity = False

    def open(self, pci: VirtioPci) -> Step[DmaPath]:
        if not pci.features & PLATFORM:
            return DmaPath()
        if self._state.wide.liobn:
            return self._bounced(Address.OFFSET, self._state.wide.base)
        return DmaPath(address=Address.WINDOW)
        yield


class RuntimeSwitch(DmaApi):
    """The device is found behind the IOMMU once the VM is secure, and driven as it offers itself."""

    def open(self, pci: VirtioPci) -> Step[DmaPath]:
        return self._by_bit(pci) if pci.features & PLATFORM else DmaPath()
        yield


class GuestPoke(RuntimeSwitch):
    """In a secure VM the driver puts the device behind the IOMMU itself, before it reads the features.

    The option `poke_unchecked` is a driver that does not look whether the device has such a register at all.
    """

    def prepare(self, transport: Transport) -> Step[None]:
        if not self._secure:
            return
        yield from transport.reset()
        behind = yield from transport.put_behind_iommu()
        if not behind and not self._unchecked:
            raise NoDevice("the device has no switch that puts it behind the IOMMU")

    def open(self, pci: VirtioPci) -> Step[DmaPath]:
        if self._secure and self._unchecked:
            return self._bounced(Address.WINDOW)
        return (yield from super().open(pci))

    @property
    def _unchecked(self) -> bool:
        return bool(self._state.options.get("poke_unchecked", False))


class ArchHook(DmaApi):
    """`arch_virtio_wants_dma_ops()`: the DMA API whatever the device offers, and with it the offset of the bus.

    The option `dma_offset` is that of the bus; 0 as on pseries.
    """

    def open(self, pci: VirtioPci) -> Step[DmaPath]:
        offset = int(self._state.options.get("dma_offset", 0))
        if pci.features & PLATFORM or not (self._secure and offset):
            return self._by_bit(pci)
        return self._bounced(Address.OFFSET, offset)
        yield


class OptionalPlatform(RuntimeSwitch):
    """The platform says that a secure VM takes the bit; a normal one leaves it."""

    def choose(self, offered: int) -> int:
        return super().choose(offered) if self._secure else 0


class RestrictedMemory(OptionalPlatform):
    """As above, and a secure VM does not go on with a device without the bit."""

    def choose(self, offered: int) -> int:
        if self._secure and not offered & PLATFORM:
            raise NoDevice("access to memory is restricted, and the device does not offer ACCESS_PLATFORM")
        return super().choose(offered)


_RULES: dict[DmaDesign, type[Rules]] = {
    DmaDesign.QUIRK: Quirk,
    DmaDesign.IOMMU_ALWAYS: IommuAlways,
    DmaDesign.BYPASS_PROPERTY: BypassProperty,
    DmaDesign.NO_TRANSLATION: NoTranslation,
    DmaDesign.IDENTITY_ADDRESS: IdentityAddress,
    DmaDesign.DMA_LIMIT: DmaLimit,
    DmaDesign.DMA_POOL: Quirk,
    DmaDesign.DDW_IDENTITY: DdwIdentity,
    DmaDesign.RUNTIME_SWITCH: RuntimeSwitch,
    DmaDesign.GUEST_POKE: GuestPoke,
    DmaDesign.ARCH_HOOK: ArchHook,
    DmaDesign.OPTIONAL_PLATFORM: OptionalPlatform,
    DmaDesign.RESTRICTED_MEMORY: RestrictedMemory,
    DmaDesign.NOTHING: Rules,
}


def rules_for(cpu: Cpu, state: KernelState, wide: WideWindows) -> Rules:
    """The rules of the boot stage before there is a kernel, then those of the kernel's design."""
    rules = Firmware if state.phase < Phase.KERNEL_IMAGE else _RULES[state.dma_design]
    return rules(cpu, state, wide)
