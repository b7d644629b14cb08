"""The prompt: one line in, one line `ok ...` or `error CODE` out (`help` and `reveal` print more before it)."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable

from protocol.codes import UCode
from protocol.declare import Call, Space
from protocol.geometry import PAGE_BYTES, PAGE_SHIFT
from protocol.hcalls import H_CPPR
from protocol.ucalls import ESM_FILE_CHUNK_BYTES, UV_ESMB_GET_FILE, UV_SHARE_PAGE, UV_UNSHARE_PAGE
from services.guest.model import net_commands, xics
from services.guest.model.arguments import Refused, numbers
from services.guest.model.boot import call_esm
from services.guest.model.cpu import OutOfMemory, Step
from services.guest.model.demo import Demo, start_hash, start_write
from services.guest.model.device_commands import DEVICE_HELP, DeviceCommands
from services.guest.model.io_run import MAX_BUFFER_BYTES, MAX_DEPTH, IoKind
from services.guest.model.net_commands import NetCommands
from services.guest.model.pages import PageUse
from services.guest.model.parts import Parts
from services.guest.model.run_tally import MAX_REQUESTS
from services.guest.model.state import Phase
from shared.virtio_blk import SECTOR_BYTES, BlkRequest

HELP = (
    "help, pages, calls       what there is; pages by use; calls made, by name",
    "hash, write              hash the whole disk; write and flush a region of the scratch partition",
    "zero, discard, id        write zeroes to it, or discard it, and flush; the disk's serial number",
    "reveal                   print the demo's secrets",
    "esm, reboot, poweroff    turn secure; reset; end",
    "share GFN [N], unshare GFN [N], touch GFN, fill GFN BYTE, sum GFN",
    "file NAME [OFFSET]       read a file of the ESM blob, once: bytes read (at most 4096) and their SHA-256",
    "pid N                    go on as process N: a file is read by one process alone",
    "io KIND BLOCK DEPTH N    N requests (read, write, randread) of BLOCK bytes, DEPTH at a time, timed",
    *net_commands.HELP,
    "null N                   time N hypercalls that do nothing (median in ns)",
    *DEVICE_HELP,
)
MAX_FILE_CALLS = 64
MAX_PID = (1 << 20) - 1
"""PIDR has 20 bits on POWER9."""
_NAME_WORDS, _WORD_BYTES = 8, 8
NULL_CALLS_A_STEP = 50
MAX_NULL_CALLS = PAGE_BYTES // 4


class Commands:
    """Obeys lines from the console."""

    def __init__(self, parts: Parts, demo: Demo) -> None:
        self._parts = parts
        self._demo = demo
        self._devices = DeviceCommands(parts, self._answer)
        self._net = NetCommands(parts)
        self._commands: dict[str, Callable[[list[str]], Step[str]]] = {
            "help": self._help,
            "pages": self._pages,
            "calls": self._calls,
            "hash": self._hash,
            "write": self._write,
            "zero": self._zero,
            "discard": self._discard,
            "id": self._id,
            "reveal": self._reveal,
            "esm": self._esm,
            "reboot": self._reboot,
            "poweroff": self._poweroff,
            "share": self._share,
            "unshare": self._unshare,
            "touch": self._touch,
            "fill": self._fill,
            "sum": self._sum,
            "file": self._file,
            "pid": self._pid,
            "io": self._io,
            "null": self._null,
            **self._devices.commands,
            **self._net.by_name,
        }

    def work(self) -> Step[None] | None:
        """Obey the next line, or say the outcome of one that took longer."""
        state = self._parts.state
        if state.disk_hash.asked:
            return None if state.disk_hash.active else self._end_hash()
        if state.writer.asked:
            return None if state.writer.stage != 5 else self._end_write()
        if state.io_run.count:
            return self._end_io() if self._parts.io_run.finished else None
        if state.net_run.count:
            return self._end_net() if self._parts.net_run.finished else None
        if state.null_calls.n_calls:
            return self._null_step()
        if self._devices.waiting:
            return self._devices.work()
        return self._obey() if state.console.lines else None

    def _obey(self) -> Step[None]:
        # Looked at, not taken: a busy call runs this step again.
        words = self._parts.state.console.lines[0].split()
        command = self._commands.get(words[0]) if words else None
        try:
            if command is None:
                raise Refused("unknown command; try help")
            answer = yield from command(words[1:])
            if answer:
                answer = f"ok {answer}" if answer != "ok" else "ok"
        except (Refused, OutOfMemory) as refused:
            answer = f"error {refused}"
        self._parts.console.next_line()
        if answer:
            self._answer(answer)

    def _answer(self, line: str) -> None:
        self._parts.console.say(line)
        self._parts.console.prompt()

    # -- what there is ----------------------------------------------------------------------------------------------

    def _help(self, _: list[str]) -> Step[str]:
        for line in HELP:
            self._parts.console.say(line)
        return "ok"
        yield

    def _pages(self, _: list[str]) -> Step[str]:
        state = self._parts.state
        uses = " ".join(f"{name}={count}" for name, count in self._parts.pages.statistics().items())
        if not state.pool.n_slots:
            return uses
        used = self._parts.pool.n_used()
        return f"{uses} slots={state.pool.n_slots} slots_used={used} bounced_bytes={state.pool.bytes_bounced}"
        yield

    def _calls(self, _: list[str]) -> Step[str]:
        return " ".join(f"{name}={n}" for name, n in sorted(self._parts.state.calls.counts.items()))
        yield

    def _reveal(self, _: list[str]) -> Step[str]:
        lines = self._demo.reveal()
        if not lines:
            raise Refused("no secrets planted")
        for line in lines:
            self._parts.console.say(line)
        return "ok"
        yield

    # -- the disk ---------------------------------------------------------------------------------------------------

    def _hash(self, _: list[str]) -> Step[str]:
        state = self._parts.state
        if not state.blk.ready:
            raise Refused(state.blk.error or "no disk")
        if state.bulk.active:
            raise Refused("the disk is being read")
        start_hash(self._parts, asked=True)
        return ""
        yield

    def _end_hash(self) -> Step[None]:
        state = self._parts.state.disk_hash
        state.asked = False
        self._answer(f"error {state.error}" if state.error else f"ok {state.result} {state.position}")
        return
        yield

    def _write(self, _: list[str]) -> Step[str]:
        return (yield from self._write_region(BlkRequest.OUT))

    def _zero(self, _: list[str]) -> Step[str]:
        return (yield from self._write_region(BlkRequest.WRITE_ZEROES))

    def _discard(self, _: list[str]) -> Step[str]:
        return (yield from self._write_region(BlkRequest.DISCARD))

    def _write_region(self, kind: BlkRequest) -> Step[str]:
        if self._parts.state.writer.stage:
            raise Refused("a region is being written")
        refusal = start_write(self._parts, kind, asked=True)
        if refusal:
            raise Refused(refusal)
        return ""
        yield

    def _id(self, _: list[str]) -> Step[str]:
        state = self._parts.state
        if not state.blk.ready or state.writer.stage:
            raise Refused("no disk" if not state.blk.ready else "a region is being written")
        self._parts.writer.start(0, 0, kind=BlkRequest.GET_ID, asked=True)
        return ""
        yield

    def _end_write(self) -> Step[None]:
        state = self._parts.state.writer
        state.asked, state.stage = False, 0
        self._answer(f"error {state.error}" if state.error else f"ok {self._parts.writer.describe()}")
        return
        yield

    # -- the VM -----------------------------------------------------------------------------------------------------

    def _esm(self, _: list[str]) -> Step[str]:
        state = self._parts.state
        if not state.kbase:
            raise Refused("no kernel was loaded")
        if state.blk.ready and state.blk.requests:
            raise Refused("the disk is in use")
        yield from self._parts.quiesce()
        refusal = yield from call_esm(self._parts)
        # Still the old kernel: it goes on with its devices.
        state.n_started, state.phase = 0, Phase.KERNEL_DMA
        for driver in self._parts.extras:
            driver.state.present = False
        raise Refused(refusal)

    def _reboot(self, _: list[str]) -> Step[str]:
        return (yield from self._end_vm("system-reboot", ()))

    def _poweroff(self, _: list[str]) -> Step[str]:
        return (yield from self._end_vm("power-off", (0, 0)))

    def _end_vm(self, service: str, args: tuple[int, ...]) -> Step[str]:
        status, *_ = yield from self._parts.cpu.rtas(service, args, 1)
        if status:
            raise Refused(f"RTAS status {status}")
        self._parts.state.phase = Phase.HALTED
        return "ok"

    def _file(self, words: list[str]) -> Step[str]:
        if not words:
            raise Refused("wrong number of arguments; try help")
        (start,) = numbers(words[1:], 0, (0,))
        content = b""
        for _ in range(MAX_FILE_CALLS):
            chunk = yield from self._file_chunk(words[0], start + len(content))
            content += chunk
            if len(chunk) < ESM_FILE_CHUNK_BYTES:
                break
        return f"{len(content)} {hashlib.sha256(content).hexdigest()}"

    def _pid(self, words: list[str]) -> Step[str]:
        (pid,) = numbers(words, 1)
        if pid > MAX_PID:
            raise Refused(f"a process is 0 to {MAX_PID}")
        self._parts.state.pidr = pid
        return "ok"
        yield

    def _file_chunk(self, name: str, offset: int) -> Step[bytes]:
        raw = name.encode("ascii", "replace").ljust(_NAME_WORDS * _WORD_BYTES, b"\0")[: _NAME_WORDS * _WORD_BYTES]
        named = struct.unpack(f">{_NAME_WORDS}Q", raw)
        n_bytes, *data = yield from self._parts.cpu.ucall_once(UV_ESMB_GET_FILE, offset, *named)
        if n_bytes < 0 or len(data) != _NAME_WORDS:
            raise Refused(Space.UCALL.code(n_bytes))
        return struct.pack(f">{_NAME_WORDS}Q", *data)[:n_bytes]

    # -- pages ------------------------------------------------------------------------------------------------------

    def _share(self, words: list[str]) -> Step[str]:
        return (yield from self._page_call(UV_SHARE_PAGE, words))

    def _unshare(self, words: list[str]) -> Step[str]:
        return (yield from self._page_call(UV_UNSHARE_PAGE, words))

    def _page_call(self, call: Call, words: list[str]) -> Step[str]:
        gfn, n_pages = numbers(words, 1, (1,))
        code, *_ = yield from self._parts.cpu.ucall_once(call, gfn, n_pages)
        if code != UCode.U_SUCCESS:
            raise Refused(Space.UCALL.code(code))
        old, new = (PageUse.FREE, PageUse.LENT) if call is UV_SHARE_PAGE else (PageUse.LENT, PageUse.FREE)
        self._parts.pages.change(gfn, n_pages, old, new)
        return "ok"

    def _touch(self, words: list[str]) -> Step[str]:
        (gfn,) = self._gfn(words)
        return f"{self._parts.cpu.load(gfn << PAGE_SHIFT, 1)[0]:#04x}"
        yield

    def _fill(self, words: list[str]) -> Step[str]:
        gfn, byte = self._gfn(words, 1)
        if not 0 <= byte <= 0xFF:
            raise Refused("a byte is 0 to 255")
        use = self._parts.pages.use_of(gfn)
        if use not in (PageUse.FREE, PageUse.LENT):
            raise Refused(f"page in use: {use.name.lower()}")
        self._parts.cpu.fill(gfn << PAGE_SHIFT, PAGE_BYTES, byte)
        return "ok"
        yield

    def _sum(self, words: list[str]) -> Step[str]:
        (gfn,) = self._gfn(words)
        return hashlib.sha256(self._parts.cpu.load(gfn << PAGE_SHIFT, PAGE_BYTES)).hexdigest()
        yield

    def _gfn(self, words: list[str], n_more: int = 0) -> list[int]:
        gfn, *more = numbers(words, 1 + n_more)
        if not 0 <= gfn < self._parts.state.pages.n_pages:
            raise Refused("no such page")
        return [gfn, *more]

    # -- timing requests ---------------------------------------------------------------------------------------------

    def _io(self, words: list[str]) -> Step[str]:
        kind = _io_kind(words)
        block_bytes, depth, count = numbers(words[1:], 3)
        state = self._parts.state
        if not state.blk.ready:
            raise Refused(state.blk.error or "no disk")
        if block_bytes % SECTOR_BYTES or not 0 < block_bytes <= self._parts.blk.max_bytes:
            raise Refused(f"a block is a multiple of {SECTOR_BYTES} bytes, up to {self._parts.blk.max_bytes}")
        if not 1 <= depth <= MAX_DEPTH or not 1 <= count <= MAX_REQUESTS or depth * block_bytes > MAX_BUFFER_BYTES:
            raise Refused(f"up to {MAX_DEPTH} at a time, {MAX_REQUESTS} in all, {MAX_BUFFER_BYTES} bytes of buffers")
        first, n_sectors = state.partitions.scratch if kind is IoKind.WRITE else (0, state.blk.sectors)
        if n_sectors * SECTOR_BYTES < block_bytes:
            raise Refused("the disk has no such block")
        self._parts.io_run.start(kind, first, n_sectors, block_bytes, depth, count)
        return ""
        yield

    def _end_io(self) -> Step[None]:
        state = self._parts.state.io_run
        self._answer(f"error {state.error}" if state.error else f"ok {self._parts.io_run.describe()}")
        state.count = 0
        return
        yield

    # -- network ----------------------------------------------------------------------------------------------------

    def _end_net(self) -> Step[None]:
        self._answer(self._net.answer())
        return
        yield

    # -- timing -----------------------------------------------------------------------------------------------------

    def _null(self, words: list[str]) -> Step[str]:
        (n_calls,) = numbers(words, 1)
        if not 1 <= n_calls <= MAX_NULL_CALLS:
            raise Refused(f"1 to {MAX_NULL_CALLS} calls")
        state = self._parts.state.null_calls
        state.times = state.times or self._parts.pages.must_alloc(1, PageUse.BUFFER)
        state.n_calls, state.n_done = n_calls, 0
        return ""
        yield

    def _null_step(self) -> Step[None]:
        state, cpu = self._parts.state.null_calls, self._parts.cpu
        times = []
        for _ in range(min(NULL_CALLS_A_STEP, state.n_calls - state.n_done)):
            before = cpu.clock.now_ns()
            yield from cpu.hcall_once(H_CPPR, xics.ALLOW_ALL)
            times.append(min(cpu.clock.now_ns() - before, 0xFFFFFFFF))
        cpu.store(state.times + 4 * state.n_done, struct.pack(f"<{len(times)}I", *times))
        state.n_done += len(times)
        if state.n_done < state.n_calls:
            return
        measured = sorted(memoryview(cpu.load(state.times, 4 * state.n_calls)).cast("I"))
        self._answer(f"ok {state.n_calls} p50_ns {measured[state.n_calls // 2]}")
        state.n_calls = 0


def _io_kind(words: list[str]) -> IoKind:
    try:
        return IoKind(words[0])
    except (IndexError, ValueError):
        raise Refused(f"what to do is one of: {', '.join(IoKind)}") from None
