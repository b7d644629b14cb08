"""The kernel's whole state at a safe point: Structs without page content. Everything bulky lies in guest RAM.

`KernelState` is what `ModelEngine.save` writes. A Struct holds numbers, names and short texts; tables, buffers, rings
and secrets are named here by their guest physical address only.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum

import msgspec

from shared.dma_designs import DmaDesign

STATE_VERSION = 7
MAX_STATE_BYTES = 64 * 1024


class Phase(IntEnum):
    """How far the kernel is. A phase ends in one step; waiting for a device keeps it."""

    OFF = 0
    BOOT_TREE = 1
    BOOT_BUS = 2
    BOOT_DISK = 3
    BOOT_TABLE = 4
    BOOT_HEADER = 5
    BOOT_LOAD = 6
    BOOT_DEMO = 7
    BOOT_ENTER = 8
    KERNEL_IMAGE = 10
    KERNEL_POOL = 11
    KERNEL_SHARE = 12
    KERNEL_WINDOW = 13
    KERNEL_BUS = 14
    KERNEL_DMA = 15
    KERNEL_DISK = 16
    KERNEL_DEVICES = 17
    KERNEL_TABLE = 18
    RUN = 20
    HALTED = 30


class Workload(StrEnum):
    """What the kernel runs when it is up."""

    PROMPT = "prompt"
    DEMO = "demo"
    DISK = "disk"
    IDLE = "idle"


class Address(IntEnum):
    """What a device is given for a guest address."""

    PHYSICAL = 0
    """The address itself."""
    WINDOW = 1
    """A bus address of the 32-bit window, mapped for the occasion."""
    OFFSET = 2
    """The address plus an offset."""


class Bounce(IntEnum):
    """Which buffers go through swiotlb slots."""

    NEVER = 0
    ALWAYS = 1
    ABOVE_LIMIT = 2


class Owner(IntEnum):
    """Who gets the outcome of a disk request."""

    NONE = 0
    BULK = 1
    WRITER = 2
    DISK = 3
    IO_RUN = 4


class Struct(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Base of the state Structs."""


class BusWindow(Struct):
    """A DMA window as the device tree names it: table, first bus address, length (0 when there is none)."""

    liobn: int = 0
    base: int = 0
    n_bytes: int = 0


class Machine(Struct):
    """What the device tree and the bus told."""

    memory_bytes: int = 0
    fdt: int = 0
    fdt_bytes: int = 0
    reserved: list[tuple[int, int]] = []
    """Ranges (gpa, bytes) that the allocator leaves alone."""
    kernel: int = 0
    kernel_bytes: int = 0
    initrd: int = 0
    initrd_bytes: int = 0
    boot_args: str = ""
    rtas_base: int = 0
    rtas_tokens: dict[str, int] = {}
    console_unit: int = 0
    console_irq: int = 0
    has_bridge: bool = False
    buid: int = 0
    window: BusWindow = msgspec.field(default_factory=BusWindow)
    """That of the bridge, for every function that has none of its own."""
    own_windows: dict[int, BusWindow] = {}
    """Those of functions, by configuration address."""
    mmio: list[tuple[int, int, int]] = []
    """Memory windows of the bridge: (PCI address, gpa, bytes)."""
    functions: list[tuple[int, int, int]] = []
    """What is on the bus: configuration address, vendor, device."""
    next_bar: list[int] = []
    """Where the boot stage puts the next BAR, for each entry of `mmio` in the order of PCI addresses."""
    bypassable: list[int] = []
    """Configuration addresses of the functions that the tree says the IOMMU can be taken away from."""


class Calls(Struct):
    """Calls made so far, by name; loads and stores of device registers are MMIO_LOAD and MMIO_STORE."""

    counts: dict[str, int] = {}
    busy_rounds: int = 0
    """Times in a row that the current step found its call busy."""


class Pages(Struct):
    """The page allocator: a byte a page at `table`."""

    table: int = 0
    n_pages: int = 0
    hint: int = 0
    n_free: int = 0


class Pool(Struct):
    """The swiotlb pool; its tables are in guest RAM."""

    base: int = 0
    n_slots: int = 0
    n_areas: int = 1
    list_table: int = 0
    orig_table: int = 0
    size_table: int = 0
    area_table: int = 0
    shared_pages: int = 0
    """Pages already shared; the pool is usable when all are."""
    bytes_bounced: int = 0
    n_full: int = 0


class Window(Struct):
    """The IO pages of a DMA window under this kernel's care: a byte a page at `table`."""

    liobn: int = 0
    base: int = 0
    table: int = 0
    n_io_pages: int = 0
    hint: int = 1


class WideWindow(Struct):
    """The dynamic DMA window through which all of RAM is mapped: `liobn` is 0 when there is none."""

    tried: bool = False
    liobn: int = 0
    base: int = 0
    page_shift: int = 0
    n_mapped: int = 0
    """Its first so many entries lead to RAM."""


class DmaPath(Struct):
    """How the buffers of one device reach it."""

    address: Address = Address.PHYSICAL
    offset: int = 0
    bounce: Bounce = Bounce.NEVER
    limit: int = 0
    """With ABOVE_LIMIT: the first address that is bounced."""
    shares: bool = False
    """Whether rings and command blocks are shared with the host before the device is told of them."""


class Mapping(Struct, array_like=True):
    """A streaming DMA mapping."""

    addr: int
    """What the device is given."""
    orig: int
    n_bytes: int
    direction: int
    slot: int = 0
    """gpa of the bounce slot, 0 when there is none."""
    n_io_pages: int = 0


class DmaPage(Struct, array_like=True):
    """A page for rings and command blocks."""

    gpa: int = 0
    """0 until it is allocated."""
    addr: int = 0
    """What the device is given for it; 0 while no way leads to it."""


class Request(Struct, array_like=True):
    """A disk request in flight."""

    owner: int
    cookie: int
    kind: int
    mapping: Mapping | None
    submitted_ns: int


class Queue(Struct):
    """One split virtqueue: addresses and the driver's private shadow of what the device must not change."""

    index: int = 0
    size: int = 0
    desc: int = 0
    avail: int = 0
    used: int = 0
    desc_addr: int = 0
    avail_addr: int = 0
    used_addr: int = 0
    notify_gpa: int = 0
    event_idx: bool = False
    indirect: bool = False
    avail_idx: int = 0
    kicked_idx: int = 0
    last_used: int = 0
    free: list[int] = []
    chains: dict[int, list[int]] = {}
    """Head -> the descriptors of its chain."""
    writable: dict[int, int] = {}
    """Head -> how many bytes the device may write to it."""
    armed: bool = True
    """Whether the device was asked to interrupt at the next used entry."""
    broken: str = ""


class VirtioPci(Struct):
    """One virtio function and where its regions lie."""

    config_addr: int = 0
    device_type: int = 0
    common: int = 0
    notify: int = 0
    notify_bytes: int = 0
    notify_multiplier: int = 0
    device: int = 0
    device_bytes: int = 0
    msix_cap: int = 0
    features: int = 0
    path: DmaPath = msgspec.field(default_factory=DmaPath)
    irq: int = 0
    reset_rounds: int = 0


class ExtraDevice(Struct):
    """What the kernel knows of a device beside the disk."""

    present: bool = False
    ready: bool = False
    error: str = ""
    calls: bool = False
    """Whether it interrupted, and the driver has not looked yet."""
    submitted_ns: int = 0
    """When the request was made that is still unanswered; 0 when there is none."""


class VirtioExtra(ExtraDevice):
    """One that is a virtio device."""

    pci: VirtioPci = msgspec.field(default_factory=VirtioPci)
    ring: DmaPage = msgspec.field(default_factory=DmaPage)


class Rng(VirtioExtra):
    """The virtio entropy driver."""

    queue: Queue = msgspec.field(default_factory=Queue)
    mapping: Mapping | None = None
    n_written: int = -1
    """Bytes that the last request brought; -1 while it is open."""
    buffer: int = 0
    n_asked: int = 0
    """Bytes that somebody at the prompt waits for."""


class Edu(ExtraDevice):
    """One educational device."""

    config_addr: int = 0
    bar: int = 0
    irq: int = 0
    window: Window = msgspec.field(default_factory=Window)
    """Its own, where it has one."""
    to_ram: bool = False
    """Which way the transfer goes that it was asked for last."""


class EduCopy(Struct):
    """A copy through the buffer of an edu: how far it is, and where its two buffers are."""

    n_bytes: int = 0
    """Nothing is copied when 0."""
    device: int = 0
    mapper: int = 0
    """Through whose window the buffers are mapped."""
    stage: int = 0
    pages: list[int] = []
    addresses: list[int] = []
    """What the device was given for each of them."""
    mapping: Mapping | None = None
    error: str = ""


class Vfio(Struct):
    """A device lent to a process: how far that is, the process's pages, and what it saw."""

    stage: int = 0
    refusal: str = ""
    error: str = ""
    pages: list[int] = []
    """Ring, buffer, and a page that is none of the process's."""
    mapped: list[int] = []
    """Those of them that VFIO mapped."""
    queue: Queue = msgspec.field(default_factory=Queue)
    taken: int = 0
    """Which ways to memory the process's driver took."""
    asked_ns: int = 0
    n_overwritten: int = 0
    after: str = ""
    """The first bytes of the page that is not its own, in the end."""


class Balloon(VirtioExtra):
    """The virtio balloon driver; pages are those of the allocator, 64 KiB."""

    inflate: Queue = msgspec.field(default_factory=Queue)
    deflate: Queue = msgspec.field(default_factory=Queue)
    target: int = 0
    """Pages that the host wants in the balloon."""
    n_pages: int = 0
    """Those that are in it, as the device was told."""
    asked: list[int] = []
    """gpa of the pages that the last request is about; empty when it is settled."""
    inflating: bool = False
    """Whether they go in."""
    answered: bool = False
    """Whether the device has taken note of them."""
    emptied: bool = False
    """Whether the device was reset, and with it the balloon, since the kernel has looked."""
    refused: int = 0
    """The target that cannot be followed, as was said."""
    unsaid: str = ""
    """Why the device was given up, until it is said."""


class Net(VirtioExtra):
    """The virtio network driver."""

    mac: bytes = b""
    mtu: int = 0
    mergeable: bool = False
    """Whether a packet may lie in several receive buffers."""
    receive: Queue = msgspec.field(default_factory=Queue)
    transmit: Queue = msgspec.field(default_factory=Queue)
    buffers: int = 0
    """gpa of the receive buffers."""
    slots: int = 0
    """gpa of the transmit slots, `slot_bytes` each."""
    slot_bytes: int = 0
    assembly: int = 0
    """gpa where a frame out of several buffers is put together."""
    idle_buffers: list[int] = []
    receiving: dict[int, tuple[int, Mapping]] = {}
    """Head -> (receive buffer, its mapping)."""
    free_slots: list[int] = []
    queued: list[tuple[int, int]] = []
    """Slots that the device was not told of yet: (slot, bytes)."""
    sending: dict[int, tuple[int, Mapping]] = {}
    """Head -> (transmit slot, its mapping)."""
    stale: list[Mapping] = []
    """Mappings of a former start, to be taken from the device."""
    parts_left: int = 0
    """Buffers to come of the packet that is being received."""
    part_bytes: int = 0
    """Bytes of its frame so far."""
    retry_ns: int = 0
    """Nothing is mapped before this time, as the pool or the window was full."""
    frames_in: int = 0
    bytes_in: int = 0
    frames_out: int = 0
    bytes_out: int = 0
    dropped: dict[str, int] = {}
    """Frames by why they were dropped."""


class Blk(Struct):
    """The virtio block driver."""

    present: bool = False
    ready: bool = False
    error: str = ""
    pci: VirtioPci = msgspec.field(default_factory=VirtioPci)
    queue: Queue = msgspec.field(default_factory=Queue)
    ring: DmaPage = msgspec.field(default_factory=DmaPage)
    commands: DmaPage = msgspec.field(default_factory=DmaPage)
    sectors: int = 0
    max_segment_bytes: int = 0
    read_only: bool = False
    flush: bool = False
    discard: bool = False
    write_zeroes: bool = False
    requests: dict[int, Request] = {}
    """By head."""
    requeued: int = 0
    no_room_ns: int = 0
    """Since when no request found room; 0 when the last one did."""
    poll_until_ns: int = 0
    """Until then the driver looks at the ring itself before it asks for an interrupt."""


class Bulk(Struct):
    """A sequential read: chunk i goes to buffer i modulo `n_buffers`; consumed in order."""

    active: bool = False
    first_sector: int = 0
    n_bytes: int = 0
    chunk_bytes: int = 0
    buffers: int = 0
    n_buffers: int = 0
    issued: int = 0
    done: int = 0
    """Bit i of it: chunk `consumed + i` has arrived."""
    consumed: int = 0
    in_flight: int = 0
    draining: bool = False
    """Nothing more is issued; the read begins again when all that is in flight has come."""
    error: str = ""


class DiskHash(Struct):
    """SHA-256 of a range of the disk. The running digest is a cache outside the state, see `disk_hash`."""

    active: bool = False
    asked: bool = False
    """A person waits for the answer."""
    position: int = 0
    """Bytes consumed."""
    result: str = ""
    error: str = ""
    cached: bool = False
    """Every byte read stays in guest RAM."""
    n_pages: int = 0
    restarts: int = 0


class Partitions(Struct):
    """What the partition table says, in sectors (first, count)."""

    read: bool = False
    boot: tuple[int, int] = (0, 0)
    scratch: tuple[int, int] = (0, 0)


class Boot(Struct):
    """The boot stage: files still to be read, as (disk byte, gpa, bytes), and where they go."""

    probed: bool = False
    n_assigned: int = 0
    """Functions that have their addresses."""
    loads: list[tuple[int, int, int]] = []
    loading: bool = False
    command_line: tuple[int, int] = (0, 0)
    """gpa and length of the command line that was read; length 0 when there is none."""
    left_buffer: int = 0
    n_left: int = 0
    """Reads that the disk is left with on purpose, and where they go."""
    n_asked: int = 0
    """Devices beside the disk that were asked what they offer."""
    asked: VirtioPci = msgspec.field(default_factory=VirtioPci)
    """The one that is being asked."""
    demanding: list[int] = []
    """Configuration addresses of those that offer ACCESS_PLATFORM."""


class Console(Struct):
    """The terminal: what is still to be written, the line being typed, lines not yet obeyed."""

    out: bytes = b""
    dropped: int = 0
    line: str = ""
    lines: list[str] = []
    next_poll_ns: int = 0
    hold_until_ns: int = 0
    check: bool = True


class Writer(Struct):
    """A region write followed by a flush: stage 0 idle, 1 to write, 2 writing, 3 to flush, 4 flushing, 5 done."""

    stage: int = 0
    asked: bool = False
    kind: int = 1
    """The request type: OUT, DISCARD, WRITE_ZEROES; or GET_ID, which writes nothing."""
    sector: int = 0
    n_bytes: int = 0
    buffer: int = 0
    sha256: str = ""
    generation: int = 0
    error: str = ""


class Demo(Struct):
    """The demo workload: its stage, and the page of its secrets."""

    stage: int = 0
    secrets: int = 0
    shared_page: int = 0


class Tally(Struct):
    """What a measured run of requests costs."""

    times: int = 0
    """u32 nanoseconds a request, in guest RAM."""
    n_done: int = 0
    began_ns: int = 0
    ended_ns: int = 0
    calls_before: dict[str, int] = {}
    """Calls made before the run, by name."""
    bounced_before: int = 0
    calls: dict[str, int] = {}
    """Those of the run, once it is over."""
    bounced_bytes: int = 0


class IoRun(Struct):
    """A measured run of disk requests; `count` is 0 when there is none."""

    kind: str = ""
    first_sector: int = 0
    n_blocks: int = 0
    block_bytes: int = 0
    depth: int = 0
    count: int = 0
    buffers: int = 0
    n_buffer_pages: int = 0
    n_issued: int = 0
    random: int = 1
    free: list[int] = []
    """Buffers in no request."""
    submitted: dict[int, int] = {}
    """Buffer -> when its request was submitted."""
    tally: Tally = msgspec.field(default_factory=Tally)
    error: str = ""


class NetRun(Struct):
    """A measured run of echo requests; `count` is 0 when there is none."""

    ping: bool = False
    peer: bytes = b""
    payload_bytes: int = 0
    depth: int = 0
    count: int = 0
    n_issued: int = 0
    n_lost: int = 0
    sequence: int = 0
    """Of the last request; it goes on from run to run, so that a late reply is none of this run's."""
    open: dict[int, int] = {}
    """Sequence number -> when its request was made."""
    heard_ns: int = 0
    """When the run began or the last reply came."""
    tally: Tally = msgspec.field(default_factory=Tally)
    error: str = ""


class NullCalls(Struct):
    """A run of null hypercalls; their times (u32, ns) lie in guest RAM at `times`."""

    n_calls: int = 0
    n_done: int = 0
    times: int = 0


class DiskLoad(Struct):
    """The disk workload: random blocks of the scratch partition, checksums in guest RAM."""

    started: bool = False
    table: int = 0
    """u64 a block: generation and CRC-32 of its content."""
    buffers: int = 0
    n_blocks: int = 0
    random: int = 1
    generation: int = 0
    n_issued: int = 0
    n_reads: int = 0
    n_writes: int = 0
    busy: dict[int, tuple[int, bool]] = {}
    """Buffer -> (block, whether it is written)."""
    flushing: bool = False
    finished: bool = False
    error: str = ""


class KernelState(Struct):
    """All of it."""

    phase: Phase = Phase.OFF
    secure: bool = False
    interrupts_on: bool = False
    line: bool = False
    kbase: int = 0
    up: bool = False
    """Whether the kernel has come up once."""
    n_started: int = 0
    """Devices beside the disk that the kernel is done with starting."""
    extra_served: bool = False
    """Whether the last step was of such a device."""
    pidr: int = 0
    """Process that the processor runs."""
    workload: Workload = Workload.PROMPT
    dma_design: DmaDesign = DmaDesign.QUIRK
    old_firmware: bool = False
    """Whether the boot stage knows nothing of ACCESS_PLATFORM."""
    options: dict[str, str | int | bool] = {}
    wake_ns: int = 0
    """Nothing runs before this time after a busy call."""
    crash: str = ""
    machine: Machine = msgspec.field(default_factory=Machine)
    calls: Calls = msgspec.field(default_factory=Calls)
    pages: Pages = msgspec.field(default_factory=Pages)
    pool: Pool = msgspec.field(default_factory=Pool)
    window: Window = msgspec.field(default_factory=Window)
    wide: WideWindow = msgspec.field(default_factory=WideWindow)
    blk: Blk = msgspec.field(default_factory=Blk)
    rng: Rng = msgspec.field(default_factory=Rng)
    edus: list[Edu] = msgspec.field(default_factory=lambda: [Edu(), Edu()])
    vfio: Vfio = msgspec.field(default_factory=Vfio)
    edu_copy: EduCopy = msgspec.field(default_factory=EduCopy)
    balloon: Balloon = msgspec.field(default_factory=Balloon)
    net: Net = msgspec.field(default_factory=Net)
    net_run: NetRun = msgspec.field(default_factory=NetRun)
    bulk: Bulk = msgspec.field(default_factory=Bulk)
    disk_hash: DiskHash = msgspec.field(default_factory=DiskHash)
    partitions: Partitions = msgspec.field(default_factory=Partitions)
    boot: Boot = msgspec.field(default_factory=Boot)
    console: Console = msgspec.field(default_factory=Console)
    writer: Writer = msgspec.field(default_factory=Writer)
    io_run: IoRun = msgspec.field(default_factory=IoRun)
    null_calls: NullCalls = msgspec.field(default_factory=NullCalls)
    demo: Demo = msgspec.field(default_factory=Demo)
    disk_load: DiskLoad = msgspec.field(default_factory=DiskLoad)


class Saved(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """The envelope of a save."""

    version: int
    state: KernelState


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Saved] = msgspec.msgpack.Decoder(Saved)


def encode_state(state: KernelState) -> bytes:
    """The state as bytes, at most MAX_STATE_BYTES."""
    data = _encoder.encode(Saved(STATE_VERSION, state))
    if len(data) > MAX_STATE_BYTES:
        raise AssertionError(f"the kernel state has {len(data)} bytes")
    return data


def decode_state(data: bytes) -> KernelState:
    """The state of `encode_state`; raises ValueError for another version or anything else."""
    try:
        saved = _decoder.decode(data)
    except (msgspec.MsgspecError, OverflowError) as error:
        raise ValueError(f"not a state of this kernel: {error}") from None
    if saved.version != STATE_VERSION:
        raise ValueError(f"the state has version {saved.version}, this kernel has {STATE_VERSION}")
    return saved.state
