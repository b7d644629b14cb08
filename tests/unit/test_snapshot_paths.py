"""Which file a VM may be restored from, as far as its head says, and the file that one is written to (S5)."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from click.testing import CliRunner

from deploy.cli_cluster import up
from deploy.cluster_file import VmSpec, read_cluster_file
from deploy.manifest import Manifest
from deploy.restore import open_snapshot
from deploy.snapshot_target import SnapshotTarget
from protocol.errors import UserError
from shared.snapshot_file import BODY_OFFSET, DiskMark, SnapshotHead, encode_head, mark_of

FILE = """
[hosts.alpha]
secure_memory = "64M"
[vms.vm1]
host = "alpha"
memory = "16M"
secure = {secure}
[vms.vm1.disks.root]
path = "{disk}"
"""


def spec_in(directory: Path, *, secure: bool = True) -> VmSpec:
    """The VM of FILE, with its disk."""
    disk, file = directory / "root.img", directory / "c.toml"
    disk.write_bytes(bytes(4096))
    file.write_text(FILE.format(disk=disk, secure=str(secure).lower()))
    return read_cluster_file(file).vms[0]


def snapshot_of(vm: VmSpec, directory: Path, /, **changes: object) -> Path:
    fd = os.open(vm.disks[0].path, os.O_RDONLY)
    head = SnapshotHead(
        vm=vm.name, lpid=vm.lpid, host=vm.host, secure=False, running=True, memory_bytes=vm.memory_bytes, taken=1.0,
        disks=[mark_of("root", fd)], body_bytes=0, body_sha256="0" * 64,
    )  # fmt: skip
    os.close(fd)
    path = directory / "s"
    path.write_bytes(encode_head(msgspec.structs.replace(head, **changes)).ljust(BODY_OFFSET, b"\0"))
    return path


def opens(vm: VmSpec, path: Path, *, ignore_disks: bool = False) -> None:
    os.close(open_snapshot(vm, path, ignore_disks=ignore_disks))


def test_a_vm_is_restored_from_its_own_snapshot_while_its_disk_is_as_it_was(tmp_path: Path) -> None:
    vm = spec_in(tmp_path)
    path = snapshot_of(vm, tmp_path)
    opens(vm, path)
    Path(vm.disks[0].path).write_bytes(b"x" * 4096)
    with pytest.raises(UserError, match="disk root was written"):
        opens(vm, path)
    opens(vm, path, ignore_disks=True)
    Path(vm.disks[0].path).unlink()
    with pytest.raises(UserError, match="No such file"):
        opens(vm, path)


OTHER_DISK = [DiskMark("root", 4096, 5)]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"vm": "vm2\x1b"}, r"is a snapshot of vm2\? \(lpid 1\), not of vm1 \(lpid 1\)"),
        ({"lpid": 9}, r"is a snapshot of vm1 \(lpid 9\)"),
        ({"memory_bytes": 32 << 20}, "had 33554432 bytes of memory then, now it has 16777216"),
        ({"disks": []}, "it has the disks root, and had none"),
        ({"disks": OTHER_DISK}, r"disk root was written .* s after .*; --ignore-disks restores it all the same"),
        ({"secure": True, "disks": OTHER_DISK}, r"disk root was written [^;]*$"),
        ({"body_bytes": 3}, "has 65536 bytes, and had 65539"),
    ],
)
def test_one_line_says_why_a_file_is_not_the_vms(tmp_path: Path, changes: dict[str, object], why: str) -> None:
    vm = spec_in(tmp_path)
    with pytest.raises(UserError, match=why):
        opens(vm, snapshot_of(vm, tmp_path, **changes))


def test_a_secure_vm_needs_the_disk_that_it_had_and_leave_to_be_secure(tmp_path: Path) -> None:
    vm = spec_in(tmp_path)
    with pytest.raises(UserError, match="--ignore-disks is for normal VMs"):
        opens(vm, snapshot_of(vm, tmp_path, secure=True), ignore_disks=True)
    normal = spec_in(tmp_path, secure=False)
    with pytest.raises(UserError, match="was secure then, and may not be so now"):
        opens(normal, snapshot_of(normal, tmp_path, secure=True))


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    vm = spec_in(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    for name, why in (("nowhere", "No such file"), ("fifo", "no regular file"), (".", "no regular file")):
        with pytest.raises(UserError, match=why):
            opens(vm, tmp_path / name)


# -- what is written ---------------------------------------------------------------------------------------------


class PlayedManifest:
    def __init__(self) -> None:
        self.files: list[str] = []

    def add_file(self, path: str) -> None:
        self.files.append(path)

    def drop_file(self, path: str) -> None:
        self.files.remove(path)


@pytest.mark.parametrize("replace", [True, False])
def test_a_target_has_its_name_when_it_is_published(tmp_path: Path, replace: bool) -> None:
    manifest = PlayedManifest()
    target = SnapshotTarget(tmp_path / "s", as_manifest(manifest), replace=replace)
    os.write(target.fd, b"content")
    assert [str(path) for path in tmp_path.iterdir()] == manifest.files
    target.publish()
    target.close()
    assert (tmp_path / "s").read_bytes() == b"content"
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    assert not manifest.files


def test_a_file_system_without_links_does_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_paths: object) -> None:
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    target = SnapshotTarget(tmp_path / "s", as_manifest(PlayedManifest()), replace=False)
    target.publish()
    target.close()
    assert [path.name for path in tmp_path.iterdir()] == ["s"]

    (tmp_path / "s").unlink()
    target = SnapshotTarget(tmp_path / "s", as_manifest(PlayedManifest()), replace=False)
    (tmp_path / "s").write_text("somebody's")
    with pytest.raises(UserError, match="cannot be made"):
        target.publish()
    target.close()
    assert (tmp_path / "s").read_text() == "somebody's"


@pytest.mark.parametrize("published", [True, False])
def test_a_target_that_is_taken_back_leaves_nothing(tmp_path: Path, published: bool) -> None:
    manifest = PlayedManifest()
    target = SnapshotTarget(tmp_path / "s", as_manifest(manifest), replace=False)
    if published:
        target.publish()
    target.take_back()
    target.close()
    assert list(tmp_path.iterdir()) == []
    assert not manifest.files


def test_a_target_is_no_directory_no_device_and_nobodys_file(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("x")
    (tmp_path / "link").symlink_to("/dev/null")
    places = {
        tmp_path: "no regular file",
        tmp_path / "link": "no regular file",
        tmp_path / "nowhere" / "s": "no directory to put a snapshot in",
        tmp_path / "there": "exists already",
        tmp_path / ("x" * 300): "cannot be made|File name too long",
    }
    manifest = PlayedManifest()
    for path, why in places.items():
        with pytest.raises(UserError, match=why):
            SnapshotTarget(path, as_manifest(manifest), replace=False)
    assert not manifest.files


def as_manifest(played: PlayedManifest) -> Manifest:
    made: Manifest = SimpleNamespace(add_file=played.add_file, drop_file=played.drop_file)  # type: ignore[assignment]
    return made


@pytest.mark.parametrize("word", ["vm1", "=file", "vm1=", ""])
def test_up_takes_a_vm_and_its_file(word: str) -> None:
    answer = CliRunner().invoke(up, ["--restore", word])
    assert answer.exit_code == 2
    assert f"--restore: {word!r} is none; it is VM=FILE" in answer.output
