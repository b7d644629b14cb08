"""VMs move between two hosts while they run: nothing is lost, one of them runs, and what cannot be is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
from qemu.qmp import ExecuteError, QMPClient

from deploy.qmp_client import execute
from protocol.errors import UserError
from tests.cluster.moving import Traveller, answer_since, begin, settled, travelling
from tests.cluster.test_qmp import in_asyncio, next_event
from tests.cluster.vm_files import PROMPT, console_end, console_until


@pytest.mark.parametrize("secure", [True, False], ids=["secure", "normal"])
async def test_a_vm_moves_there_and_back_with_all_that_it_had(tmp_path: Path, secure: bool) -> None:
    async with travelling(tmp_path, secure=secure) as traveller:
        sums = await traveller.fill(0x5A)
        assert await traveller.is_secure() is secure

        facts = await traveller.vm.migrate("beta")

        assert await traveller.vm.host() == "beta"
        assert await traveller.is_secure() is secure
        assert facts["progress"]["secure"] is secure
        assert await traveller.sums() == sums
        assert await traveller.hash_of_disk() == traveller.hash_on_host()
        other = await traveller.fill(0xA5)
        await traveller.vm.migrate("alpha")
        assert await traveller.vm.host() == "alpha"
        assert await traveller.sums() == other
        assert (await traveller.ask("write")).startswith("ok ")


@pytest.mark.parametrize("secure", [True, False], ids=["secure", "normal"])
async def test_disk_reads_and_writes_that_are_under_way_are_finished_on_the_other_host(
    tmp_path: Path, secure: bool
) -> None:
    async with travelling(tmp_path, secure=secure) as traveller:
        for host, kind in (("beta", "read"), ("alpha", "write"), ("beta", "randread")):
            since = await begin(traveller, f"io {kind} 4096 8 3000")
            await traveller.vm.migrate(host)
            answer = await answer_since(traveller, since)
            assert answer.startswith("ok requests 3000"), answer
        assert await traveller.hash_of_disk() == traveller.hash_on_host()


async def test_a_vm_whose_time_is_counted_in_instructions_moves_too(tmp_path: Path) -> None:
    async with travelling(tmp_path, time="instructions") as traveller:
        sums = await traveller.fill(1)
        await traveller.vm.migrate("beta")
        assert await traveller.sums() == sums


async def test_a_vm_that_was_moved_turns_secure_again_where_it_is(tmp_path: Path) -> None:
    async with travelling(tmp_path) as traveller:
        await traveller.vm.migrate("beta")
        since = await console_end(traveller.vm)
        await qmp(traveller, "system_reset")
        await console_until(traveller.vm, f"{PROMPT}\r\n> ", since=since)
        assert await traveller.is_secure()
        await traveller.running.restart("vm1")
        await console_until(traveller.vm, f"{PROMPT}\r\n> ")
        assert await traveller.is_secure()
        assert await traveller.vm.host() == "beta"


async def test_a_paused_vm_arrives_paused(tmp_path: Path) -> None:
    async with travelling(tmp_path) as traveller:
        await qmp(traveller, "stop")
        await traveller.vm.migrate("beta")
        assert (await qmp(traveller, "query-status"))["status"] == "paused"
        await qmp(traveller, "cont")
        assert (await traveller.ask("pages")).startswith("ok ")


async def test_what_no_migration_can_do_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    small = '[hosts.gamma]\nsecure_memory = "16M"\n[hosts.delta]\nsecure_memory = "256M"\nmigration_root = "other"\n'
    async with travelling(tmp_path, hosts=small) as traveller:
        assert await traveller.vm.can_migrate("beta") == []
        (reason,) = await traveller.vm.can_migrate("gamma")
        assert "secure memory" in reason
        reasons = await traveller.vm.can_migrate("delta")
        assert any("root that is not trusted" in reason for reason in reasons)
        with pytest.raises(UserError, match="secure memory"):
            await traveller.vm.migrate("gamma")
        assert (await traveller.ask("pages")).startswith("ok ")


async def test_the_owner_says_where_a_secure_vm_may_go(tmp_path: Path) -> None:
    named = '[hosts.gamma]\nsecure_memory = "256M"\n'
    async with travelling(tmp_path, hosts=named, more='[vms.vm1.migration]\nhosts = ["gamma"]\n') as traveller:
        (reason,) = await traveller.vm.can_migrate("beta")
        assert "policy" in reason
        assert await traveller.vm.can_migrate("gamma") == []
        await traveller.vm.migrate("gamma")
        assert await traveller.vm.host() == "gamma"


async def test_a_user_of_the_monitor_moves_it_with_qemus_own_commands(tmp_path: Path) -> None:
    async def drive(path: str) -> dict[str, Any]:
        client = QMPClient("mover")
        await client.connect(path)
        seen: dict[str, Any] = {"before": await client.execute("query-migrate")}
        on = {"capabilities": [{"capability": "events", "state": True}]}
        await client.execute("migrate-set-capabilities", on)
        await client.execute("migrate-set-parameters", {"downtime-limit": 500})
        seen["parameters"] = await client.execute("query-migrate-parameters")
        for command, arguments in (
            ("migrate", {"uri": "tcp:beta:4444"}),
            ("migrate-set-parameters", {"downtime-limit": -1}),
            ("migrate-set-capabilities", {"capabilities": [{"capability": "multifd", "state": True}]}),
        ):
            with pytest.raises(ExecuteError):
                await client.execute(command, arguments)
        with client.listener("MIGRATION") as listener:
            await client.execute("migrate", {"uri": "pefbox:beta"})
            words = [(await next_event(listener))[1]["status"] for _ in range(4)]
        seen["after"] = await client.execute("query-migrate")
        await client.disconnect()
        return {**seen, "words": words}

    async with travelling(tmp_path) as traveller:
        path = (await traveller.vm.row()).qmp
        assert path is not None
        seen = await in_asyncio(lambda: drive(path))

        assert seen["before"] == {}
        assert seen["parameters"]["downtime-limit"] == 500
        assert seen["words"] == ["setup", "active", "device", "completed"]
        assert seen["after"]["status"] == "completed"
        assert seen["after"]["ram"]["total"] == 64 << 20
        assert await settled(traveller) == "done"
        assert await traveller.vm.host() == "beta"
        assert await qmp(traveller, "query-migrate") == {}


async def qmp(traveller: Traveller, command: str) -> Any:  # noqa: ANN401
    """One command of the VM's monitor, wherever it is."""
    path = (await traveller.vm.row()).qmp
    assert path is not None
    return await trio.to_thread.run_sync(execute, path, command)
