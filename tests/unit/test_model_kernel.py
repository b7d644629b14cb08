"""The model kernel against a whole small world: RAM, ultravisor, hypervisor and a disk, all in this file."""

from __future__ import annotations

import hashlib
import io
import random
import re
import struct
import tempfile
from collections.abc import Callable, Iterator

import pytest

from protocol.codes import HCode, UCode
from protocol.errors import GuestFault
from protocol.geometry import PAGE_BYTES, PAGE_SHIFT
from protocol.messages import Access
from services.guest.address_space import AddressSpace
from services.guest.exits import Crash, Exit, Hypercall, Idle, MmioLoad, MmioStore, Pause, Ultracall
from services.guest.model.cpu import Cpu
from services.guest.model.engine import ModelEngine
from services.guest.model.image import Option, build_image
from services.guest.model.pages import PageAllocator, PageUse
from services.guest.model.region_writer import region_pattern
from services.guest.model.state import MAX_STATE_BYTES, STATE_VERSION, KernelState, decode_state
from services.guest.model.swiotlb import SEGMENT_BYTES, SLOT_BYTES, Direction, Swiotlb
from services.guest.model.virtqueue import QueueError
from shared.boot_partition import build_boot_partition, write_disk
from shared.fdt_reader import FdtNode, FdtTree, read_fdt
from shared.fdt_values import add_node, cells, quads, strings
from shared.fdt_writer import write_fdt
from shared.partition_map import ENTRY_BYTES, MapKind, PartitionMap

RAM_BYTES = 32 << 20
FDT_GPA = 0x100000
BUID = 0x800000020000000
LIOBN = 0x80000000
TOKENS = [
    "ibm,read-pci-config", "ibm,write-pci-config", "ibm,change-msi", "ibm,query-interrupt-source-number",
    "ibm,set-xive", "ibm,int-on", "power-off", "system-reboot",
]  # fmt: skip
MMIO_PCI, MMIO_GPA, MMIO_BYTES = 0x80000000, 0x200080000000, 0x80000000
MSI_SOURCE = 0x1300
VTY = 0x71000000
SLICE_NS = 1_000_000
SEED = 20


class FakeClock:
    """An instruction clock: one instruction a nanosecond."""

    def __init__(self) -> None:
        self.now = 0

    def now_ns(self) -> int:
        return self.now

    def charge(self, cost: int) -> None:
        self.now += cost


class FakeDisk:
    """A virtio block function behind memory that the host can read; `lie` makes it hostile."""

    def __init__(self, content: bytearray, *, access_platform: bool = False) -> None:
        self.content = content
        self.offered = 1 << 32 | 1 << 28 | 1 << 29 | 1 << 9 | 1 << 13 | 1 << 14 | (1 << 33 if access_platform else 0)
        self.config = bytearray(256)
        struct.pack_into("<HH", self.config, 0, 0x1AF4, 0x1042)
        struct.pack_into("<H", self.config, 6, 1 << 4)
        self.config[0x34] = 0x40
        self.bars = {1: 0x1000, 4: 0x4000}
        self.config[0x20] = 0x0C
        struct.pack_into("<BBH", self.config, 0x40, 0x11, 0x50, 1)
        for at, after, kind, offset, extra in ((0x50, 0x60, 1, 0, b""), (0x60, 0x70, 4, 0x2000, b""),
                                               (0x70, 0, 2, 0x3000, b"\4\0\0\0")):  # fmt: skip
            struct.pack_into("<BBBBBxxxII", self.config, at, 9, after, 16 + len(extra), kind, 4, offset, 0x1000)
            self.config[at + 16 : at + 16 + len(extra)] = extra
        self.lie = ""
        self.ranges: list[tuple[int, int, int]] = []
        self.reset()

    def reset(self) -> None:
        self.status = self.accepted = self.select = 0
        self.queue = {"size": 64, "vector": 0xFFFF, "desc": 0, "driver": 0, "device": 0, "enable": 0}
        self.last_avail = 0
        self.n_requests = 0

    def read_config(self, offset: int, size: int) -> int:
        return int.from_bytes(self.config[offset : offset + size], "little")

    def write_config(self, offset: int, size: int, value: int) -> None:
        if 0x10 <= offset < 0x28:
            bar = (offset - 0x10) // 4
            if bar not in self.bars and bar - 1 not in self.bars:
                return
            flags = self.config[offset] & 0xF if bar in self.bars else 0
            value = value & -self.bars[bar] & 0xFFFFFFFF | flags if bar in self.bars else value
            if bar == 5:
                value = value if value != 0xFFFFFFFF else 0xFFFFFFFF
        self.config[offset : offset + size] = value.to_bytes(size, "little")

    def bar_address(self, bar: int) -> int:
        low, high = (self.read_config(0x10 + 4 * bar + 4 * n, 4) for n in range(2))
        return (high if low & 4 else 0) << 32 | low & ~0xF

    def load(self, offset: int, size: int) -> int:
        if offset >= 0x2000:
            config = struct.pack("<Q", len(self.content) // 512).ljust(64, b"\0")
            return int.from_bytes(config[offset - 0x2000 :][:size], "little")
        fields = {
            4: self.offered >> 32 * self.select & 0xFFFFFFFF, 18: 1, 20: self.status, 24: self.queue["size"],
            26: self.queue["vector"], 28: self.queue["enable"], 30: 0,
        }  # fmt: skip
        return fields.get(offset, 0)

    def store(self, offset: int, size: int, value: int) -> None:
        if offset in (0, 8):
            self.select = value
        elif offset == 12:
            self.accepted |= value << 32 * self.select
        elif offset == 20 and not value:
            self.reset()
        elif offset == 20:
            refused = self.accepted & ~self.offered or (self.offered ^ self.accepted) & 1 << 33
            self.status = value & ~8 if refused else value
        elif offset in (24, 26, 28):
            self.queue[{24: "size", 26: "vector", 28: "enable"}[offset]] = value
        elif 32 <= offset < 56:
            name = ("desc", "driver", "device")[(offset - 32) // 8]
            shift = 32 * (offset % 8 // 4)
            self.queue[name] = self.queue[name] & ~(0xFFFFFFFF << shift) | value << shift


class World:
    """One VM: what the processor loop, kvm, the ultravisor and qemu are to the engine."""

    def __init__(self, disk: FakeDisk | None = None, *, esm: UCode = UCode.U_SUCCESS, boot_args: str = "") -> None:
        self.ram = bytearray(RAM_BYTES)
        self.secure_ram = bytearray(RAM_BYTES)
        n_pages = RAM_BYTES >> PAGE_SHIFT
        self.entries = PartitionMap(memoryview(bytearray(n_pages * ENTRY_BYTES)))
        for gfn in range(n_pages):
            self.entries.set(gfn, MapKind.NORMAL, gfn)
        self.memory = AddressSpace(memoryview(self.ram), memoryview(bytearray(n_pages)), self._fault)
        self.memory.use_map(self.entries, memoryview(self.secure_ram))
        self.clock = FakeClock()
        self.engine = ModelEngine(self.memory, self.clock)
        self.disk, self.esm_result = disk, esm
        self.random = random.Random(SEED)
        self.console = ""
        self.typed = b""
        self.pending: set[int] = set()
        self.secure = self.off = False
        self.tces: dict[int, int] = {}
        self.tce_pages: list[int] = []
        self.hcalls: list[tuple[int, tuple[int, ...]]] = []
        self.n_shared = 0
        self.crash = ""
        tree = write_fdt(self._tree(boot_args))
        self.ram[FDT_GPA : FDT_GPA + len(tree)] = tree
        self.engine.start(0x100, {3: FDT_GPA}, secure=False)

    def _fault(self, gfn: int, access: Access) -> None:
        raise GuestFault(f"gfn {gfn:#x}")

    def _tree(self, boot_args: str) -> FdtTree:
        root = FdtNode("", {"compatible": strings("qemu,pseries")})
        add_node(root, "memory@0", {"device_type": strings("memory"), "reg": quads(0, RAM_BYTES)})
        add_node(root, "chosen", {"bootargs": strings(boot_args)})
        add_node(root, "rtas", {name: cells(0x2100 + n) for n, name in enumerate(TOKENS)})
        vdevice = add_node(root, "vdevice", {})
        add_node(vdevice, "vty@71000000", {"reg": cells(VTY), "interrupts": cells(0x1100, 0)})
        if self.disk:
            window = cells(0x02000000) + quads(MMIO_PCI, MMIO_GPA, MMIO_BYTES)
            bridge = {"device_type": strings("pci"), "reg": quads(BUID, 0), "ranges": window}
            add_node(root, f"pci@{BUID:x}", {**bridge, "ibm,dma-window": cells(LIOBN) + quads(0, 1 << 30)})
        return FdtTree(root)

    # -- the processor loop -----------------------------------------------------------------------------------------

    def run(self, done: Callable[[], bool], limit: int = 400_000, slice_ns: int = SLICE_NS) -> None:
        """Serve exits until `done`, looked at after each slice; fails when the world stands still."""
        for _ in range(limit):
            if done() or self.crash:
                return
            self.serve(self.engine.run(slice_ns))
        pytest.fail(f"not done; console: {self.console[-2000:]}")

    def serve(self, exit_: Exit) -> None:
        match exit_:
            case Crash(reason):
                self.crash = reason
            case Idle(until_ns):
                assert self.pending or self.typed or until_ns is not None, f"asleep for ever:\n{self.console}"
                if self.pending or self.typed:
                    self.engine.set_line(True)
                    # A kernel that waits for a busy call takes it later.
                    self.clock.now += 1_000
                elif until_ns is not None:
                    self.clock.now = max(self.clock.now, until_ns)
            case Hypercall(number, args):
                self.engine.resume(self._hcall(number, args))
            case Ultracall(number, args):
                self._ucall(number, args)
            case MmioLoad(gpa, size):
                device, offset = self._mmio(gpa)
                self.engine.resume([0, device.load(offset, size)] if device else [HCode.H_PARAMETER, 0])
            case MmioStore(gpa, size, value):
                device, offset = self._mmio(gpa)
                if device and offset >= 0x3000:
                    self._notify(device)
                elif device:
                    device.store(offset, size, value)
                self.engine.resume([0 if device else HCode.H_PARAMETER])
            case Pause():
                if self.pending or self.typed:
                    self.engine.set_line(True)

    def wait_for(self, text: str) -> None:
        """Run until the console shows `text`."""
        self.run(lambda: text in self.console)
        assert not self.crash, self.crash
        assert text in self.console

    def ask(self, line: str) -> str:
        """Type a command; its answer line."""
        start = len(self.console)
        self.typed += line.encode() + b"\r"
        self.run(lambda: self.off or (self.console.endswith("\n> ") and bool(self._answers(start))))
        return self._answers(start)[-1] if not self.off else "off"

    def _answers(self, start: int) -> list[str]:
        return [line for line in self.console[start:].split("\r\n") if line.startswith(("ok", "error"))]

    # -- kvm and the ultravisor -------------------------------------------------------------------------------------

    def _hcall(self, number: int, args: tuple[int, ...]) -> list[int]:
        self.hcalls.append((number, args))
        match number:
            case 0x58:
                text = b"".join(word.to_bytes(8, "big") for word in args[2:4])[: args[1]]
                self.console += text.decode()
            case 0x54:
                part, self.typed = self.typed[:16], self.typed[16:]
                words = [int.from_bytes(half.ljust(8, b"\0"), "big") for half in (part[:8], part[8:])]
                return [0, len(part), *words]
            case 0x74:
                source = self.pending.pop() if self.pending else 0x1100 if self.typed else 0
                return [0, 0xFF000000 | source]
            case 0x300:
                return [0, self.random.getrandbits(64)]
            case 0x20:
                assert args[0] == LIOBN and args[1] >> 12 not in self.tces if args[2] & 3 else True
                self._put_tce(args[1] >> 12, args[2])
            case 0x138:
                for index in range(args[3]):
                    self._put_tce((args[1] >> 12) + index, 0)
            case 0xF000:
                self._rtas(args[0])
        return [0]

    def _put_tce(self, index: int, tce: int) -> None:
        if tce & 3:
            self.tces[index] = tce
            self.tce_pages.append(tce >> 16)
        else:
            self.tces.pop(index, 0)

    def _rtas(self, block: int) -> None:
        token, n_args, n_rets = struct.unpack(">III", self.memory.load(block, 12))
        args = struct.unpack(f">{n_args}I", self.memory.load(block + 12, 4 * n_args))
        rets = [0] * n_rets
        match TOKENS[token - 0x2100]:
            case "ibm,read-pci-config":
                found = self._function(args[0])
                rets[1] = found.read_config(args[0] & 0xFF, args[3]) if found else 0xFFFFFFFF
            case "ibm,write-pci-config":
                found = self._function(args[0])
                assert found
                found.write_config(args[0] & 0xFF, args[3], args[4])
            case "ibm,change-msi":
                rets[1] = 1
            case "ibm,query-interrupt-source-number":
                rets[1] = self._msi_source(args[0])
            case "power-off":
                self.off = True
        self.memory.store(block + 12 + 4 * n_args, struct.pack(f">{n_rets}I", *rets))

    def _function(self, config_addr: int) -> FakeDisk | None:
        return self.disk if config_addr >> 8 == 0x10 else None

    def _msi_source(self, config_addr: int) -> int:
        return MSI_SOURCE

    def _ucall(self, number: int, args: tuple[int, ...]) -> None:
        if number == 0xF110 and self.esm_result == UCode.U_SUCCESS:
            self._go_secure(*args)
        elif number == 0xF110:
            self.engine.resume([self.esm_result])
        elif number in (0xF130, 0xF134) and self.secure and args[0] + args[1] <= len(self.entries):
            kind = MapKind.SHARED if number == 0xF130 else MapKind.SECURE
            for gfn in range(args[0], args[0] + args[1]):
                if self.entries[gfn] & 0xF != kind:
                    self.entries.set(gfn, kind, gfn)
                    start = gfn << PAGE_SHIFT
                    self.secure_ram[start : start + PAGE_BYTES] = bytes(PAGE_BYTES)
                    self.ram[start : start + PAGE_BYTES] = bytes(PAGE_BYTES)
                    self.n_shared += kind is MapKind.SHARED
            self.engine.resume([UCode.U_SUCCESS])
        else:
            self.engine.resume([UCode.U_PERMISSION if not self.secure else UCode.U_P2])

    def _go_secure(self, kbase: int, fdt: int) -> None:
        tree = read_fdt(bytes(self.ram[fdt:]))
        rtas = tree.node("/rtas")
        base = rtas.number("linux,rtas-base") if rtas else None
        assert base
        image_bytes = len(build_image("prompt"))
        for gpa, n_bytes in ((kbase, image_bytes), (fdt, 2 * PAGE_BYTES), (base, 20)):
            self.secure_ram[gpa : gpa + n_bytes] = self.ram[gpa : gpa + n_bytes]
        # What the host still sees of a page that is secure now is an image, here noise.
        self.ram[:] = random.Random(SEED).randbytes(PAGE_BYTES) * (RAM_BYTES // PAGE_BYTES)
        for gfn in range(len(self.entries)):
            self.entries.set(gfn, MapKind.SECURE, gfn)
        self.secure = True
        self.engine.start(kbase, {3: fdt, 4: kbase, 5: 0}, secure=True)

    # -- the device side ----------------------------------------------------------------------------------------------

    def _mmio(self, gpa: int) -> tuple[FakeDisk | None, int]:
        if self.disk is None:
            return None, 0
        base = self.disk.bar_address(4) - MMIO_PCI + MMIO_GPA
        return (self.disk, gpa - base) if base <= gpa < base + 0x4000 else (None, 0)

    def _dma(self, disk: FakeDisk, addr: int, n_bytes: int, *, write: bool) -> Iterator[slice]:
        """Slices of host RAM behind a device address."""
        if not disk.accepted >> 33 & 1:
            yield slice(addr, addr + n_bytes)
            return
        while n_bytes:
            part = min(n_bytes, 0x1000 - addr % 0x1000)
            tce = self.tces[addr >> 12]
            assert tce & (2 if write else 1), "the device was not given this access"
            start = (tce & ~0xFFF) + addr % 0x1000
            yield slice(start, start + part)
            addr += part
            n_bytes -= part

    def _read(self, disk: FakeDisk, addr: int, n_bytes: int) -> bytes:
        return b"".join(bytes(self.ram[part]) for part in self._dma(disk, addr, n_bytes, write=False))

    def _write(self, disk: FakeDisk, addr: int, data: bytes) -> None:
        at = 0
        for part in self._dma(disk, addr, len(data), write=True):
            n_bytes = part.stop - part.start
            self.ram[part] = data[at : at + n_bytes]
            at += n_bytes

    def _notify(self, disk: FakeDisk) -> None:
        if disk.lie == "silent":
            return
        queue = disk.queue
        (idx,) = struct.unpack("<H", self._read(disk, queue["driver"] + 2, 2))
        while disk.last_avail != idx:
            slot = disk.last_avail % queue["size"]
            (head,) = struct.unpack("<H", self._read(disk, queue["driver"] + 4 + 2 * slot, 2))
            written = self._serve_chain(disk, head)
            self._push_used(disk, head, written)
        self._write(disk, queue["device"] + 4 + 8 * queue["size"], struct.pack("<H", idx))
        self.pending.add(MSI_SOURCE)

    def _push_used(self, disk: FakeDisk, head: int, written: int) -> None:
        queue, lie = disk.queue, disk.lie
        disk.n_requests += 1
        if lie:
            head = {"bad id": 64, "not a head": (head + 9) % 64}.get(lie, head)
            written = 1 << 30 if lie == "length" else written
        slot = disk.last_avail % queue["size"]
        self._write(disk, queue["device"] + 4 + 8 * slot, struct.pack("<II", head, written))
        disk.last_avail = disk.last_avail + 1 & 0xFFFF
        shown = disk.last_avail + (1000 if lie == "jump" else 0) & 0xFFFF
        self._write(disk, queue["device"] + 2, struct.pack("<H", shown))

    def _serve_chain(self, disk: FakeDisk, head: int) -> int:
        addr, n_bytes, flags, _ = struct.unpack("<QIHH", self._read(disk, disk.queue["desc"] + 16 * head, 16))
        assert flags == 4, "requests use an indirect table"
        table = self._read(disk, addr, n_bytes)
        segments = list(struct.iter_unpack("<QIHH", table))
        kind, _, sector = struct.unpack("<IIQ", self._read(disk, segments[0][0], 16))
        written = 1
        if kind == 0:
            data = bytes(disk.content[sector * 512 : sector * 512 + segments[1][1]])
            self._write(disk, segments[1][0], data)
            written += len(data)
        elif kind == 1:
            data = self._read(disk, segments[1][0], segments[1][1])
            disk.content[sector * 512 : sector * 512 + len(data)] = data
        elif kind == 8:
            self._write(disk, segments[1][0], b"serial".ljust(20, b"\0"))
            written += 20
        elif kind in (11, 13):
            first, n_sectors, _ = struct.unpack("<QII", self._read(disk, segments[1][0], 16))
            disk.content[first * 512 : (first + n_sectors) * 512] = bytes(n_sectors * 512)
            disk.ranges.append((kind, first, n_sectors))
        self._write(disk, segments[-1][0], b"\0")
        return written


def make_disk(workload: str, options: dict[str, Option] | None = None, command_line: str = "svm=on",
              *, access_platform: bool = False) -> FakeDisk:  # fmt: skip
    """A disk with boot, data and scratch partitions."""
    boot = build_boot_partition(build_image(workload, options), b"initrd" * 1000, command_line)
    with tempfile.TemporaryFile() as file:
        write_disk(file, boot, data=io.BytesIO(random.Random(SEED).randbytes(1 << 20)))
        file.seek(0)
        content = bytearray(file.read())
    return FakeDisk(content, access_platform=access_platform)


def revealed(world: World) -> dict[str, bytes]:
    """The demo's secrets by name."""
    assert world.ask("reveal") == "ok"
    lines = [line.split() for line in world.console.split("\r\n") if line.startswith("secret ")]
    return {name: bytes.fromhex(value) for _, name, value in lines}


@pytest.mark.parametrize("access_platform", [False, True], ids=["quirk", "iommu"])
def test_the_demo_hashes_its_disk_writes_a_region_and_keeps_its_secrets(access_platform: bool) -> None:
    disk = make_disk("demo", access_platform=access_platform)
    digest = hashlib.sha256(disk.content).hexdigest()
    world = World(disk)

    world.wait_for("pefbox: secrets planted")

    assert world.secure
    normal = hashlib.sha256(disk.content[: 1 << 20]).hexdigest()
    assert f"pefbox: normal read 1048576 bytes sha256 {normal}" in world.console
    assert f"pefbox: disk sha256 {digest} bytes {len(disk.content)} swiotlb {len(disk.content) + 512}" in world.console
    scratch = disk.content.find(region_pattern(1, 65536))
    assert scratch % (1 << 20) == 0
    host = bytes(world.ram) + bytes(disk.content) + repr(world.hcalls[: len(world.hcalls)]).encode()
    secrets = revealed(world)
    assert host.find(secrets.pop("marker")) >= 0
    registers = secrets.pop("registers")
    assert any(args[1:] for number, args in world.hcalls if number == 0x68), "the secret was in the registers"
    assert {len(secret) for secret in [registers, *secrets.values()]} == {32}
    assert not [name for name, secret in secrets.items() if secret in host]


def test_in_a_secure_vm_no_tce_ever_names_a_private_page() -> None:
    world = World(make_disk("demo", access_platform=True))
    world.run(lambda: world.secure)
    world.tces.clear()
    world.tce_pages.clear()
    world.wait_for("pefbox: secrets planted")
    assert world.tce_pages
    assert {world.entries[gfn] & 0xF for gfn in world.tce_pages} == {MapKind.SHARED}


def test_a_failed_esm_is_said_and_the_same_workload_runs_as_a_normal_vm() -> None:
    disk = make_disk("demo")
    digest = hashlib.sha256(disk.content).hexdigest()
    world = World(disk, esm=UCode.U_PARAMETER)
    world.wait_for("pefbox: secrets planted")
    assert "pefbox: UV_ESM failed: U_PARAMETER; going on as a normal VM" in world.console
    assert "pefbox: kernel demo secure=0" in world.console
    assert f"disk sha256 {digest}" in world.console


def test_without_svm_on_the_vm_stays_normal_and_esm_can_be_asked_for() -> None:
    world = World(make_disk("prompt", command_line="quiet"))
    world.wait_for("\n> ")
    assert not world.secure
    world.typed = b"esm\r"
    world.run(lambda: "kernel prompt secure=1" in world.console)
    world.wait_for("slots, ")
    assert world.secure and not world.crash


@pytest.mark.parametrize("access_platform", [False, True])
def test_after_a_refused_esm_the_old_kernel_opens_its_devices_anew_and_leaks_nothing(access_platform: bool) -> None:
    disk = make_disk("prompt", command_line="quiet", access_platform=access_platform)
    world = World(disk, esm=UCode.U_PARAMETER)
    world.wait_for("\n> ")
    digest = hashlib.sha256(disk.content).hexdigest()
    n_mapped, pages = len(world.tces), world.ask("pages")
    for _ in range(3):
        assert world.ask("esm") == "error U_PARAMETER"
        assert world.ask("hash").startswith(f"ok {digest}")
        assert len(world.tces) == n_mapped
    assert bool(n_mapped) == access_platform
    assert world.ask("pages") == pages


def test_a_vm_without_disk_and_kernel_stays_in_the_boot_stage() -> None:
    world = World(None)
    world.wait_for("no kernel to boot")
    assert world.ask("esm") == "error no kernel was loaded"
    assert world.ask("hash") == "error no disk"


def test_an_image_of_other_sources_is_refused() -> None:
    disk = make_disk("prompt")
    at = disk.content.find(b"PEFMODEL") + 30
    disk.content[at] ^= 1
    world = World(disk)
    world.run(lambda: False)
    assert "not of this version" in world.crash


def test_a_driver_that_never_takes_access_platform_is_refused_by_the_device() -> None:
    world = World(make_disk("prompt", {"dma": "nothing"}, "svm=on", access_platform=True))
    world.wait_for("\n> ")
    assert "disk: the device refuses the features (FEATURES_OK)" in world.console


def test_without_the_quirk_a_secure_vm_and_its_device_do_not_understand_each_other() -> None:
    world = World(make_disk("prompt", {"dma": "nothing"}))
    with pytest.raises((AssertionError, IndexError, KeyError)):
        world.wait_for("ready")


def test_prompt_commands_answer_one_line_each() -> None:
    world = World(make_disk("prompt"))
    world.wait_for("\n> ")
    assert world.disk
    digest = hashlib.sha256(world.disk.content).hexdigest()
    assert world.ask("hash") == f"ok {digest} {len(world.disk.content)}"
    assert world.ask("fill 0x1f0 0x41") == "ok"
    assert world.ask("sum 0x1f0") == "ok " + hashlib.sha256(b"A" * PAGE_BYTES).hexdigest()
    assert world.ask("share 0x1f0") == "ok"
    assert world.ask("touch 0x1f0") == "ok 0x00"
    assert world.ask("share 0x1000 2") == "error U_P2"
    assert world.ask("unshare 0x1f0 1") == "ok"
    assert world.ask("write").startswith("ok ")
    assert world.ask("zero").startswith("ok ")
    assert world.ask("discard").startswith("ok ")
    assert [(kind, n_sectors) for kind, _, n_sectors in world.disk.ranges] == [(13, 128), (11, 128)]
    assert world.disk.content.find(region_pattern(1, 65536)) < 0
    assert world.ask("id") == "ok serial"
    assert world.ask("pages").startswith("ok free=")
    assert "UV_SHARE_PAGE=" in world.ask("calls")
    assert world.ask("null 120").startswith("ok 120 p50_ns ")
    for wrong in ("share", "touch x", "touch 99999", "fill 0 1", "fill 0x1f0 256", "frob", "null 0", "share -1"):
        assert world.ask(wrong).startswith("error ")
    assert world.ask("poweroff") == "off"


def test_the_disk_workload_finds_what_it_wrote() -> None:
    world = World(make_disk("disk", {"disk_ops": 300}))
    world.run(lambda: re.search(r"done: reads=\d+ writes=\d+\r\n", world.console) is not None)
    reads, writes = map(int, re.findall(r"done: reads=(\d+) writes=(\d+)", world.console)[0])
    assert reads > 50 and writes > 50


def test_the_disk_workload_sees_a_block_that_changed_behind_its_back() -> None:
    world = World(make_disk("disk"))
    world.run(lambda: bool(decoded(world).disk_load.n_writes > 40) if world.engine.at_safe_point else False)
    assert world.disk
    world.disk.content[-(1 << 20) :] = bytes(1 << 20)
    world.run(lambda: bool(decoded(world).disk_load.error) if world.engine.at_safe_point else False)
    assert "does not hold what was written" in decoded(world).disk_load.error


@pytest.mark.parametrize(
    ("lie", "error"),
    [
        ("bad id", QueueError.BAD_ID),
        ("not a head", QueueError.NOT_A_HEAD),
        ("length", QueueError.USED_LENGTH),
        ("jump", QueueError.INDEX_JUMP),
        ("silent", QueueError.NO_ANSWER),
    ],
)
def test_a_hostile_device_ends_its_queue_in_a_named_error_within_two_seconds(lie: str, error: QueueError) -> None:
    world = World(make_disk("prompt"))
    world.wait_for("ready")
    assert world.disk
    world.disk.lie = lie
    begin_ns = world.clock.now
    answer = world.ask("hash")
    assert answer == f"error queue 0: {error.value}"
    assert world.clock.now - begin_ns < 2_100_000_000
    assert world.ask("write") == "error no disk"


def fill_pool(world: World) -> None:
    """Take every slot of the swiotlb pool, as a device does that gives none back."""
    state = decoded_at_safe_point(world)
    pool = Swiotlb(Cpu(world.memory, world.clock, state.machine, state.calls), state.pool)
    for n_bytes in (SEGMENT_BYTES, SLOT_BYTES):
        while pool.map(0x1F0_0000, n_bytes, Direction.FROM_DEVICE) is not None:
            pass


@pytest.mark.parametrize("command", ["hash", "write", "id", "io read 4096 1 1", "io randread 4096 8 100"])
def test_a_pool_that_stays_full_ends_the_request_and_not_the_kernel(command: str) -> None:
    world = World(make_disk("prompt"))
    world.wait_for("ready")
    fill_pool(world)
    assert world.ask(command) == "error no room in the DMA pool"
    assert world.ask("pages").startswith("ok free=")


def test_a_pool_that_stays_full_ends_the_request_though_somebody_types_all_the_time() -> None:
    world = World(make_disk("prompt"))
    world.wait_for("ready")
    fill_pool(world)
    world.typed, typed_ns = b"hash\r", [world.clock.now]

    def answered() -> bool:
        if world.clock.now > typed_ns[-1] + 100_000_000:
            world.typed = b"x"
            typed_ns.append(world.clock.now)
        return "error no room in the DMA pool" in world.console

    begin_ns = world.clock.now
    world.run(answered)
    assert not world.crash
    assert len(typed_ns) > 5
    assert world.clock.now - begin_ns < 2_000_000_000


def test_a_command_for_which_memory_is_short_is_refused_and_not_the_kernels_end() -> None:
    world = World(make_disk("prompt"))
    world.wait_for("ready")
    state = decoded_at_safe_point(world)
    pages = PageAllocator(Cpu(world.memory, world.clock, state.machine, state.calls), state.pages)
    while pages.alloc(1, PageUse.BALLOON) is not None:
        pass
    for command in ("io read 262144 32 1", "write", "hash", "null 5"):
        assert world.ask(command).startswith("error out of memory: ")
    assert world.ask("pages").startswith("ok free=")


def test_a_pool_that_stays_full_ends_the_disk_workload_and_not_the_kernel() -> None:
    world = World(make_disk("disk"))

    def idle() -> bool:
        return world.engine.at_safe_point and (load := decoded(world).disk_load).started and not load.busy

    world.run(idle, slice_ns=0)
    fill_pool(world)
    world.wait_for("pefbox: disk workload: no room in the DMA pool")
    assert not world.crash


def decoded(world: World) -> KernelState:
    """The kernel's state."""
    return decode_state(world.engine.save())


def run_with_reloads(world: World, until: str, probability: float, seed: int) -> int:
    """Run from safe point to safe point, saving and loading into a new engine at random ones; how often."""
    chance = random.Random(seed)
    n_loads = 0
    while until not in world.console:
        world.serve(world.engine.run(0))
        assert not world.crash, world.crash
        if world.engine.at_safe_point and chance.random() < probability:
            state = world.engine.save()
            assert len(state) <= MAX_STATE_BYTES
            world.engine = ModelEngine(world.memory, world.clock)
            world.engine.load(state)
            n_loads += 1
    return n_loads


def run_into_the_hash(world: World) -> None:
    """Up to a safe point of the secure kernel with a part of the disk hashed."""

    def inside() -> bool:
        return world.engine.at_safe_point and decoded(world).disk_hash.position > 1 << 20 and world.secure

    world.run(inside, slice_ns=0)
    assert "disk sha256" not in world.console


def result_lines(world: World) -> list[str]:
    return [line for line in world.console.split("\r\n") if "sha256" in line or "wrote" in line]


@pytest.mark.parametrize("access_platform", [False, True], ids=["quirk", "iommu"])
def test_a_run_saved_and_loaded_at_random_safe_points_ends_the_same(access_platform: bool) -> None:
    plain = World(make_disk("demo", access_platform=access_platform))
    plain.wait_for("secrets planted")
    world = World(make_disk("demo", access_platform=access_platform))

    n_loads = run_with_reloads(world, "secrets planted", 0.5, SEED)

    assert n_loads > 20
    assert result_lines(world) == result_lines(plain)
    assert disk_calls(world) == disk_calls(plain)


def test_a_thousand_saves_and_loads_change_nothing_that_the_disk_sees() -> None:
    plain, world = (World(make_disk("disk", {"disk_ops": 1600})) for _ in range(2))
    run_with_reloads(plain, "disk workload done", 0, SEED)

    n_loads = run_with_reloads(world, "disk workload done", 0.5, SEED)

    assert n_loads >= 1000
    assert plain.disk and world.disk and world.disk.content == plain.disk.content
    assert world.engine.call_counts == plain.engine.call_counts


def disk_calls(world: World) -> dict[str, int]:
    """Call counts but for the interrupt controller's, which depend on how slices fall."""
    counts = world.engine.call_counts
    return {name: n for name, n in counts.items() if name not in ("H_XIRR", "H_EOI", "H_GET_TERM_CHAR")}


def test_a_small_memory_disk_hash_without_page_cache_survives_a_load() -> None:
    world = World(make_disk("demo", {"page_cache": False}))
    assert world.disk
    digest = hashlib.sha256(world.disk.content).hexdigest()
    run_into_the_hash(world)
    state = world.engine.save()
    world.engine = ModelEngine(world.memory, world.clock)
    world.engine.load(state)
    world.wait_for("secrets planted")
    assert f"disk sha256 {digest}" in world.console


def test_the_state_without_the_ram_under_it_does_not_give_the_right_hash() -> None:
    world = World(make_disk("demo"))
    assert world.disk
    digest = hashlib.sha256(world.disk.content).hexdigest()
    run_into_the_hash(world)
    state = world.engine.save()
    world.engine = ModelEngine(world.memory, world.clock)
    world.engine.load(state)
    for gfn in range(len(world.entries)):
        world.memory.fill(gfn << PAGE_SHIFT, PAGE_BYTES)
    try:
        world.run(lambda: "sha256 " + digest in world.console, limit=20_000)
    except (AssertionError, IndexError, KeyError, struct.error, pytest.fail.Exception):
        pass
    assert f"disk sha256 {digest}" not in world.console


def test_safe_points_are_never_further_apart_than_100_exits() -> None:
    world = World(make_disk("demo", access_platform=True))
    longest = n_exits = 0
    while "secrets planted" not in world.console:
        exit_ = world.engine.run(SLICE_NS)
        n_exits = 0 if world.engine.at_safe_point else n_exits + (not isinstance(exit_, Pause))
        longest = max(longest, n_exits)
        world.serve(exit_)
    assert longest <= 100


def test_a_state_of_another_version_is_refused() -> None:
    world = World(None)
    for wrong in (b"", bytes((0x92, STATE_VERSION + 1, 0x80)), world.engine.save()[:-1]):
        with pytest.raises(ValueError):
            world.engine.load(wrong)


def test_the_boot_stage_names_kernel_initrd_and_command_line_in_the_tree() -> None:
    world = World(make_disk("prompt", command_line="svm=on rest"), esm=UCode.U_PARAMETER)
    world.wait_for("secure=0")
    state = decoded_at_safe_point(world)
    tree = read_fdt(bytes(world.ram[state.machine.fdt :]))
    chosen, rtas = tree.node("/chosen"), tree.node("/rtas")
    assert chosen and rtas
    assert chosen.text("bootargs") == "svm=on rest"
    start, end, base = (
        chosen.number("linux,initrd-start"), chosen.number("linux,initrd-end"), rtas.number("linux,rtas-base")
    )  # fmt: skip
    assert bytes(world.ram[start:end]) == b"initrd" * 1000
    assert base and world.ram[base:][:4] == bytes.fromhex("7c641b78")
    assert rtas.number("rtas-size") == 20
    assert world.ram[state.kbase :][:8] == b"PEFMODEL"


def decoded_at_safe_point(world: World) -> KernelState:
    """The kernel's state at the next safe point."""
    world.run(lambda: world.engine.at_safe_point)
    return decoded(world)
