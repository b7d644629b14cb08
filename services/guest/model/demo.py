"""The demo workload: hash the disk, plant secrets, write a region, say so; reveal when asked.

Five secrets of 32 bytes, copies of which lie one after another in a private page: random bytes in a secure page, bytes
beside a bounced buffer, bytes in registers before a hypercall, the old content of a page that is then shared, and a
marker that is shared on purpose.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

from protocol.codes import HCode, UCode
from protocol.declare import Space
from protocol.geometry import PAGE_BYTES, PAGE_SHIFT
from protocol.hcalls import H_CPPR, H_RANDOM
from protocol.ucalls import UV_SHARE_PAGE
from services.guest.model import xics
from services.guest.model.cpu import Panic, Step
from services.guest.model.pages import PageUse
from services.guest.model.parts import Parts
from services.guest.model.region_writer import BUFFER_OFFSET, REGION_BYTES
from shared.virtio_blk import SECTOR_BYTES, BlkRequest

SECRET_BYTES = 32
NAMES = ("random", "beside", "registers", "old-page", "marker")


class Stage(IntEnum):
    """How far the demo is."""

    HASH = 0
    HASHING = 1
    PLANT = 2
    SHARE = 3
    WRITE = 4
    WRITING = 5
    DONE = 6


class Demo:
    """Over the state's `demo`."""

    def __init__(self, parts: Parts, prompt: Callable[[], None]) -> None:
        self._parts = parts
        self._state = parts.state.demo
        self._prompt = prompt

    def work(self) -> Step[None] | None:
        """The next step of the demo itself; the jobs it starts are driven by the kernel."""
        match self._state.stage:
            case Stage.HASH:
                return self._hash()
            case Stage.HASHING if not self._parts.state.disk_hash.active:
                return self._hashed()
            case Stage.PLANT:
                return self._plant()
            case Stage.SHARE:
                return self._share()
            case Stage.WRITE:
                return self._write()
            case Stage.WRITING if self._parts.state.writer.stage == 5:
                return self._written()
        return None

    def _hash(self) -> Step[None]:
        if self._parts.state.blk.ready:
            start_hash(self._parts, asked=False)
            self._state.stage = Stage.HASHING
        else:
            self._parts.console.say("pefbox: no disk to hash")
            self._state.stage = Stage.PLANT
        return
        yield

    def _hashed(self) -> Step[None]:
        self._parts.console.say(hash_line(self._parts))
        self._state.stage = Stage.PLANT
        return
        yield

    def _plant(self) -> Step[None]:
        """Nothing that can be busy comes after the first change."""
        words = []
        for _ in range(len(NAMES) * SECRET_BYTES // 8):
            code, *outputs = yield from self._parts.cpu.hcall(H_RANDOM)
            if code != HCode.H_SUCCESS or not outputs:
                raise Panic(f"H_RANDOM gave {Space.HCALL.code(code)}")
            words.append(outputs[0])
        cpu, pages = self._parts.cpu, self._parts.pages
        self._state.secrets = pages.must_alloc(1, PageUse.SECRET)
        cpu.fill(self._state.secrets, PAGE_BYTES)
        cpu.store(self._state.secrets, b"".join(word.to_bytes(8, "big") for word in words))
        buffer = self._parts.writer.prepare()
        cpu.store(buffer + BUFFER_OFFSET - SECRET_BYTES, self._secret("beside"))
        cpu.store(buffer + BUFFER_OFFSET + REGION_BYTES, self._secret("beside"))
        self._state.shared_page = pages.must_alloc(1, PageUse.SECRET)
        cpu.store(self._state.shared_page, self._secret("old-page") * (PAGE_BYTES // SECRET_BYTES))
        if self._parts.state.secure:
            yield from self._use_registers()
        self._state.stage = Stage.SHARE

    def _use_registers(self) -> Step[None]:
        """A hypercall of one argument with the secret in the registers behind it."""
        secret = self._secret("registers")
        words = [int.from_bytes(secret[at : at + 8], "big") for at in range(0, SECRET_BYTES, 8)]
        yield from self._parts.cpu.hcall_once(H_CPPR, xics.ALLOW_ALL, *words)

    def _share(self) -> Step[None]:
        cpu, page = self._parts.cpu, self._state.shared_page
        if self._parts.state.secure:
            code, *_ = yield from cpu.ucall(UV_SHARE_PAGE, page >> PAGE_SHIFT, 1)
            if code != UCode.U_SUCCESS:
                raise Panic(f"UV_SHARE_PAGE gave {Space.UCALL.code(code)}")
            if any(cpu.load(page, PAGE_BYTES)):
                raise Panic("a page kept its content when it was shared")
        self._parts.pages.mark(page >> PAGE_SHIFT, 1, PageUse.SHARED)
        cpu.store(page, self._secret("marker"))
        self._state.stage = Stage.WRITE

    def _write(self) -> Step[None]:
        refusal = start_write(self._parts, asked=False)
        if refusal:
            self._parts.console.say(f"pefbox: nothing written: {refusal}")
            self._finish()
        else:
            self._state.stage = Stage.WRITING
        return
        yield

    def _written(self) -> Step[None]:
        writer = self._parts.state.writer
        writer.stage = 0
        line = f"error: {writer.error}" if writer.error else self._parts.writer.describe()
        self._parts.console.say(f"pefbox: wrote {line}")
        self._finish()
        return
        yield

    def _finish(self) -> None:
        self._state.stage = Stage.DONE
        self._parts.console.say("pefbox: secrets planted")
        self._prompt()

    def reveal(self) -> list[str]:
        """The secrets in hex, for the console; empty before they are planted."""
        if not self._state.secrets:
            return []
        return [f"secret {name} {self._secret(name).hex()}" for name in NAMES]

    def _secret(self, name: str) -> bytes:
        return self._parts.cpu.load(self._state.secrets + SECRET_BYTES * NAMES.index(name), SECRET_BYTES)


def start_hash(parts: Parts, *, asked: bool) -> None:
    """Begin to hash the whole disk."""
    state = parts.state
    use_cache = bool(state.options.get("page_cache", True))
    n_bytes = state.blk.sectors * SECTOR_BYTES
    parts.hasher.start(n_bytes, parts.blk.max_bytes, state.pages.n_free, page_cache=use_cache, asked=asked)


def hash_line(parts: Parts) -> str:
    """The result of a hash for the console."""
    state = parts.state.disk_hash
    if state.error:
        return f"pefbox: disk error: {state.error}"
    return f"pefbox: disk sha256 {state.result} bytes {state.position} swiotlb {parts.state.pool.bytes_bounced}"


def start_write(parts: Parts, kind: BlkRequest = BlkRequest.OUT, *, asked: bool) -> str:
    """Begin to write the region at the start of the scratch partition; the reason when it cannot be."""
    first, n_sectors = parts.state.partitions.scratch
    if not parts.state.blk.ready:
        return "no disk"
    if not n_sectors:
        return "the disk has no scratch partition"
    if parts.state.blk.read_only:
        return "the disk is read-only"
    offered = {BlkRequest.DISCARD: parts.state.blk.discard, BlkRequest.WRITE_ZEROES: parts.state.blk.write_zeroes}
    if not offered.get(kind, True):
        return f"the disk does not offer {kind.name}"
    parts.writer.start(first, min(REGION_BYTES, n_sectors * SECTOR_BYTES), kind=kind, asked=asked)
    return ""
