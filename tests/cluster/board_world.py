"""A model kernel with qemu's real board on a real disk image in one process, and the same run continued in another.

Processor loop, kvm and ultravisor are only as much as a run needs: what matters here is that everything a kernel
leaves outside its RAM is in what `ModelEngine.save` gives. Run as a program, this file takes a saved world from a
file, runs it to its end and prints its outcome as JSON.
"""

from __future__ import annotations

import os
import random
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import trio

from protocol import hcalls as h
from protocol.codes import HCode, UCode
from protocol.errors import GuestFault
from protocol.geometry import PAGE_BYTES, PAGE_SHIFT
from protocol.messages import Access, TceWindowBody
from protocol.startup import NO_OFFER, PLATFORM_OFFER, DeviceEntry, DiskEntry, VmEntry
from protocol.ucalls import UV_ESM, UV_SHARE_PAGE, UV_UNSHARE_PAGE
from services.guest.address_space import AddressSpace
from services.guest.exits import Crash, Exit, Hypercall, Idle, MmioLoad, MmioStore, Ultracall
from services.guest.model.engine import ModelEngine
from services.guest.model.image import build_image
from services.kvm import rtas_irq
from services.kvm.tce_tables import TceTables, TceTablesState
from services.kvm.xics import Xics
from services.qemu.board import Board, BoardState
from services.qemu.device_tree import BootFacts
from services.qemu.testing import TestPort, board_entry
from shared.esm_digest import RTAS_TEXT
from shared.fdt_reader import read_fdt
from shared.guest_ram import GuestRam
from shared.host_view import HostState
from shared.partition_map import ENTRY_BYTES, MapKind, PartitionMap

RAM_BYTES = 32 << 20
FDT_GPA = RAM_BYTES - (1 << 20)
N_PAGES = RAM_BYTES >> PAGE_SHIFT
DONE = "disk workload done"
MAX_EXITS = 400_000


class SavedWorld(msgspec.Struct):
    """Everything around the kernel at a safe point; its RAM lies in a file of its own."""

    kernel: bytes
    now_ns: int
    secure: bool
    entries: bytes
    host_view: bytes
    console: str
    typed: bytes
    board: BoardState
    tces: TceTablesState
    xics: bytes


class Outcome(msgspec.Struct):
    """How a run ended."""

    answer: str
    load_line: str
    calls: dict[str, int]


class Clock:
    """One instruction a nanosecond."""

    def __init__(self, now_ns: int = 0) -> None:
        self.ns = now_ns

    def now_ns(self) -> int:
        """As GuestClock."""
        return self.ns

    def charge(self, cost: int) -> None:
        """As GuestClock."""
        self.ns += cost


class XicsPort(TestPort):
    """The board's port, with kvm's interrupt controller behind it."""

    xics: Xics

    async def define(self, source: int, *, level_triggered: bool) -> None:
        self.xics.add_source(source, level_triggered)

    def msi(self, source: int) -> None:
        self.xics.set_irq(source, True)


def vm_entry(disk: Path, devices: Sequence[DeviceEntry], *, access_platform: bool) -> VmEntry:
    """The VM: one disk, `devices` after it, instruction time."""
    first = DeviceEntry(kind="virtio-blk", disk="root", offer=PLATFORM_OFFER if access_platform else NO_OFFER)
    return board_entry([DiskEntry(name="root", path=str(disk))], [first, *devices], memory_bytes=RAM_BYTES)


class BoardWorld:
    """One VM in memory. `ram` is normal RAM and secure memory, one behind the other, so that it is saved as one."""

    def __init__(self, disk: Path, *, access_platform: bool, devices: Sequence[DeviceEntry] = ()) -> None:
        self.disk = disk
        self.ram = bytearray(2 * RAM_BYTES)
        ram = memoryview(self.ram)
        self.normal, self.private = ram[:RAM_BYTES], ram[RAM_BYTES:]
        self.entry_bytes = bytearray(N_PAGES * ENTRY_BYTES)
        self.map = PartitionMap(memoryview(self.entry_bytes))
        self.host_view = bytearray([HostState.PRESENT] * N_PAGES)
        self.memory = AddressSpace(self.normal, memoryview(bytearray(N_PAGES)), self._fault)
        self.memory.use_map(self.map, self.private)
        self.clock = Clock()
        self.engine = ModelEngine(self.memory, self.clock)
        self.xics = Xics()
        self.tces = TceTables(lambda gpa, n: gpa + n <= RAM_BYTES, _table_memory)
        self.fd = os.open(disk, os.O_RDWR)
        self.port = XicsPort()
        self.port.xics = self.xics
        accessor = GuestRam(self.normal, memoryview(self.host_view), self._want)
        entry = vm_entry(disk, devices, access_platform=access_platform)
        self.board = Board(entry, accessor, {"root": self.fd}, self.port)
        self.console, self.typed = "", b""
        self.secure, self.asked, self.crash = False, False, ""
        for gfn in range(N_PAGES):
            self.map.set(gfn, MapKind.NORMAL, gfn)

    async def power_on(self) -> None:
        """Interrupt sources, DMA window, device tree, boot stage."""
        await self.board.start()
        for window in self.board.default_windows():
            assert self.tces.create(window) is HCode.H_SUCCESS
            self._plug_window(window.liobn)
        tree = self.board.device_tree(BootFacts(bootargs=""))
        self.normal[FDT_GPA : FDT_GPA + len(tree)] = tree
        self.engine.start(0x100, {3: FDT_GPA}, secure=False)

    def close(self) -> None:
        """Close the image."""
        os.close(self.fd)

    # -- save and load --------------------------------------------------------------------------------------------

    def save(self) -> SavedWorld:
        """At a safe point; the RAM is `ram`."""
        return SavedWorld(
            kernel=self.engine.save(),
            now_ns=self.clock.ns,
            secure=self.secure,
            entries=bytes(self.entry_bytes),
            host_view=bytes(self.host_view),
            console=self.console,
            typed=self.typed,
            board=self.board.save(),
            tces=self.tces.save(),
            xics=msgspec.msgpack.encode(self.xics.save()),
        )

    def load(self, saved: SavedWorld, ram: bytes) -> None:
        """Continue `saved` in this new world."""
        self.ram[:] = ram
        self.entry_bytes[:] = saved.entries
        self.host_view[:] = saved.host_view
        self.clock.ns, self.secure = saved.now_ns, saved.secure
        self.console, self.typed, self.asked = saved.console, saved.typed, DONE in saved.console
        self.xics.load(msgspec.msgpack.decode(saved.xics, type=type(self.xics.save())))
        self.tces.load(saved.tces)
        for window in self.tces.windows:
            self._plug_window(window.liobn)
        self.board.load(saved.board)
        self.engine.load(saved.kernel)

    def reload_kernel(self) -> bytes:
        """Put the kernel's state into a new engine over the same RAM; the state."""
        state = self.engine.save()
        self.engine = ModelEngine(self.memory, self.clock)
        self.engine.load(state)
        return state

    # -- running ----------------------------------------------------------------------------------------------------

    async def step(self) -> None:
        """Up to the next safe point or exit, and serve it."""
        self.engine.set_line(self.xics.line(0))
        await self.serve_one()

    async def serve_one(self) -> None:
        """As `step`, with the interrupt line as the engine knows it."""
        await self._serve(self.engine.run(0))

    @property
    def done(self) -> bool:
        """Whether the workload has ended and the whole disk was hashed after it."""
        if DONE in self.console and not self.asked:
            self.asked, self.typed = True, b"hash\r"
            self.xics.set_irq(self.console_source, True)
        return self.asked and self.console.endswith("\n> ") and "\nok " in self.console

    async def finish(self) -> Outcome:
        """Run to the end; raises AssertionError when there is none."""
        for _ in range(MAX_EXITS):
            if self.done:
                return self.outcome()
            assert not self.crash, self.crash
            await self.step()
        raise AssertionError(f"no end: {self.console[-400:]}")

    def outcome(self) -> Outcome:
        """What the guest said and called."""
        lines = self.console.split("\r\n")
        load_line = next(line for line in lines if DONE in line)
        return Outcome([line for line in lines if line.startswith("ok ")][-1], load_line, self.engine.call_counts)

    console_source = 0x1100

    # -- exits ------------------------------------------------------------------------------------------------------

    async def _serve(self, leaving: Exit) -> None:
        match leaving:
            case Crash(reason):
                self.crash = reason
            case Idle(until_ns):
                if not self.xics.line(0):
                    assert until_ns is not None, f"asleep for ever: {self.console[-400:]}"
                    self.clock.ns = max(self.clock.ns, until_ns)
            case Hypercall(number, args):
                self.engine.resume(await self._hypercall(number, args))
            case Ultracall(number, args):
                self._ultracall(number, args)
            case MmioLoad(gpa, size):
                code, value = self.board.mmio_load(gpa, size)
                self.engine.resume([code, value])
            case MmioStore(gpa, size, value):
                self.engine.resume([await self.board.mmio_store(gpa, size, value)])
            case _:
                await trio.lowlevel.checkpoint()

    async def _hypercall(self, number: int, args: tuple[int, ...]) -> list[int]:
        if number == h.H_RTAS.number:
            return await self._rtas(args[0])
        if number == h.H_PUT_TERM_CHAR.number:
            text = b"".join(word.to_bytes(8, "big") for word in args[2:4])[: args[1]]
            self.console += text.decode()
            return [HCode.H_SUCCESS]
        if number == h.H_GET_TERM_CHAR.number:
            part, self.typed = self.typed[:16], self.typed[16:]
            words = [int.from_bytes(half.ljust(8, b"\0"), "big") for half in (part[:8], part[8:])]
            return [HCode.H_SUCCESS, len(part), *words]
        return {
            h.H_XIRR.number: lambda: self.xics.h_xirr(0),
            h.H_EOI.number: lambda: self.xics.h_eoi(0, args[0]),
            h.H_CPPR.number: lambda: self.xics.h_cppr(0, args[0]),
            h.H_PUT_TCE.number: lambda: self.tces.h_put_tce(*args),
            h.H_STUFF_TCE.number: lambda: self.tces.h_stuff_tce(*args),
        }[number]()

    async def _rtas(self, block: int) -> list[int]:
        token, n_args, n_rets = struct.unpack(">III", self.memory.load(block, 12))
        args = list(struct.unpack(f">{n_args}I", self.memory.load(block + 12, 4 * n_args)))
        rets = rtas_irq.serve(self.xics, token, args, n_rets)
        if rets is None:
            rets = await self.board.rtas_token(token, args, n_rets)
        self.memory.store(block + 12 + 4 * n_args, struct.pack(f">{n_rets}I", *rets))
        return [HCode.H_SUCCESS]

    def _ultracall(self, number: int, args: tuple[int, ...]) -> None:
        if number == UV_ESM.number:
            self._go_secure(*args)
            return
        kinds = {UV_SHARE_PAGE.number: MapKind.SHARED, UV_UNSHARE_PAGE.number: MapKind.SECURE}
        for gfn in range(args[0], args[0] + args[1]):
            self._change(gfn, kinds[number])
        self.engine.resume([UCode.U_SUCCESS])

    def _change(self, gfn: int, kind: MapKind) -> None:
        start = gfn << PAGE_SHIFT
        self.map.set(gfn, kind, gfn)
        self.host_view[gfn] = HostState.SHARED if kind is MapKind.SHARED else HostState.ABSENT
        for memory in (self.normal, self.private):
            memory[start : start + PAGE_BYTES] = bytes(PAGE_BYTES)

    def _go_secure(self, kbase: int, fdt: int) -> None:
        tree = read_fdt(bytes(self.normal[fdt:]))
        rtas = tree.node("/rtas")
        base = rtas.number("linux,rtas-base") if rtas else None
        assert base is not None
        kept = [(gpa, bytes(self.normal[gpa : gpa + n])) for gpa, n in _measured(kbase, fdt, base)]
        for gfn in range(N_PAGES):
            self._change(gfn, MapKind.SECURE)
        for gpa, content in kept:
            self.private[gpa : gpa + len(content)] = content
        self.secure = True
        self.engine.start(kbase, {3: fdt, 4: kbase, 5: 0}, secure=True)

    # -- memory -----------------------------------------------------------------------------------------------------

    def _plug_window(self, liobn: int) -> None:
        table = self.tces.get(liobn)
        assert table is not None
        self.board.add_dma_window(table)

    def _fault(self, gfn: int, access: Access) -> None:
        raise GuestFault(f"gfn {gfn:#x} is not mapped ({access.name})")

    async def _want(self, gfns: list[int]) -> None:
        raise GuestFault(f"a device touched private pages {gfns}")


def _measured(kbase: int, fdt: int, rtas: int) -> list[tuple[int, int]]:
    return [(kbase, len(build_image("disk"))), (fdt, 2 * PAGE_BYTES), (rtas, len(RTAS_TEXT))]


def _table_memory(window: TceWindowBody) -> memoryview:
    return memoryview(bytearray(8 * window.n_tces))


async def continue_saved(directory: Path, *, access_platform: bool) -> Outcome:
    """Run the world that was saved in `directory` to its end."""
    saved = msgspec.msgpack.decode((directory / "world").read_bytes(), type=SavedWorld)
    world = BoardWorld(directory / "disk", access_platform=access_platform)
    world.load(saved, (directory / "ram").read_bytes())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.board.run)
        outcome = await world.finish()
        nursery.cancel_scope.cancel()
    world.close()
    return outcome


def choose(seed: int, n_total: int, n_wanted: int) -> set[int]:
    """`n_wanted` different numbers below `n_total`."""
    return set(random.Random(seed).sample(range(n_total), n_wanted))


if __name__ == "__main__":
    result = trio.run(lambda: continue_saved(Path(sys.argv[1]), access_platform=sys.argv[2] == "iommu"))
    sys.stdout.buffer.write(msgspec.json.encode(result))
