"""Real GDB on a port, told what to do by a script; and a client of our own, for what GDB does not do on purpose."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from services.runtime.gdb.packets import encode
from tests.needs import need_program

GDB = "gdb-multiarch"
SECONDS = 60.0


@dataclass(frozen=True)
class Said:
    """What GDB printed, standard error too."""

    text: str

    def line(self, begin: str) -> str:
        """The rest of the line that begins so."""
        lines = [line for line in self.text.splitlines() if line.startswith(begin)]
        assert lines, f"no line {begin!r} in:\n{self.text}"
        return lines[0].removeprefix(begin).strip()

    def __contains__(self, part: str) -> bool:
        return part in self.text


async def gdb(port: int, *commands: str, program: Path | None = None, order: str = "little") -> Said:
    """Run GDB with `commands` one by one, also behind one that fails, and return when it has ended."""
    need_program(GDB, GDB)
    done = await trio.run_process(
        _command(port, commands, program, order), capture_stdout=True, stderr=subprocess.STDOUT, check=False
    )
    return Said(done.stdout.decode(errors="replace"))


def _command(port: int, commands: tuple[str, ...], program: Path | None, order: str) -> list[str]:
    words = [GDB, "-nx", "-q", "-batch", "-ex", f"set remotetimeout {SECONDS:.0f}"]
    words += [str(program)] if program is not None else ["-ex", f"set endian {order}"]
    for command in (f"target remote 127.0.0.1:{port}", *commands):
        words += ["-ex", command]
    return words


class BackgroundGdb:
    """GDB that runs until it is interrupted or killed."""

    def __init__(self, port: int, *commands: str, program: Path | None = None) -> None:
        need_program(GDB, GDB)
        self._process = subprocess.Popen(
            _command(port, commands, program, "little"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def kill(self) -> None:
        """SIGKILL: it disappears."""
        self._process.kill()
        self._process.communicate()

    def interrupt(self) -> Said:
        """Ctrl-C, and what it said in all."""
        os.kill(self._process.pid, signal.SIGINT)
        return Said(self._process.communicate(timeout=SECONDS)[0].decode(errors="replace"))


class RawClient:
    """The protocol itself, without acknowledgements."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._received = b""

    @classmethod
    @asynccontextmanager
    async def attached(cls, port: int) -> AsyncIterator[RawClient]:
        """A client that disappears at the end without a word; raises EOFError when it is turned away."""
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            client = cls(stream)
            assert await client.ask(b"QStartNoAckMode") == b"OK"
            assert (await client.ask(b"?")).startswith(b"T")
            yield client

    async def ask(self, data: bytes) -> bytes:
        """The reply to one packet; raises EOFError when the connection is closed instead."""
        await self._stream.send_all(encode(data))
        return await self.hear()

    async def hear(self) -> bytes:
        """The next packet."""
        with trio.fail_after(SECONDS):
            while True:
                packet, hash_, rest = self._received.partition(b"#")
                if hash_ and len(rest) >= 2:
                    self._received = rest[2:]
                    return packet[packet.index(b"$") + 1 :]
                try:
                    piece = await self._stream.receive_some(0x10000)
                except trio.BrokenResourceError:
                    piece = b""
                if not piece:
                    raise EOFError
                self._received += piece
