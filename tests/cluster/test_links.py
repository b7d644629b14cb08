"""Links between hosts are slow, lossy or cut, for networks and migrations alike, and change while all goes on."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import trio

from deploy.api import RunningCluster
from protocol.errors import UserError
from tests.cluster.moving import Traveller, settled, travelling
from tests.cluster.test_model_network import _HEAD, MACS, RUN, ask, with_card
from tests.cluster.test_move_fake import ARRIVED, says, seen, two_hosts, under_way, until_phase
from tests.cluster.two_hosts import running_hosts
from tests.cluster.vm_files import answer_of, console_end, console_while

LINK = '[[links]]\nbetween = ["alpha", "beta"]\n'
PLAIN = {"latency_ms": 0.0, "jitter_ms": 0.0, "bandwidth_bytes_per_second": 0, "loss": 0.0, "down": False}
FILLED = range(700, 716)
MIB = 1 << 20
ENDED = re.compile(r"\n(ok|error).*\r\n> $")
"""A command has answered, and the whole of it is there."""


def pefbox(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "deploy.cli", *arguments], capture_output=True, text=True, timeout=60)


async def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return await trio.to_thread.run_sync(pefbox, *arguments)


# -- what is told ---------------------------------------------------------------------------------------------


async def told(running: RunningCluster, target: str) -> list[dict[str, Any]]:
    """The shapes that a qemu was told, in their order, without their numbers."""
    prefix = "link.shape "
    events = (await seen(running, target))["events"]
    shapes = [ast.literal_eval(event.removeprefix(prefix)) for event in events if event.startswith(prefix)]
    assert [shape["number"] for shape in shapes] == sorted({shape["number"] for shape in shapes})
    return [{"peers": shape["peers"], "migration": shape["migration"]} for shape in shapes]


async def test_qemus_are_told_what_lies_between_them_and_hear_nothing_of_plain_links(tmp_path: Path) -> None:
    async with two_hosts(tmp_path, LINK + "latency = 5\n") as running:
        slow = {**PLAIN, "latency_ms": 5.0}
        assert await told(running, "vm1/qemu") == await told(running, "vm2/qemu") == []
        vm = await under_way(running)
        assert (await told(running, "vm1/qemu"))[-1] == {"peers": {}, "migration": slow}
        # On the other host it will be across the link from vm2.
        assert (await told(running, ARRIVED))[-1] == {"peers": {"vm2/qemu": slow}, "migration": slow}

        lossy = {**slow, "loss": 0.5}
        row = await running.link("beta", "alpha", loss=0.5)
        assert row.between == ("alpha", "beta")
        assert (await told(running, ARRIVED))[-1] == {"peers": {"vm2/qemu": lossy}, "migration": lossy}
        assert await told(running, "vm2/qemu") == []

        await says(running, "vm1/qemu", "completed")
        await until_phase(vm, "done")
        assert (await told(running, "vm1/qemu"))[-1] == {"peers": {"vm2/qemu": lossy}, "migration": None}
        assert await told(running, "vm2/qemu") == [{"peers": {"vm1/qemu": lossy}, "migration": None}]
        await running.restart("vm2")
        assert await told(running, "vm2/qemu") == [{"peers": {"vm1/qemu": lossy}, "migration": None}]

        await running.link("alpha", "beta", loss=0, latency_ms=0)
        assert (await told(running, "vm1/qemu"))[-1] == {"peers": {}, "migration": None}
        assert (await told(running, "vm2/qemu"))[-1] == {"peers": {}, "migration": None}


async def test_a_stopped_qemu_is_told_when_it_goes_on_and_a_move_that_is_undone_leaves_no_shape(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as running:
        vm = await under_way(running)
        qemu = running.process("vm1/qemu")
        await qemu.stop()
        await qemu.wait_state("stopped")
        began = time.monotonic()
        await running.link("alpha", "beta", down=True)
        assert time.monotonic() - began < 1
        await qemu.resume()
        await qemu.wait_state("running")
        assert (await told(running, "vm1/qemu"))[-1]["migration"] == {**PLAIN, "down": True}

        await says(running, "vm1/qemu", "cancelled")
        await until_phase(vm, "cancelled")
        assert (await told(running, "vm1/qemu"))[-1] == {"peers": {}, "migration": None}


async def test_the_command_shows_a_link_changes_it_and_refuses_in_one_line(tmp_path: Path) -> None:
    async with two_hosts(tmp_path) as running:
        assert (await command("link", "alpha", "beta")).stdout == "link alpha - beta  up\n"
        assert (await running.status()).links == []
        changed = await command("link", "alpha", "beta", "--latency", "50", "--bandwidth", "8M/s", "--down")
        assert changed.stdout == "link alpha - beta  down  latency 50 ms  bandwidth 8 MiB/s\n"
        shown = await command("link", "beta", "alpha", "--up", "--json")
        row = {**PLAIN, "latency_ms": 50.0, "bandwidth_bytes_per_second": 8 * MIB, "between": ["alpha", "beta"]}
        assert json.loads(shown.stdout) == row
        assert json.loads((await command("status", "--json")).stdout)["links"] == [row]
        assert "link alpha - beta  up  latency 50 ms  bandwidth 8 MiB/s" in (await command("status")).stdout

        for arguments, problem in (
            (["alpha", "gamma"], 'no host "gamma"; there are: alpha, beta'),
            (["alpha", "alpha"], "a link is between two different hosts"),
            (["alpha", "beta", "--loss", "2"], "loss: 2 is out of range; allowed: 0 to 1"),
            (["alpha", "beta", "--latency", "nan"], "latency: nan is out of range; allowed: 0 to 10000 milliseconds"),
        ):
            refused = await command("link", *arguments)
            assert (refused.returncode, refused.stderr) == (1, f"pefbox: {problem}\n")
        with pytest.raises(UserError, match="unknown field `speed`"):
            await running.link("alpha", "beta", speed=1)
        assert (await running.link("alpha", "beta")).latency_ms == 50


# -- networks -------------------------------------------------------------------------------------------------


async def test_a_ping_takes_the_latency_twice_and_nothing_crosses_a_cut(tmp_path: Path) -> None:
    text = _HEAD + with_card("vm1", "alpha", secure=False) + with_card("vm2", "beta", secure=False)
    async with running_hosts(tmp_path, text + LINK + "latency = 50\n") as running:
        vm1 = running.vm("vm1")
        assert 100e6 <= await ping_ns(running) < 400e6

        await running.link("alpha", "beta", down=True)
        assert (await ask(vm1, f"ping {MACS['vm2']} 2")).startswith("ok replies 0 of 2 ")
        assert (await vm1.row()).network.networks[0].peers[0].dropped["link"] >= 2
        await running.link("alpha", "beta", down=False, latency_ms=0)
        assert await ping_ns(running) < 100e6


async def ping_ns(running: RunningCluster) -> int:
    """How long the fastest half of three pings from vm1 to vm2 took at most."""
    answer = await ask(running.vm("vm1"), f"ping {MACS['vm2']} 3")
    assert answer.startswith("ok replies 3 of 3 "), answer
    return int(answer.split()[6])


async def test_frames_find_a_vm_that_moves_over_the_link_and_back(tmp_path: Path) -> None:
    text = _HEAD + with_card("vm1", "alpha", secure=True) + with_card("vm2", "beta", secure=False)
    async with running_hosts(tmp_path, text + LINK + 'latency = 2\nbandwidth = "4M"\n') as running:
        vm1 = running.vm("vm1")
        for host in ("beta", "alpha"):
            since = await console_end(vm1)
            await vm1.console_write(f"blast {MACS['vm2']} 600 1400 4\r".encode())
            await vm1.migrate(host)
            text = await console_while(vm1, lambda text: not ENDED.search(text), "answer", 60, since)
            found = RUN.fullmatch(answer_of(text))
            assert found
            # What was under way at the switch-over may be lost, as on any network.
            assert int(found[1]) >= 590
            assert (await ask(running.vm("vm2"), f"ping {MACS['vm1']}")).startswith("ok replies 3 of 3 ")


# -- migrations -----------------------------------------------------------------------------------------------


async def fill(traveller: Traveller) -> None:
    """Data in some pages, so that there is something to send."""
    since = await console_end(traveller.vm)
    await traveller.vm.console_write("".join(f"fill {gfn} 7\r" for gfn in FILLED).encode())
    # What is typed ahead is echoed at once, before the answers.
    await console_while(traveller.vm, lambda text: text.count("ok\r\n") < len(FILLED), "answers", 20, since)
    await traveller.vm.console_command("pages")
    sums = {await traveller.ask(f"sum {gfn}") for gfn in (FILLED[0], FILLED[-1])}
    assert len(sums) == 1


async def sent_bytes(traveller: Traveller) -> int:
    facts = await traveller.vm.job_info()
    return int(facts["progress"].get("transferred_bytes", 0))


async def begin_to_send(traveller: Traveller, host: str) -> None:
    await traveller.vm.begin_migration(host)
    with trio.fail_after(10):
        while not await sent_bytes(traveller):  # noqa: ASYNC110
            await trio.sleep(0.05)


async def check_that_it_stands(traveller: Traveller) -> None:
    """After what was on its way nothing more goes."""
    await trio.sleep(0.5)
    before = await sent_bytes(traveller)
    await trio.sleep(1)
    assert await sent_bytes(traveller) == before
    facts = await traveller.vm.job_info()
    assert (facts["phase"], facts["status"]) == ("moving", "active")


@pytest.mark.parametrize("secure", [True, False], ids=["secure", "normal"])
async def test_a_migration_takes_as_long_as_its_link_says_and_a_cut_only_holds_it_up(
    tmp_path: Path, secure: bool
) -> None:
    async with travelling(tmp_path, secure=secure, more=LINK + 'bandwidth = "1M"\nlatency = 10\n') as traveller:
        await fill(traveller)
        facts = await traveller.vm.migrate("beta")
        n_bytes = facts["progress"]["transferred_bytes"]
        assert n_bytes > len(FILLED) << 16
        seconds = facts["progress"]["total_time_ms"] / 1000
        assert n_bytes / MIB * 0.9 <= seconds <= n_bytes / MIB * 1.3 + 1

        await begin_to_send(traveller, "alpha")
        await traveller.running.link("alpha", "beta", down=True)
        await check_that_it_stands(traveller)
        await traveller.running.link("alpha", "beta", down=False, bandwidth_bytes_per_second=0)
        assert await settled(traveller) == "done"
        assert await traveller.vm.host() == "alpha"
        assert (await traveller.ask(f"sum {FILLED[0]}")) == (await traveller.ask(f"sum {FILLED[-1]}"))


async def test_a_migration_is_cancelled_while_its_link_is_cut_and_succeeds_once_that_is_mended(tmp_path: Path) -> None:
    async with travelling(tmp_path, more=LINK + 'bandwidth = "1M"\n') as traveller:
        await fill(traveller)
        await begin_to_send(traveller, "beta")
        await traveller.running.link("alpha", "beta", down=True)
        await check_that_it_stands(traveller)
        began = time.monotonic()
        await traveller.vm.cancel_migration()
        assert await settled(traveller) == "cancelled"
        assert time.monotonic() - began < 5
        assert (await traveller.ask("pages")).startswith("ok ")

        await traveller.running.link("alpha", "beta", down=False, bandwidth_bytes_per_second=0)
        await traveller.vm.migrate("beta")
        assert await traveller.is_secure()
