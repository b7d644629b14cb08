"""`gdb_step`: single steps a second through GDB's protocol, and how many of them real GDB makes."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from deploy.api import Vm, cluster
from deploy.run_program import RunOrder, check_program, cluster_text, program_blob
from protocol.errors import UserError
from tests.bench.figure import Budget, Figure, Kind, Round
from tests.gdb_client import GDB, RawClient, gdb
from tests.guest.build import ENDIANS, build_program

STEPS_A_SECOND = 500.0
N_STEPS = 500
_ENDIAN = "le"
_VM = "program"


async def measure(n_rounds: int) -> list[Figure]:
    """A secure VM by its owner's eyes, then a normal one by its host's: one that nobody steps takes a core."""
    program = await trio.to_thread.run_sync(_program)
    steps, real_steps, host_steps = [], [], []
    async with _debuggee(program, secure=True) as vm:
        await vm.secure()
        port = await vm.gdb_port("owner")
        for _ in range(n_rounds):
            steps.append(Round(await _steps(port)))
            real_steps.append(Round(await _real_steps(port, program)))
    async with _debuggee(program, secure=False) as vm:
        port = await vm.gdb_port("host")
        for _ in range(n_rounds):
            host_steps.append(Round(await _steps(port)))
    return [
        Figure("gdb_step", "1/s", steps, Budget(Kind.VALUE_AT_LEAST, STEPS_A_SECOND)),
        Figure("gdb_step_host", "1/s", host_steps),
        Figure("gdb_step_real", "1/s", real_steps),
    ]


def _program() -> Path:
    compiler = ENDIANS[_ENDIAN][0]
    for program, package in ((compiler, f"gcc-{compiler.removesuffix('-gcc')}"), (GDB, GDB)):
        if shutil.which(program) is None:
            raise UserError(f"no {program}; run: apt-get install {package}")
    try:
        return build_program("debuggee", _ENDIAN)
    except subprocess.CalledProcessError as error:
        raise UserError(f"the program to debug does not build: {error}") from None


@asynccontextmanager
async def _debuggee(program: Path, *, secure: bool) -> AsyncIterator[Vm]:
    """A VM that runs the loop of `tests/guest/programs/debuggee.c`."""
    words = "secure" if secure else ""
    order = RunOrder(program=program, secure=secure, time="wall", command_line=words)
    with tempfile.TemporaryDirectory(prefix="pefbox-bench-") as directory:
        file = await trio.to_thread.run_sync(_write_cluster_file, Path(directory), order)
        async with cluster(file, state_dir=file.parent) as running:
            yield running.vm(_VM)


def _write_cluster_file(directory: Path, order: RunOrder) -> Path:
    blob = program_blob(check_program(order.program, order.memory_bytes), order, directory) if order.secure else None
    file = directory / "c.toml"
    file.write_text(cluster_text(order, blob).replace(f"[vms.{_VM}]\n", f"[vms.{_VM}]\ndebuggable = true\n"))
    return file


async def _steps(port: int) -> float:
    async with RawClient.attached(port) as client:
        started = time.perf_counter()
        for _ in range(N_STEPS):
            reply = await client.ask(b"vCont;s:1")
            if not reply.startswith(b"T05"):
                raise UserError(f"a step ended with {reply!r}")
        return N_STEPS / (time.perf_counter() - started)


async def _real_steps(port: int, program: Path) -> float:
    """With a program's symbols GDB looks at the code around each place that it comes to."""
    clock = "python import time; began = time.perf_counter()"
    told = "python print('seconds', time.perf_counter() - began)"
    said = await gdb(port, "stepi", clock, f"stepi {N_STEPS}", told, "detach", program=program)
    return N_STEPS / float(said.line("seconds"))
