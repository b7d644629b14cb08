"""A network with a hostile qemu on it, and a card that lies to its own guest, against model kernels.

What must hold: S5 and L1, as in test_hostile_network. vm1 is a secure VM and vm2 a normal one, whose qemus are honest;
the qemu of vm3 sends what it likes and lies to its own guest.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from deploy.api import RunningCluster, cluster
from services.guest.model.virtqueue import QueueError
from tests.attack.hostile.network import FloodOf, NetLie
from tests.attack.hostile.qemu import Lie
from tests.cluster.conftest import own_directories
from tests.cluster.test_model_network import MACS, ask, with_card
from tests.cluster.two_hosts import at_prompt

__all__ = ["own_directories"]

pytestmark = pytest.mark.cold

HOSTILE = "tests.attack.hostile.{role}"
FLOOD_SECONDS = 2.0
COMMAND_SECONDS = 15.0
_HEAD = """
make = "demo"
[networks.lan]
[hosts.alpha]
secure_memory = "128M"
"""
RING_LIES = {
    Lie.BAD_ID: QueueError.BAD_ID,
    Lie.NOT_A_HEAD: QueueError.NOT_A_HEAD,
    Lie.LENGTH: QueueError.USED_LENGTH,
    Lie.JUMP: QueueError.INDEX_JUMP,
    Lie.BACK: QueueError.INDEX_JUMP,
}


def cluster_file(directory: Path) -> Path:
    """Three VMs on one host."""
    file = directory / "network.toml"
    vms = [with_card(name, "alpha", secure=name == "vm1") for name in ("vm1", "vm2", "vm3")]
    file.write_text(_HEAD + "".join(vms))
    return file


async def test_s5_l1_two_kernels_talk_on_while_a_qemu_sends_garbage_and_floods_them(tmp_path: Path) -> None:
    async with cluster(cluster_file(tmp_path), state_dir=tmp_path / "state", service_module=HOSTILE) as running:
        for name in ("vm1", "vm2", "vm3"):
            await at_prompt(running.vm(name))
        hostile = running.vm("vm3").qemu

        for lie in NetLie:
            await hostile.query("network.lie", {"what": lie.name})
        await check_talk(running)
        for what in FloodOf:
            async with trio.open_nursery() as nursery:
                arguments = {"what": what.name, "seconds": FLOOD_SECONDS}
                nursery.start_soon(hostile.query, "network.flood", arguments, FLOOD_SECONDS + COMMAND_SECONDS)
                await check_obeys(running)
            await check_talk(running)
        for name in ("vm1", "vm2"):
            counts = await ask(running.vm(name), "net")
            assert "foreign=" in counts and "malformed" not in counts and "oversized" not in counts
        assert {(await running.vm(name).row()).state for name in ("vm1", "vm2", "vm3")} == {"running"}
        assert (await running.vm("vm1").row()).pages["paged_out"] == 0


async def check_talk(running: RunningCluster) -> None:
    for asks, answers in (("vm1", "vm2"), ("vm2", "vm1")):
        answer = await ask(running.vm(asks), f"ping {MACS[answers]} 5", COMMAND_SECONDS)
        assert answer.startswith("ok replies 5 of 5 ")


async def check_obeys(running: RunningCluster) -> None:
    """During a flood a prompt answers, and a ping ends, answered or not."""
    for asks, answers in (("vm1", "vm2"), ("vm2", "vm1")):
        vm = running.vm(asks)
        assert (await ask(vm, "pages", COMMAND_SECONDS)).startswith("ok free=")
        assert (await ask(vm, f"ping {MACS[answers]} 3", COMMAND_SECONDS)).startswith("ok replies ")


@pytest.mark.parametrize("lie", RING_LIES, ids=lambda lie: lie.name.lower())
async def test_s5_a_card_that_lies_is_given_up_by_name(tmp_path: Path, lie: Lie) -> None:
    async with cluster(cluster_file(tmp_path), state_dir=tmp_path / "state", service_module=HOSTILE) as running:
        victim = running.vm("vm3")
        for name in ("vm2", "vm3"):
            await at_prompt(running.vm(name))
        assert (await ask(victim, f"ping {MACS['vm2']}")).startswith("ok replies 3 of 3 ")

        await victim.qemu.query("lie", {"what": lie.name})

        assert await ask(victim, f"ping {MACS['vm2']}", COMMAND_SECONDS) == f"error {RING_LIES[lie].value}"
        assert await ask(victim, "net") == f"error {RING_LIES[lie].value}"
        assert (await ask(victim, "pages")).startswith("ok free=")


@pytest.mark.parametrize("lie", [Lie.SILENT, Lie.DEAF, Lie.GARBAGE, Lie.MMIO_GONE, Lie.FLOOD], ids=lambda lie: lie.name)
async def test_l1_a_card_that_does_nothing_holds_up_neither_prompt_nor_run(tmp_path: Path, lie: Lie) -> None:
    async with cluster(cluster_file(tmp_path), state_dir=tmp_path / "state", service_module=HOSTILE) as running:
        victim = running.vm("vm3")
        for name in ("vm2", "vm3"):
            await at_prompt(running.vm(name))

        await victim.qemu.query("lie", {"what": lie.name})

        answer = await ask(victim, f"ping {MACS['vm2']} 3", COMMAND_SECONDS)
        assert answer.startswith(("ok replies ", "error "))
        assert (await ask(victim, "pages", COMMAND_SECONDS)).startswith("ok free=")
