"""A VM of which nobody knows where it runs is recovered, and runs there with all that belongs to it."""

from __future__ import annotations

from pathlib import Path

import trio

from protocol.errors import UserError
from tests.cluster.moving import Traveller, settled, travelling
from tests.cluster.test_hanging import HANGING
from tests.cluster.test_migration import qmp
from tests.cluster.two_hosts import log_lines

ARRIVES = "vm1/qemu@beta"
SLOW = 1 << 20
"""Bytes a second: so little that there is time to give orders meanwhile."""


async def test_a_vm_whose_qemu_heard_nothing_of_its_start_runs_with_its_devices(tmp_path: Path) -> None:
    """Its ultravisor has the token from an operator; the qemu finds its channel closed and cannot give the VM up."""
    async with travelling(tmp_path, service_module=HANGING) as traveller:
        sums = await traveller.fill(0x5A)
        await traveller.running.process("vm1/qemu").query("lose-token")
        await traveller.vm.begin_migration("beta", bandwidth=SLOW)
        await _ask_arriving(traveller, "stop-at-token")
        assert await settled(traveller) == "in-doubt"

        assert await traveller.vm.recover() == "beta"
        await traveller.running.process("vm1/qemu").resume()

        assert await traveller.sums() == sums
        assert await traveller.hash_of_disk() == traveller.hash_on_host()
        assert (await qmp(traveller, "query-status"))["status"] == "running"
        await traveller.vm.migrate("alpha")
        assert await traveller.sums() == sums
        failures = [line for host in ("alpha", "beta") for line in log_lines(traveller.running, f"{host}/kvm")]
        assert not [line for line in failures if line["event"] == "VM failed"]


async def _ask_arriving(traveller: Traveller, what: str) -> None:
    """Ask the qemu where the VM arrives, as soon as it is there."""
    with trio.fail_after(20):
        while True:
            try:
                await traveller.running.process(ARRIVES).query(what)
            except UserError:
                await trio.sleep(0.02)
            else:
                return
