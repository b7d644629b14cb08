"""What each packet of GDB's remote serial protocol means, over a `Target`; no socket is known here.

`answer` gives the reply to a packet; `Resume` where none is sent yet, since the target runs and its stop is the reply;
`Leave` where it is the last one. One processor is thread 1. A packet of a kind that nobody knows gets the empty reply,
as the protocol has it, malformed arguments an error number.
Source: GDB manual, appendix E (packets, stop replies, general queries).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from protocol.errors import PefboxError
from services.runtime.gdb.block_cache import BlockCache
from services.runtime.gdb.packets import MAX_PACKET_BYTES
from services.runtime.gdb.target import Point, PointKind, Refused, Stop, Target, Unsupported
from services.runtime.gdb.target_xml import target_xml
from shared.gdb_registers import Values

OK = b"OK"
_EMPTY = b""
_BAD_ARGUMENTS = b"E16"
_MAX_DATA_BYTES = MAX_PACKET_BYTES // 2
"""Of memory in one packet: two characters a byte."""
_THREAD = b"1"
_ADDRESS_MASK = (1 << 64) - 1
_MAX_WATCH_BYTES = 4096
_EXPEDITED = ("pc", "r1", "lr")
"""Told with each stop, since GDB asks for them at once."""
_WATCHES = {PointKind.WRITE: "watch", PointKind.READ: "rwatch", PointKind.ACCESS: "awatch"}
_FEATURES = f"PacketSize={MAX_PACKET_BYTES:x};qXfer:features:read+;vContSupported+;QStartNoAckMode+"
_WHY = "why"
"""The monitor command that tells why the last request was refused: GDB itself shows a reason of few of them."""
_XFER = b"qXfer:features:read:"


class BadPacket(Exception):
    """Arguments that do not decode."""


@dataclass(frozen=True, slots=True)
class Resume:
    """The target runs now; its stop is the reply."""

    step: bool


@dataclass(frozen=True, slots=True)
class Leave:
    """The connection is over, but for `reply`, which GDB still waits for if there is one. `kills` says that the VM is
    about to end: it must not run on until it does."""

    reply: bytes = b""
    kills: bool = False


Reply = bytes | Resume | Leave
_Handler = Callable[["Session", bytes], Awaitable[Reply]]


class Session:
    """One debugger on one target."""

    def __init__(self, target: Target) -> None:
        self.acknowledges = True
        """Until QStartNoAckMode."""
        self._target = target
        self._memory = BlockCache(target)
        self._xml = target_xml(target.description)
        self._why_not = "nothing was refused\n"

    async def answer(self, data: bytes) -> Reply:
        """The reply to one packet."""
        if data[:1] not in _LOOKS:
            self._memory.forget()
        try:
            handler, rest = _find(data)
            return _EMPTY if handler is None else await handler(self, rest)
        except Unsupported:
            return _EMPTY
        except (BadPacket, ValueError):
            return _BAD_ARGUMENTS
        except PefboxError as error:
            self._why_not = f"{error}\n"
            return _error(data, error)

    async def stopped(self, stop: Stop) -> bytes:
        """The reply that tells of a stop."""
        parts = [f"T{stop.kind.value:02x}thread:1;"]
        if stop.watch is not None:
            parts.append(f"{_WATCHES[stop.watch]}:{stop.address:x};")
        try:
            values = await self._target.registers()
        except PefboxError:
            values = None
        if values is not None:
            numbers = map(self._target.description.number.__getitem__, _EXPEDITED)
            known = (number for number in numbers if values.values[number] is not None)
            parts += [f"{number:x}:{self._hex(values, number)};" for number in known]
        return "".join(parts).encode()

    # -- state ------------------------------------------------------------------------------------------------

    async def _why(self, _rest: bytes) -> Reply:
        return await self.stopped(await self._target.halt())

    async def _set_thread(self, rest: bytes) -> Reply:
        return OK if rest[1:] in (b"0", b"-1", _THREAD) else b"E22"

    async def _is_alive(self, rest: bytes) -> Reply:
        return OK if rest == _THREAD else b"E22"

    async def _continue(self, rest: bytes) -> Reply:
        return await self._resume(rest, step=False)

    async def _step(self, rest: bytes) -> Reply:
        return await self._resume(rest, step=True)

    async def _continue_signal(self, rest: bytes) -> Reply:
        return await self._resume(rest.partition(b";")[2], step=False)

    async def _step_signal(self, rest: bytes) -> Reply:
        return await self._resume(rest.partition(b";")[2], step=True)

    async def _resume(self, address: bytes, *, step: bool) -> Reply:
        if address:
            await self._target.set_register(self._target.description.number["pc"], _number(address))
        return Resume(step)

    async def _vcont(self, rest: bytes) -> Reply:
        # One thread: the first action is the one that it gets.
        action = rest.partition(b";")[0][:1]
        if action in (b"c", b"C"):
            return Resume(step=False)
        if action in (b"s", b"S"):
            return Resume(step=True)
        raise BadPacket

    async def _vcont_actions(self, _rest: bytes) -> Reply:
        return b"vCont;c;C;s;S"

    async def _detach(self, _rest: bytes) -> Reply:
        return Leave(OK)

    async def _kill(self, _rest: bytes) -> Reply:
        await self._target.kill()
        return Leave(kills=True)

    async def _kill_process(self, _rest: bytes) -> Reply:
        await self._target.kill()
        return Leave(OK, kills=True)

    # -- registers --------------------------------------------------------------------------------------------

    def _hex(self, values: Values, number: int) -> str:
        register, value = self._target.description.registers[number], values.values[number]
        if value is None:
            return "xx" * register.n_bytes
        return value.to_bytes(register.n_bytes, values.order).hex()

    async def _read_registers(self, _rest: bytes) -> Reply:
        values = await self._target.registers()
        return "".join(self._hex(values, number) for number in range(len(values.values))).encode()

    async def _write_registers(self, rest: bytes) -> Reply:
        before = await self._target.registers()
        at = 0
        for number, register in enumerate(self._target.description.registers):
            text = rest[at : at + 2 * register.n_bytes]
            at += len(text)
            if len(text) < 2 * register.n_bytes:
                break
            if b"x" not in text:
                value = int.from_bytes(bytes.fromhex(text.decode()), before.order)
                if value != before.values[number]:
                    await self._target.set_register(number, value)
        return OK

    async def _read_register(self, rest: bytes) -> Reply:
        number = self._register(rest)
        return self._hex(await self._target.registers(), number).encode()

    async def _write_register(self, rest: bytes) -> Reply:
        name, _, text = rest.partition(b"=")
        number = self._register(name)
        data = bytes.fromhex(text.decode())
        if len(data) != self._target.description.registers[number].n_bytes:
            raise BadPacket
        order = (await self._target.registers()).order
        await self._target.set_register(number, int.from_bytes(data, order))
        return OK

    def _register(self, text: bytes) -> int:
        number = _number(text)
        if number >= len(self._target.description.registers):
            raise BadPacket
        return number

    # -- memory -----------------------------------------------------------------------------------------------

    async def _read_memory(self, rest: bytes) -> Reply:
        address, n_bytes = _range(rest)
        if not n_bytes:
            return _EMPTY
        return (await self._memory.read(address, min(n_bytes, _MAX_DATA_BYTES))).hex().encode()

    async def _write_memory(self, rest: bytes) -> Reply:
        place, _, text = rest.partition(b":")
        return await self._write(place, bytes.fromhex(text.decode()))

    async def _write_binary(self, rest: bytes) -> Reply:
        place, _, data = rest.partition(b":")
        return await self._write(place, data)

    async def _write(self, place: bytes, data: bytes) -> Reply:
        address, n_bytes = _range(place)
        if n_bytes != len(data):
            raise BadPacket
        if data:
            await self._target.write(address, data)
        return OK

    async def _insert(self, rest: bytes) -> Reply:
        await self._target.insert(_point(rest))
        return OK

    async def _remove(self, rest: bytes) -> Reply:
        await self._target.remove(_point(rest))
        return OK

    # -- queries ----------------------------------------------------------------------------------------------

    async def _supported(self, _rest: bytes) -> Reply:
        return _FEATURES.encode()

    async def _no_acks(self, _rest: bytes) -> Reply:
        self.acknowledges = False
        return OK

    async def _features(self, rest: bytes) -> Reply:
        annex, _, place = rest.partition(b":")
        if annex != b"target.xml":
            return b"E00"
        offset, n_bytes = _range(place)
        part = self._xml[offset : offset + min(n_bytes, _MAX_DATA_BYTES)]
        more = b"m" if offset + len(part) < len(self._xml) else b"l"
        return more + part

    async def _first_threads(self, _rest: bytes) -> Reply:
        return b"m" + _THREAD

    async def _more_threads(self, _rest: bytes) -> Reply:
        return b"l"

    async def _current_thread(self, _rest: bytes) -> Reply:
        return b"QC" + _THREAD

    async def _thread_info(self, _rest: bytes) -> Reply:
        return b"vcpu 0".hex().encode()

    async def _attached(self, _rest: bytes) -> Reply:
        # So that GDB detaches when it quits.
        return b"1"

    async def _monitor(self, rest: bytes) -> Reply:
        words = bytes.fromhex(rest.decode()).decode(errors="replace").split()
        if words == [_WHY]:
            return self._why_not.encode().hex().encode()
        try:
            text = await self._target.monitor(words)
        except PefboxError as error:
            text = f"{error}\n"
        return text.encode()[:_MAX_DATA_BYTES].hex().encode() or OK


_HANDLERS: dict[bytes, _Handler] = {
    b"qSupported": Session._supported,
    _XFER: Session._features,
    b"qfThreadInfo": Session._first_threads,
    b"qsThreadInfo": Session._more_threads,
    b"qThreadExtraInfo,": Session._thread_info,
    b"qAttached": Session._attached,
    b"qC": Session._current_thread,
    b"qRcmd,": Session._monitor,
    b"QStartNoAckMode": Session._no_acks,
    b"vCont?": Session._vcont_actions,
    b"vCont;": Session._vcont,
    b"vKill;": Session._kill_process,
    b"?": Session._why,
    b"g": Session._read_registers,
    b"G": Session._write_registers,
    b"p": Session._read_register,
    b"P": Session._write_register,
    b"m": Session._read_memory,
    b"M": Session._write_memory,
    b"X": Session._write_binary,
    b"Z": Session._insert,
    b"z": Session._remove,
    b"c": Session._continue,
    b"s": Session._step,
    b"C": Session._continue_signal,
    b"S": Session._step_signal,
    b"H": Session._set_thread,
    b"T": Session._is_alive,
    b"D": Session._detach,
    b"k": Session._kill,
}
"""By what a packet begins with. Of names that begin with a q, Q or v the whole name counts, and no other packet may be
taken for one of a single letter."""
_LETTERS = frozenset(name for name in _HANDLERS if len(name) == 1)
_NAMES = tuple(name for name in _HANDLERS if len(name) > 1)
_LOOKS = frozenset({b"m", b"g", b"p"})
"""Packets that change nothing."""
_TEXT_ERRORS = frozenset(b"PGMXZz")
"""Packets after whose reply GDB shows the text of an error."""


def _find(data: bytes) -> tuple[_Handler | None, bytes]:
    """What serves a packet, and what follows its name."""
    for name in _NAMES:
        rest = data[len(name) :]
        if data.startswith(name) and (not name[-1:].isalpha() or not rest or rest[:1] in b":;,"):
            return _HANDLERS[name], rest
    letter = data[:1]
    return (_HANDLERS[letter], data[1:]) if letter in _LETTERS else (None, b"")


def _error(data: bytes, error: PefboxError) -> bytes:
    if data[:1] and data[0] in _TEXT_ERRORS:
        return f"E.{error}".encode()
    return b"E%02x" % (error.code if isinstance(error, Refused) else 1)


def _number(text: bytes) -> int:
    """A number of at most 64 bits, in hexadecimal without a sign."""
    if not text.isalnum() or len(text) > 16:
        raise BadPacket
    return int(text, 16)


def _range(text: bytes) -> tuple[int, int]:
    address, _, n_bytes = text.partition(b",")
    return _number(address), _number(n_bytes)


def _point(text: bytes) -> Point:
    fields = text.partition(b";")[0].split(b",")
    if len(fields) != 3:
        raise BadPacket
    kind, address, n_bytes = map(_number, fields)
    if kind not in list(PointKind):
        raise Unsupported
    point = Point(PointKind(kind), address, n_bytes)
    if point.kind.is_watch and not 1 <= n_bytes <= min(_MAX_WATCH_BYTES, _ADDRESS_MASK + 1 - address):
        raise BadPacket
    return point
