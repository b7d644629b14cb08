"""Real GDB on VMs, with the owner's eyes and with the host's: a program of our own, the model kernel, Linux."""

from __future__ import annotations

import json
import random
import re
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from deploy.api import RunningCluster, Vm, cluster, processes_of
from deploy.run_program import RunOrder, check_program, cluster_text, program_blob
from protocol.errors import UserError
from services.runtime.gdb.packets import encode
from tests.cluster.conftest import MINIMAL
from tests.cluster.moving import travelling
from tests.cluster.two_hosts import VM_OF, running_hosts
from tests.cluster.two_hosts import cluster_text as cluster_text_of
from tests.cluster.vm_files import console_until
from tests.gdb_client import GDB, BackgroundGdb, RawClient, Said, gdb
from tests.guest.build import build_program
from tests.needs import need_cross_compilers, need_linux, need_program

VM = "program"
TEXT = "plain text of the guest"
READY = "ready to be debugged"
LEFT = '"debugger left"'


def program(endian: str) -> Path:
    need_cross_compilers()
    return build_program("debuggee", endian)


@asynccontextmanager
async def debuggee(
    directory: Path, order: RunOrder, *, debuggable: bool = True
) -> AsyncIterator[tuple[RunningCluster, Vm]]:
    """A cluster whose only VM runs `order`."""
    file, state_dir = _files(directory, order, debuggable)
    async with cluster(file, state_dir=state_dir) as running:
        yield running, running.vm(VM)


def _files(directory: Path, order: RunOrder, debuggable: bool) -> tuple[Path, Path]:
    state_dir, blob = directory / "state", None
    state_dir.mkdir(mode=0o700)
    if order.secure:
        blob = program_blob(check_program(order.program, order.memory_bytes), order, state_dir)
    text = cluster_text(order, blob)
    if debuggable:
        text = text.replace(f"[vms.{VM}]\n", f"[vms.{VM}]\ndebuggable = true\n")
    file = directory / "c.toml"
    file.write_text(text)
    return file, state_dir


def looped(endian: str, *, secure: bool) -> RunOrder:
    """The program that counts until a debugger lets it go."""
    return RunOrder(program=program(endian), secure=secure, time="wall", command_line="secure" if secure else "")


async def rounds(vm: Vm, elf: Path) -> int:
    """How far the program is, by its owner's eyes."""
    said = await gdb(await vm.gdb_port(), "p (unsigned long)rounds", program=elf)
    return int(said.line("$1 ="))


async def goes_on(vm: Vm, elf: Path) -> bool:
    """Whether the program runs, though nobody debugs it."""
    return await rounds(vm, elf) < await rounds(vm, elf)


# -- a program in a secure VM -----------------------------------------------------------------------------------------


@pytest.mark.cross
async def test_a_secure_vm_by_its_owners_eyes_and_by_its_hosts(tmp_path: Path) -> None:
    elf = program("le")
    async with debuggee(tmp_path, looped("le", secure=True)) as (running, vm):
        await vm.secure()
        await console_until(vm, READY)
        owner, host = await vm.gdb_port("owner"), await vm.gdb_port("host")

        _owner_debugs(await gdb(owner, *OWNER_COMMANDS, program=elf))
        _host_sees_ciphertext(await gdb(host, *HOST_COMMANDS, program=elf))

        assert await goes_on(vm, elf)
        assert '"VCPU_REGISTERS from kvm while S is set"' in vm.guest.log()
        await _a_debugger_disappears(vm, elf, tmp_path / "told")
        await _one_at_a_time(vm)
        await _a_port_keeps_its_number_and_another_is_in_use(running, vm, owner)
        said = await gdb(owner, "set var *(unsigned long *)&let_go = 1", "detach", program=elf)
        assert "detached" in said
        await console_until(vm, "let go")
        assert (await vm.wait_state("off")).state == "off"


OWNER_COMMANDS = (
    "x/s (char *)&secret",
    "break work",
    "continue",
    "info registers pc msr",
    "bt 2",
    "stepi 3",
    "info registers pc",
    "delete",
    "watch *(unsigned long *)&rounds",
    "continue",
    "continue",
    "delete",
    "rwatch *(unsigned long *)&let_go",
    "continue",
    "delete",
    "set var $f1 = 1.5",
    "p $f1",
    "set var $vr2.v4_int32[0] = 77",
    "p $vr2.v4_int32[0]",
    "p/x $vs1",
    "p $vscr",
    "monitor spr pvr",
    "monitor translate 0xc000000000001000",
    "x/x 0xf0000000",
    "monitor why",
    "set var *(unsigned char *)&table[1] = 9",
    "detach",
)


def _owner_debugs(said: Said) -> None:
    assert f'"{TEXT}"' in said
    assert re.search(r"Breakpoint 1, 0x[0-9a-f]+ in work \(\)", said.text)
    assert int(said.line("msr").split()[0], 0) & 1 << 22, "MSR.S is shown"
    assert re.search(r"#0 .* in work \(\)\n#1 .* in program \(\)", said.text)
    assert said.text.count("Hardware watchpoint 2: ") == 3
    old = [int(value) for value in re.findall(r"Old value = (\d+)", said.text)]
    new = [int(value) for value in re.findall(r"New value = (\d+)", said.text)]
    assert new == [value + 1 for value in old]
    assert "Hardware read watchpoint 3" in said
    assert "Value = 0" in said
    assert "= 1.5" in said
    assert "= 77" in said
    assert "= <unavailable>" in said
    assert said.line("PVR").split()[0] == "287"
    assert "0x1000" in said
    assert "Cannot access memory at address 0xf0000000" in said
    assert "no memory" in said
    assert "detached" in said


HOST_COMMANDS = (
    "x/s (char *)&secret",
    "info registers pc r1 msr",
    "set var $r3 = 1",
    "set var *(unsigned long *)&let_go = 1",
    "monitor why",
    "break work",
    "continue",
    "monitor why",
    "delete",
    "stepi",
    "x/x 0xf0000000",
    "detach",
)


def _host_sees_ciphertext(said: Said) -> None:
    """S1."""
    assert TEXT not in said
    assert said.text.count("<unavailable>") == 2
    assert "the page of" in said
    assert "secure: the host cannot change it" in said
    assert "Cannot insert breakpoint" in said
    assert said.text.count("the VM is secure: its registers and its code are for its owner's debugger alone") >= 2
    assert "Cannot access memory at address 0xf0000000" in said
    assert "detached" in said


async def _a_debugger_disappears(vm: Vm, elf: Path, told: Path) -> None:
    """While the VM stands still, and, killed, while it runs with a breakpoint."""
    for view in ("owner", "host"):
        async with RawClient.attached(await vm.gdb_port(view)):
            pass
        assert await goes_on(vm, elf)
    gone = BackgroundGdb(await vm.gdb_port(), "break program", f"shell touch {told}", "continue", program=elf)
    await _goes_on_under_gdb(vm, told)
    gone.kill()
    assert await goes_on(vm, elf)


async def _goes_on_under_gdb(vm: Vm, told: Path) -> None:
    """Until GDB has made the file `told`, and let the VM go on after that."""
    with trio.fail_after(30):
        while True:
            if _was_told(told) and (await vm.guest.query("vm.status"))["state"] == "running":
                return
            await trio.sleep(0.02)


def _was_told(told: Path) -> bool:
    return told.exists()


async def _one_at_a_time(vm: Vm) -> None:
    port = await vm.gdb_port()
    async with RawClient.attached(port):
        with pytest.raises(EOFError):
            async with RawClient.attached(port):
                pass


async def _a_port_keeps_its_number_and_another_is_in_use(running: RunningCluster, vm: Vm, owner: int) -> None:
    assert await vm.gdb_port("owner", owner) == owner
    with pytest.raises(UserError, match=f"has port {owner} already"):
        await vm.gdb_port("owner", owner + 1)
    for view in ("nobody", "", "owner/host"):
        with pytest.raises(UserError, match="there are: host, owner"):
            await vm.gdb_port(view)
    assert (await running.status()).hosts


# -- a program in a normal VM -----------------------------------------------------------------------------------------

NORMAL_HOST_COMMANDS = (
    "x/s (char *)&secret",
    "break work",
    "continue",
    "stepi 2",
    "info registers pc",
    "delete",
    "watch *(unsigned long *)&rounds",
    "continue",
    "delete",
    "set var $r20 = 0x1234",
    "p/x $r20",
    "monitor spr pvr",
    "monitor nothing",
    "x/x 0xf0000000",
    "kill",
)


@pytest.mark.cross
async def test_the_host_debugs_a_normal_vm_whether_debuggable_or_not(tmp_path: Path) -> None:
    """Of a normal VM the host sees everything anyway."""
    elf = program("be")
    async with debuggee(tmp_path, looped("be", secure=False), debuggable=False) as (_, vm):
        await console_until(vm, READY)
        with pytest.raises(UserError, match="debuggable = true") as refused:
            await vm.gdb_port("owner")
        assert "\n" not in str(refused.value)

        said = await gdb(await vm.gdb_port("host"), *NORMAL_HOST_COMMANDS, program=elf)

        assert f'"{TEXT}"' in said
        assert "Breakpoint 1, " in said
        assert "New value = " in said
        assert "= 0x1234" in said
        assert said.line("PVR").split()[0] == "287"
        assert "commands of this processor" in said
        assert "Cannot access memory at address 0xf0000000" in said
        assert "killed" in said
        assert (await vm.wait_state("off")).reason == "quit"


@pytest.mark.cross
async def test_an_owner_interrupts_and_kills_and_both_views_exclude_each_other(tmp_path: Path) -> None:
    elf = program("be")
    async with debuggee(tmp_path, looped("be", secure=False)) as (_, vm):
        await console_until(vm, READY)
        owner = await vm.gdb_port("owner")
        told = tmp_path / "told"
        runs = BackgroundGdb(owner, f"shell touch {told}", "continue", "info registers pc", "detach", program=elf)
        await _goes_on_under_gdb(vm, told)
        said = runs.interrupt()
        assert "Program received signal SIGINT" in said
        assert "detached" in said

        async with RawClient.attached(owner):
            said = await gdb(await vm.gdb_port("host"), "break work", "continue", "monitor why", program=elf)
        assert "the guest's owner debugs it now" in said

        assert "killed" in await gdb(owner, "kill", program=elf)
        assert (await vm.wait_state("off")).reason == "killed by its debugger"


@pytest.mark.cross
@pytest.mark.parametrize("role", ["kvm", "guest"])
async def test_l1_a_vm_goes_on_whose_debugger_died_while_kvm_or_its_processor_stood_still(
    tmp_path: Path, role: str
) -> None:
    elf = program("be")
    async with debuggee(tmp_path, looped("be", secure=False)) as (running, vm):
        await console_until(vm, READY)
        held_up = vm.guest if role == "guest" else running.process(f"{await vm.host()}/kvm")
        async with RawClient.attached(await vm.gdb_port("host")) as client:
            assert await client.ask(f"Z2,{address_of('rounds', elf):x},8".encode()) == b"OK"
            assert (await client.ask(b"c")).startswith(b"T05")
            await held_up.stop()
            await held_up.wait_state("stopped")
        await trio.sleep(1)
        assert LEFT not in vm.qemu.log()
        await held_up.resume()

        with trio.fail_after(30):
            await _host_view_is_left(vm)
        assert {(await process.query("vm.status"))["state"] for process in (vm.qemu, vm.guest)} == {"running"}
        assert await goes_on(vm, elf)


async def _host_view_is_left(vm: Vm) -> None:
    while True:
        if LEFT in vm.qemu.log():
            return
        await trio.sleep(0.1)


def address_of(symbol: str, elf: Path) -> int:
    with elf.open("rb") as file:
        table = ELFFile(file).get_section_by_name(".symtab")
        assert isinstance(table, SymbolTableSection)
        found = table.get_symbol_by_name(symbol)
        assert found
        return int(found[0]["st_value"])


# -- the model kernel -------------------------------------------------------------------------------------------------

MODEL_COMMANDS = (
    "info registers phase calls kbase",
    "stepi 3",
    "x/4xb 0x100",
    "set var *(unsigned char *)0x3000000 = 0x5a",
    "x/xb 0x3000000",
    "monitor state",
    "p $r1",
    "set var $phase = 3",
    "hbreak *0x100",
    "continue",
    "x/x 0x10000000",
    "detach",
)


async def test_the_model_kernel_has_memory_and_named_registers(tmp_path: Path) -> None:
    text = MINIMAL.read_text().replace('memory = "64M"', 'memory = "64M"\ndebuggable = true')
    (tmp_path / "c.toml").write_text(text)
    async with cluster(tmp_path / "c.toml", state_dir=tmp_path / "state") as running:
        vm = running.vm("vm1")
        await console_until(vm, "\r\n> ")
        for view in ("owner", "host"):
            said = await gdb(await vm.gdb_port(view), *MODEL_COMMANDS, order="big")

            assert said.line("phase").split()[0] == "0x14"
            assert "phase RUN workload prompt" in said
            assert re.search(r"0x3000000:\s+0x5a", said.text)
            assert "= <unavailable>" in said
            assert "Could not write register" in said
            assert "Cannot insert hardware breakpoint" in said
            assert "Cannot access memory at address 0x10000000" in said
            await _garbage(await vm.gdb_port(view))
        assert "pages" in await vm.console_command("help")
        assert {row.state for row in processes_of(await running.status())} == {"running"}
        for process in (vm.guest, vm.qemu):
            assert '"level": "error"' not in process.log()


async def _garbage(port: int) -> None:
    """S5: what no debugger sends, an endless packet among it; returns when the other end had enough, or all of it."""
    rubbish = random.Random(7).randbytes(100_000)
    with suppress(trio.BrokenResourceError):
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            for part in (
                rubbish,
                b"$" + b"a" * 1_000_000 + b"#00",
                b"$c#63" * 100,
                b"\x03" * 1000,
                encode(b"m0,ffffffff"),
            ):
                await stream.send_all(part)


async def test_a_vm_moves_out_of_its_debuggers_hands_and_the_same_port_finds_it(tmp_path: Path) -> None:
    text = cluster_text_of(VM_OF).replace("secure = true", "secure = true\ndebuggable = true")
    async with running_hosts(tmp_path, text) as running:
        vm = running.vm("vm1")
        port = await vm.gdb_port()
        async with RawClient.attached(port) as client:
            await vm.migrate("beta")

            with pytest.raises(EOFError):
                await client.ask(b"g")
        assert "pages" in await vm.console_command("help")
        async with RawClient.attached(port) as client:
            assert bytes.fromhex((await client.ask(b"m0,4")).decode())
        assert (await vm.row()).secure
        assert await vm.host() == "beta"


@pytest.mark.parametrize("secure", [True, False])
async def test_a_vm_that_the_hosts_debugger_held_goes_on_where_it_arrives(tmp_path: Path, secure: bool) -> None:
    async with travelling(tmp_path, secure=secure) as traveller:
        async with RawClient.attached(await traveller.vm.gdb_port("host")) as client:
            await traveller.vm.migrate("beta")

            with pytest.raises(EOFError):
                await client.ask(b"g")
        assert (await traveller.ask("pages")).startswith("ok ")
        async with RawClient.attached(await traveller.vm.gdb_port("host")):
            await traveller.vm.snapshot(tmp_path / "vm1.snapshot")
        await traveller.vm.restore(tmp_path / "vm1.snapshot")
        assert (await traveller.ask("pages")).startswith("ok ")


# -- Linux ------------------------------------------------------------------------------------------------------------

LINUX_COMMANDS = (
    "break arch_cpu_idle",
    "continue",
    "bt 4",
    "info registers pc msr",
    "delete",
    "x/s (char *)&linux_banner",
    "stepi 5",
    "tbreak timer_interrupt",
    "continue",
    "watch *(unsigned long *)&jiffies_64",
    "continue",
    "detach",
)


@pytest.mark.linux
async def test_the_symbols_of_a_real_kernel_find_a_secure_linux(tmp_path: Path) -> None:
    image = need_linux()
    order = RunOrder(
        program=Path(image.kernel),
        initrd=Path(image.initramfs),
        secure=True,
        memory_bytes=256 << 20,
        time="wall",
        command_line="console=hvc0 svm=on swiotlb=force",
    )
    async with debuggee(tmp_path, order) as (_, vm):
        await vm.secure()
        owner, host = await vm.gdb_port("owner"), await vm.gdb_port("host")

        said = await gdb(owner, *LINUX_COMMANDS, program=Path(image.kernel))
        assert re.search(r"#0 .* in arch_cpu_idle \(\)\n#1 .* in default_idle_call \(\)\n#2 .* in do_idle", said.text)
        assert int(said.line("msr").split()[0], 0) & 1 << 22
        assert '"Linux version 6.1' in said
        assert re.search(r"Temporary breakpoint 2, 0x[0-9a-f]+ in timer_interrupt", said.text)
        assert "New value = " in said

        said = await gdb(host, "x/s (char *)&linux_banner", "detach", program=Path(image.kernel))
        assert "Linux version" not in said

        await console_until(vm, "# ", seconds=60)
        await vm.console_write(b"echo still; echo here\r")
        await console_until(vm, "still\r\nhere", seconds=30)


# -- the command ------------------------------------------------------------------------------------------------------


async def test_the_command_prints_a_port_and_says_what_is_wrong_in_one_line(
    minimal_cluster: RunningCluster,
) -> None:
    need_program(GDB, GDB)

    async def pefbox(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "deploy.cli", "gdb", "--cluster", minimal_cluster.name, *words]
        return await trio.to_thread.run_sync(lambda: subprocess.run(command, capture_output=True, text=True))

    with socket.create_server(("127.0.0.1", 0)) as taken:
        used = taken.getsockname()[1]
        refused = await pefbox("vm1", "--view", "host", "--port", str(used))
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == f"pefbox: port {used} is in use: name another one, or none for any that is free\n"

    printed = await pefbox("vm1", "--view", "host")
    port = int(re.findall(r"port (\d+), big-endian", printed.stdout)[0])
    assert f"'target remote 127.0.0.1:{port}'" in printed.stdout
    facts = json.loads((await pefbox("vm1", "--view", "host", "--json")).stdout)
    assert facts == {"vm": "vm1", "view": "host", "host": "127.0.0.1", "port": port, "order": "big"}

    for words, reason in (
        (("vm1",), "vm1 is not debuggable"),
        (("vm9",), 'no VM "vm9"'),
        (("vm1", "--view", "host", "--port", "70000"), "has port"),
    ):
        refused = await pefbox(*words)
        assert refused.returncode == 1
        assert refused.stderr.count("\n") == 1
        assert reason in refused.stderr
    assert (await pefbox("vm1", "--view", "host", "extra")).returncode == 2

    commands = ("-ex", "p/x $kbase", "-ex", "detach")
    ran = await pefbox("vm1", "--view", "host", "--run", "--", "-nx", "-q", "-batch", *commands)
    assert ran.returncode == 0, ran.stderr
    assert "$1 = 0x" in ran.stdout
    assert "detached" in ran.stdout
    assert "not being run" not in ran.stderr
