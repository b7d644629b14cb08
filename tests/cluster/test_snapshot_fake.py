"""The launcher's part of a snapshot and of a restore, with processes that only speak the control protocol."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from deploy.api import RunningCluster, Vm, cluster
from deploy.cli_cluster import refuse_unrestored
from deploy.manifest import clean_run_dir, read_manifest
from deploy.run_dirs import running_clusters
from protocol.errors import UserError
from shared.snapshot_file import BODY_OFFSET, DiskMark, SnapshotHead, encode_head, mark_of
from tests.cluster.conftest import FAKE_SERVICE
from tests.cluster.test_move_fake import answers, seen, until

FILE = """
[hosts.alpha]
secure_memory = "64M"
[hosts.beta]
secure_memory = "64M"
[vms.vm1]
host = "alpha"
memory = "16M"
[vms.vm1.disks.root]
path = "{disk}"
"""
QEMU = "vm1/qemu"


@asynccontextmanager
async def one_vm(directory: Path, restore: dict[str, Path] | None = None) -> AsyncIterator[RunningCluster]:
    async with cluster(cluster_file(directory), service_module=FAKE_SERVICE, restore=restore) as running:
        yield running


def cluster_file(directory: Path) -> Path:
    disk, file = directory / "root.img", directory / "c.toml"
    if not disk.exists():
        disk.write_bytes(bytes(4096))
    file.write_text(FILE.format(disk=disk))
    return file


async def says(running: RunningCluster, status: str, **facts: object) -> None:
    await answers(running, QEMU, snapshot_status={"status": status, "ready": True, **facts})


async def begun(running: RunningCluster, path: Path, *, force: bool = False) -> Vm:
    """A snapshot whose qemu writes, and says nothing more."""
    await says(running, "saving", bytes=1, pages=2, total_pages=3)
    await running.order("snapshot", {"vm": "vm1", "file": str(path), "force": force})
    return running.vm("vm1")


async def committing(running: RunningCluster, path: Path) -> Vm:
    vm = await begun(running, path)
    await says(running, "written")
    await until_phase(vm, "committing")
    return vm


async def until_phase(vm: Vm, phase: str) -> dict[str, Any]:
    async def came() -> bool:
        return bool((await vm.snapshot_info())["phase"] == phase)

    await until(came)
    return await vm.snapshot_info()


def files_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} - {"root.img", "c.toml", "state"}


def unfinished(running: RunningCluster) -> list[str]:
    manifest = read_manifest(running.paths.manifest)
    assert manifest is not None
    return manifest.files


async def orders(running: RunningCluster) -> list[str]:
    return [event.partition(" ")[0] for event in (await seen(running, QEMU))["events"] if "snapshot." in event]


# -- saving ------------------------------------------------------------------------------------------------------


async def test_a_qemu_that_did_not_take_the_order_is_told_to_forget_it(tmp_path: Path) -> None:
    """It may only have been late with its answer."""
    async with one_vm(tmp_path) as running:
        await answers(running, QEMU, snapshot_save={"refused": "not now"})
        with pytest.raises(UserError, match="not now"):
            await running.order("snapshot", {"vm": "vm1", "file": str(tmp_path / "s"), "force": False})

        assert await orders(running) == ["snapshot.save", "snapshot.cancel"]
        assert files_in(tmp_path) == set()


async def test_a_vm_that_is_saved_is_off_and_its_file_has_its_name(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as running:
        vm = await begun(running, tmp_path / "s")
        (part,) = files_in(tmp_path)
        assert part.startswith(".s.") and part.endswith(".part")
        assert unfinished(running) == [str(tmp_path / part)]
        assert (tmp_path / part).stat().st_mode & 0o777 == 0o600

        await says(running, "written", bytes=5)
        await until_phase(vm, "committing")
        assert files_in(tmp_path) - {part} == {"s"}
        assert (await vm.row()).state == "running"
        assert await orders(running) == ["snapshot.save", "snapshot.commit"]

        await says(running, "saved", bytes=5, secure=False)
        facts = await until_phase(vm, "done")
        row = await vm.row()
        assert (row.state, row.reason) == ("off", f"saved in {tmp_path / 's'}")
        assert facts["progress"] == {"bytes": 5, "secure": False}
        assert files_in(tmp_path) == {"s"}
        assert unfinished(running) == []
        await vm.restart()
        assert (await vm.row()).state == "running"


async def test_a_snapshot_that_fails_leaves_no_file_and_the_vm_running(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as running:
        for status, reason in (("failed", "No space left on device"), ("cancelled", "cancelled")):
            vm = await begun(running, tmp_path / "s")
            await says(running, status, reason=reason)
            assert (await until_phase(vm, status))["reason"] == reason
            assert files_in(tmp_path) == set()
        vm = await committing(running, tmp_path / "s")
        with pytest.raises(UserError, match="too late"):
            await vm.cancel_snapshot()
        await answers(running, "alpha/ultravisor", migration_status={"refusal": "cannot be stored\x1b"})
        await says(running, "failed", reason="was refused", secure=True)
        assert (await until_phase(vm, "failed"))["reason"] == "was refused; cannot be stored?"
        assert (await vm.row()).state == "running"
        assert files_in(tmp_path) == set()
        assert unfinished(running) == []


async def test_s6_when_nobody_knows_whether_it_was_saved_the_vm_is_off_and_the_file_stays(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as running:
        vm = await committing(running, tmp_path / "s")
        await says(running, "in-doubt", reason="alpha/kvm is gone")
        facts = await until_phase(vm, "in-doubt")
        assert "alpha/kvm is gone" in facts["reason"] and "pefbox restore" in facts["reason"]
        assert (await vm.row()).state == "off"
        assert files_in(tmp_path) == {"s"}


async def test_a_qemu_that_dies_before_the_last_step_leaves_no_file(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as running:
        vm = await begun(running, tmp_path / "s")
        await vm.qemu.kill()
        facts = await until_phase(vm, "failed")
        assert "vm1/qemu is failed (killed by SIGKILL)" in facts["reason"]
        assert files_in(tmp_path) == set()


async def test_a_qemu_that_dies_in_the_last_step_leaves_a_file_that_may_be_the_vm(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as running:
        vm = await committing(running, tmp_path / "s")
        await vm.qemu.kill()
        await until_phase(vm, "in-doubt")
        assert files_in(tmp_path) == {"s"}


async def test_a_file_that_cannot_get_its_name_cancels_the_snapshot(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as running:
        (tmp_path / "d").mkdir()
        vm = await begun(running, tmp_path / "d" / "s")
        for path in (tmp_path / "d").iterdir():
            path.unlink()
        (tmp_path / "d").rmdir()
        assert "cannot be made: No such file" in await reason_of_cancellation(running, vm)

        vm = await begun(running, tmp_path / "s")
        (tmp_path / "s").write_text("somebody's")
        assert "exists already" in await reason_of_cancellation(running, vm)
        assert (tmp_path / "s").read_text() == "somebody's"
        assert (await vm.row()).state == "running"


async def reason_of_cancellation(running: RunningCluster, vm: Vm) -> str:
    """Why the launcher has qemu cancel a snapshot that is written."""
    n_orders = len(await orders(running))
    await says(running, "written")

    async def told() -> bool:
        return (await orders(running))[n_orders:] == ["snapshot.cancel"]

    await until(told)
    await says(running, "cancelled")
    return str((await until_phase(vm, "failed"))["reason"])


async def test_force_replaces_a_file_when_the_new_one_is_whole(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("old")
    async with one_vm(tmp_path) as running:
        with pytest.raises(UserError, match="exists already; --force replaces it"):
            await begun(running, tmp_path / "s")
        vm = await begun(running, tmp_path / "s", force=True)
        assert (tmp_path / "s").read_text() == "old"
        await says(running, "written")
        await until_phase(vm, "committing")
        assert (tmp_path / "s").read_text() == ""
        await says(running, "saved")
        await until_phase(vm, "done")
        assert files_in(tmp_path) == {"s"}


async def test_a_vm_that_is_being_saved_is_neither_restarted_nor_moved_nor_saved_twice(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as running:
        vm = await begun(running, tmp_path / "s")
        being = f"vm1 is being saved in {tmp_path / 's'}"
        with pytest.raises(UserError, match=being):
            await vm.restart()
        with pytest.raises(UserError, match=being):
            await vm.begin_migration("beta")
        with pytest.raises(UserError, match=being):
            await begun(running, tmp_path / "t")
        with pytest.raises(UserError, match=being):
            await vm.restore(tmp_path / "s")
        await vm.cancel_snapshot()
        assert (await orders(running))[-1] == "snapshot.cancel"
        await says(running, "cancelled")
        await until_phase(vm, "cancelled")
        with pytest.raises(UserError, match="is not being saved"):
            await vm.cancel_snapshot()


async def test_what_cannot_be_a_file_starts_nothing(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as running:
        with pytest.raises(UserError, match="is no directory"):
            await begun(running, tmp_path / "nowhere" / "s")
        with pytest.raises(UserError, match="is no regular file"):
            await begun(running, tmp_path)
        with pytest.raises(UserError, match='no VM "vm7"'):
            await running.order("snapshot", {"vm": "vm7", "file": str(tmp_path / "s")})
        assert files_in(tmp_path) == set()
        assert unfinished(running) == []


async def test_l1_down_while_a_vm_is_saved_leaves_no_file(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as running:
        await begun(running, tmp_path / "s")
        assert files_in(tmp_path)
        assert await running.down() == 0
    assert files_in(tmp_path) == set()


async def test_l1_what_a_killed_launcher_left_is_removed_by_clean(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as running:
        await begun(running, tmp_path / "s")
        running.kill_launcher()
        await running.wait_launcher()
        (part,) = files_in(tmp_path)
        removed = clean_run_dir(running.paths.run_dir)
        assert removed is not None
        assert f"unfinished {tmp_path / part}" in removed
        assert files_in(tmp_path) == set()


# -- restoring ---------------------------------------------------------------------------------------------------


def snapshot_file(directory: Path, **changes: object) -> Path:
    """A file whose head fits to the VM of FILE; nobody reads more of it here."""
    cluster_file(directory)
    fd = os.open(directory / "root.img", os.O_RDONLY)
    head = SnapshotHead(
        vm="vm1", lpid=1, host="alpha", secure=False, running=True, memory_bytes=16 << 20, taken=1.0,
        disks=[mark_of("root", fd)], body_bytes=0, body_sha256="0" * 64,
    )  # fmt: skip
    os.close(fd)
    path = directory / "s"
    path.write_bytes(encode_head(msgspec.structs.replace(head, **changes)).ljust(BODY_OFFSET, b"\0"))
    return path


async def off(running: RunningCluster) -> Vm:
    """The VM, switched off by its user."""
    await running.process(QEMU).query("notice", {"what": "vm-off", "vm": "vm1", "detail": "quit"})
    await running.vm("vm1").wait_state("off")
    return running.vm("vm1")


async def restoring(running: RunningCluster, path: Path, **more: object) -> Vm:
    """A restore that has been begun, as far as its qemu is asked for it."""
    vm = await off(running)
    await running.order("restore", {"vm": "vm1", "file": str(path), **more})
    await until_phase(vm, "loading")
    return vm


async def test_a_vm_that_is_restored_begins_in_no_other_way(tmp_path: Path) -> None:
    path = snapshot_file(tmp_path)
    async with one_vm(tmp_path) as running:
        with pytest.raises(UserError, match="restore is not possible: vm1 is running: pefbox qmp vm1 quit"):
            await running.vm("vm1").restore(path)
        vm = await restoring(running, path)
        assert (await seen(running, QEMU))["restoring"] == ["vm1"]
        assert (await seen(running, QEMU))["gifts"]["snapshot-file"][0] == "launcher"
        assert "vm1 is restoring" in (await seen(running, "alpha/ultravisor"))["events"]
        assert await orders(running) == ["snapshot.restore"]
        await says(running, "restored")
        await until_phase(vm, "done")
        assert (await vm.row()).state == "running"
        await vm.restart()
        assert (await seen(running, QEMU))["restoring"] == []


async def test_a_restore_that_fails_leaves_the_vm_off_with_nothing_running(tmp_path: Path) -> None:
    path = snapshot_file(tmp_path)
    async with one_vm(tmp_path) as running:
        vm = await restoring(running, path)
        await answers(running, "alpha/ultravisor", migration_status={"refusal": "started again\x1b[2J"})
        await says(running, "failed", reason="was refused", secure=True)
        facts = await until_phase(vm, "failed")
        assert facts["reason"] == "was refused; started again?[2J"
        row = await vm.row()
        assert (row.state, row.reason) == ("off", f"not restored: {facts['reason']}")
        assert {process.state for process in row.processes} == {"gone"}
        await vm.restart()
        assert (await vm.row()).state == "running"


async def test_a_qemu_that_dies_while_it_restores_ends_the_restore(tmp_path: Path) -> None:
    path = snapshot_file(tmp_path)
    async with one_vm(tmp_path) as running:
        vm = await restoring(running, path)
        await vm.qemu.kill()
        assert "vm1/qemu is failed" in (await until_phase(vm, "failed"))["reason"]
        with pytest.raises(UserError, match="does not go on out of"):
            await vm.restore(tmp_path / "s", seconds=0.2)


async def test_ignore_disks_is_for_normal_vms(tmp_path: Path) -> None:
    path = snapshot_file(tmp_path, disks=[DiskMark("root", 4096, 5)])
    async with one_vm(tmp_path) as running:
        vm = await restoring(running, path, ignore_disks=True)
        await says(running, "restored")
        await until_phase(vm, "done")
        await off(running)
        snapshot_file(tmp_path, secure=True)
        with pytest.raises(UserError, match="--ignore-disks is for normal VMs"):
            await vm.restore(path, ignore_disks=True)
        assert (await vm.row()).state == "off"


async def test_up_starts_nothing_when_a_snapshot_cannot_be_the_vms(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: No such file"):
        async with one_vm(tmp_path, {"vm1": tmp_path / "nowhere"}):
            pass
    assert running_clusters() == []


async def test_a_vm_that_up_does_not_restore_is_off_and_the_cluster_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFBOX_FAKE", "restore-fails")
    async with one_vm(tmp_path, {"vm1": snapshot_file(tmp_path)}) as running:
        row = await running.vm("vm1").row()
        assert (row.state, row.reason) == ("off", "not restored: told to fail")
        assert (await running.vm("vm1").snapshot_info())["phase"] == "failed"
        assert (await running.status()).healthy
        with pytest.raises(UserError, match="vm1 is off: not restored: told to fail"):
            refuse_unrestored(msgspec.to_builtins(await running.status()), {"vm1": tmp_path})
        await running.vm("vm1").restart()
