"""VMs are saved into a file and go on out of it: nothing is lost, and no older state ever runs (S1, S3, S6)."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
import trio

from deploy.api import cluster
from deploy.qmp_client import execute
from protocol.errors import UserError
from shared.snapshot_file import BODY_OFFSET
from tests.cluster.moving import Traveller, answer_since, begin, travelling
from tests.cluster.test_move_fake import until

FILLED = 0xC7
"""No disk request of the model has this byte."""
PATTERN = bytes([FILLED]) * 64
"""Of pages that `fill` wrote."""


async def qmp(traveller: Traveller, command: str) -> Any:  # noqa: ANN401
    path = (await traveller.vm.row()).qmp
    assert path is not None
    return await trio.to_thread.run_sync(execute, path, command)


async def pefbox(*words: str | Path) -> tuple[int, str, str]:
    """A command as a user types it: exit status and what it printed."""
    command = [sys.executable, "-m", "deploy.cli", *map(str, words)]
    done = await trio.run_process(command, check=False, capture_stdout=True, capture_stderr=True)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


async def secure_bytes(traveller: Traveller, host: str = "alpha") -> int:
    """Secure memory that is in use."""
    answer = await traveller.running.process(f"{host}/ultravisor").query("account")
    return int(answer["used_bytes"])


def audited(traveller: Traveller, host: str = "alpha") -> list[tuple[str, dict[str, Any]]]:
    lines = traveller.running.paths.audit_log(host).read_text().splitlines()
    return [(line["event"], line["facts"]) for line in map(json.loads, lines)]


@pytest.mark.parametrize("secure", [True, False], ids=["secure", "normal"])
async def test_s1_a_vm_goes_on_with_all_that_it_had_and_a_secure_one_left_nothing_in_plain(
    tmp_path: Path, secure: bool
) -> None:
    path = tmp_path / "vm1.snap"
    async with travelling(tmp_path, secure=secure) as traveller:
        sums = await traveller.fill(FILLED)
        since = await begin(traveller, "io write 4096 8 3000")
        facts = await traveller.vm.snapshot(path)
        assert facts["progress"]["secure"] is secure
        row = await traveller.vm.row()
        assert (row.state, row.reason, row.secure) == ("off", f"saved in {path}", False)
        assert {process.state for process in row.processes} == {"gone"}
        assert await secure_bytes(traveller) == 0
        assert (PATTERN in path.read_bytes()) is not secure

        await traveller.vm.restore(path)
        assert await traveller.is_secure() is secure
        assert (await answer_since(traveller, since)).startswith("ok requests 3000")
        assert await traveller.sums() == sums
        assert await traveller.hash_of_disk() == traveller.hash_on_host()

        await qmp(traveller, "stop")
        await traveller.vm.snapshot(path, force=True)
        await traveller.vm.restore(path)
        assert (await traveller.vm.row()).state == "paused"
        assert (await qmp(traveller, "query-status"))["status"] == "paused"
        await qmp(traveller, "cont")
        assert await traveller.sums() == sums
        await traveller.vm.migrate("beta")
        assert await traveller.sums() == sums


async def test_s3_s6_no_state_but_the_newest_of_a_secure_vm_ever_runs(tmp_path: Path) -> None:
    first, second, third, damaged = (tmp_path / name for name in ("first", "second", "third", "damaged"))
    async with travelling(tmp_path) as traveller:
        sums = await traveller.fill(FILLED)
        vm = traveller.vm
        await vm.snapshot(first)
        raw = bytearray(first.read_bytes())
        for at, why in ((len(raw) // 2, "a record was altered"), (BODY_OFFSET + 8, "no hello of a migration")):
            raw[at] ^= 1
            damaged.write_bytes(raw)
            raw[at] ^= 1
            with pytest.raises(UserError, match=why):
                await vm.restore(damaged)
            assert ((await vm.row()).state, await secure_bytes(traveller)) == ("off", 0)
        await vm.restore(first)
        assert await traveller.sums() == sums
        sums = await traveller.fill(FILLED + 1)
        await vm.snapshot(second)
        with pytest.raises(UserError, match="restored already, and the secure VM ran on since"):
            await vm.restore(first)
        assert await secure_bytes(traveller) == 0
        events = [event for event, _ in audited(traveller)]
        assert events.count("snapshot-taken") == 2
        assert {"restored", "restore-refused", "restore-abandoned"} <= set(events)

    file, state_dir = tmp_path / "c.toml", tmp_path / "state"
    async with cluster(file, state_dir=state_dir, restore={"vm1": second}) as running:
        after = Traveller(running, running.vm("vm1"), traveller.disk, traveller.layout)
        assert await after.is_secure()
        assert await after.sums() == sums
        await after.vm.migrate("beta")
        await switch_off(after)
        with pytest.raises(UserError, match="taken by another ultravisor"):
            await after.vm.restore(second)
        await after.vm.restart()
        await after.vm.secure()
        await after.vm.snapshot(third)
        await after.vm.restart()
        await switch_off(after)
        with pytest.raises(UserError, match="started again since the snapshot"):
            await after.vm.restore(third)
        assert await secure_bytes(after, "beta") == 0
        void = {"snapshots": 1, "reason": "the VM is started again"}
        assert ("snapshot-void", void) in audited(after, "beta")


async def switch_off(traveller: Traveller) -> None:
    await qmp(traveller, "quit")
    await traveller.vm.wait_state("off")


@pytest.mark.parametrize("secure", [True, False], ids=["secure", "normal"])
async def test_a_disk_without_room_leaves_the_vm_running_and_no_file(tmp_path: Path, secure: bool) -> None:
    async with travelling(tmp_path, secure=secure) as traveller:
        sums = await traveller.fill(FILLED)
        before = set(os.listdir(tmp_path))
        qemu = await traveller.vm.qemu.row()
        limits = resource.prlimit(qemu.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(qemu.pid, resource.RLIMIT_FSIZE, (BODY_OFFSET + (1 << 20), limits[1]))
        with pytest.raises(UserError, match="the snapshot cannot be written: File too large"):
            await traveller.vm.snapshot(tmp_path / "s")
        resource.prlimit(qemu.pid, resource.RLIMIT_FSIZE, limits)
        assert set(os.listdir(tmp_path)) == before
        assert await traveller.is_secure() is secure
        assert await traveller.sums() == sums
        assert await traveller.hash_of_disk() == traveller.hash_on_host()
        await traveller.vm.snapshot(tmp_path / "s")


async def test_the_commands_say_in_one_line_what_happened(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with travelling(tmp_path, secure=False) as traveller:
        status, text, _ = await pefbox("snapshot", "vm1", path)
        assert (status, text.startswith(f"vm1 is saved in {path}, and off: ")) == (0, True)
        assert await pefbox("snapshot", "vm1", tmp_path / "t") == (
            1, "", "pefbox: snapshot is not possible: vm1 is off\n",
        )  # fmt: skip
        os.utime(traveller.disk)
        status, _, error = await pefbox("restore", "vm1", path)
        assert status == 1
        assert error.startswith(f"pefbox: {path}: vm1 cannot go on: disk root was written ")
        status, text, _ = await pefbox("restore", "vm1", path, "--ignore-disks", "--json")
        facts = json.loads(text)
        assert (status, facts["phase"], facts["kind"]) == (0, "done", "restore")
        assert (await traveller.ask("pages")).startswith("ok ")
        status, text, error = await pefbox("snapshot", "vm1", path)
        assert (status, text, error) == (1, "", f"pefbox: {path}: exists already; --force replaces it\n")


@pytest.mark.parametrize("victim", ["vm1/qemu", "alpha/ultravisor"])
async def test_a_process_that_dies_while_a_secure_vm_is_saved_leaves_one_state_or_none(
    tmp_path: Path, victim: str
) -> None:
    """Whenever it hits: either there is a file that is restored once, or there is none."""
    path = tmp_path / "s"
    async with travelling(tmp_path) as traveller:
        sums = await traveller.fill(FILLED)
        await traveller.running.order("snapshot", {"vm": "vm1", "file": str(path)})
        await traveller.running.process(victim).kill()
        phase = ""

        async def is_over() -> bool:
            nonlocal phase
            phase = (await traveller.vm.snapshot_info())["phase"]
            return phase not in ("starting", "saving", "committing")

        await until(is_over, 30)
        assert phase in ("done", "failed", "in-doubt")
        assert path.exists() is (phase != "failed")
        assert not [name for name in os.listdir(tmp_path) if name.endswith(".part")]
        if phase == "failed":
            await traveller.running.restart("alpha" if victim.startswith("alpha") else "vm1")
            assert (await traveller.vm.secure()).secure
        elif victim.startswith("vm1"):
            await traveller.vm.restore(path)
            assert await traveller.sums() == sums
