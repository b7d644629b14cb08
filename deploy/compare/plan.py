"""Which VMs a comparison runs, and what each is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from shared.dma_designs import DESIGNS, DmaDesign


class Workload(StrEnum):
    """What is timed and counted. `boot` is what it takes until the kernel is up, and needs no request of its own; `net`
    is timed alone, since a VM on a network has no clock that repeats, and counted in what was timed."""

    READ = "read"
    WRITE = "write"
    RANDREAD = "randread"
    NET = "net"
    BOOT = "boot"


@dataclass(frozen=True, slots=True)
class Requests:
    """A run of requests: a command of the guest's prompt, in which `{count}` stands for how many, and what it does."""

    words: str
    count: int
    title: str

    @property
    def command(self) -> str:
        """What is typed at the guest's prompt."""
        return self.with_count(self.count)

    def with_count(self, count: int) -> str:
        """As `command`, with so many requests."""
        return self.words.format(count=count)


PEER_MAC = "52:54:00:00:00:02"
"""The card that `net` talks to: of the VM that runs beside one that is timed."""
REQUESTS: dict[Workload, Requests] = {
    Workload.READ: Requests("io read 262144 8 {count}", 64, "reads of 256 KiB in order, 8 at a time"),
    Workload.WRITE: Requests("io write 65536 8 {count}", 64, "writes of 64 KiB in order, 8 at a time"),
    Workload.RANDREAD: Requests("io randread 4096 32 {count}", 512, "reads of 4 KiB at random, 32 at a time"),
    Workload.NET: Requests(
        f"blast {PEER_MAC} {{count}} 1400 8", 256, "echo requests of 1400 bytes to another VM, 8 at a time"
    ),
}
ROUND_NS = 300_000_000
"""A timed round is not shorter, where a command takes so many requests: what else the machine does is then a part of
every round."""
TIMED_ROUNDS = 5
"""How often each timed run is repeated; the median and the spread of these are reported."""


class Purpose(StrEnum):
    """Why a VM is run."""

    COUNT = "count"
    """The same in every run: time is counted in instructions."""
    TIME = "time"
    OLD_GUEST = "old guest"
    """A driver that knows nothing of secure VMs, on the devices of this design."""
    OLD_FIRMWARE = "old firmware"
    """A boot stage that does not know ACCESS_PLATFORM, on the devices of this design."""
    UNPATCHED = "unpatched guest"
    """A driver that takes ACCESS_PLATFORM and nothing newer, on the devices of this design."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One VM to run: `driver` is the design of its kernel, `design` that of everything around it."""

    design: DmaDesign
    purpose: Purpose
    secure: bool
    driver: DmaDesign
    workloads: tuple[Workload, ...] = ()
    ddw: bool = True
    """Whether the bridge makes dynamic DMA windows."""

    @property
    def time(self) -> str:
        """The VM's clock."""
        return "wall" if self.purpose is Purpose.TIME else "instructions"

    @property
    def title(self) -> str:
        """For the progress display."""
        return f"{self.design}, {'secure' if self.secure else 'normal'} VM, {self.purpose}"


BASELINE = DmaDesign.NOTHING
"""Its normal VM goes past the IOMMU: the counts of others are held against its counts."""


def trials_of(design: DmaDesign, kinds: tuple[bool, ...], workloads: tuple[Workload, ...]) -> list[Trial]:
    """What is run for one design; `kinds` says whether of a normal VM (False), a secure one (True), or both."""
    trials = [
        Trial(design, purpose, secure, design, workloads)
        for secure in kinds
        for purpose in (Purpose.COUNT, Purpose.TIME)
    ]
    if False in kinds:
        trials.append(Trial(design, Purpose.OLD_GUEST, False, DmaDesign.NOTHING))
        trials.append(Trial(design, Purpose.OLD_FIRMWARE, False, design))
        if DESIGNS[design].offer.bypass_switch:
            trials.append(Trial(design, Purpose.UNPATCHED, False, DmaDesign.IOMMU_ALWAYS, workloads))
    return trials


def plan(designs: tuple[DmaDesign, ...], kinds: tuple[bool, ...], workloads: tuple[Workload, ...]) -> list[Trial]:
    """Every trial, the baseline's first."""
    ordered = sorted(designs, key=lambda design: design is not BASELINE)
    return [trial for design in ordered for trial in trials_of(design, kinds, workloads)]
