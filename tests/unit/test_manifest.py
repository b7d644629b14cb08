"""Manifests: written before use, and `clean` removes exactly what they name."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deploy.manifest import Manifest, clean_run_dir, is_alive, new_manifest, read_manifest, start_ticks
from deploy.memory_segments import create_segment, reserve_as_used, segment_name, unlink_segment
from deploy.run_dirs import LOCK_FILE, Lock, choose_cluster, is_locked, left_over_clusters, make_private_dir
from protocol.errors import HostFault, UserError
from shared.touched import data_ranges


def make_manifest(tmp_path: Path) -> Manifest:
    run_dir = tmp_path / "c"
    run_dir.mkdir()
    (run_dir / LOCK_FILE).touch()
    return new_manifest(run_dir / "manifest.json", "c", tmp_path / "state")


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])


def test_every_change_is_on_disk_at_once(tmp_path: Path) -> None:
    manifest = make_manifest(tmp_path)

    manifest.add_segment("pefbox-c-vm1-1")
    manifest.add_process("alpha/kvm", os.getpid())

    data = read_manifest(tmp_path / "c" / "manifest.json")
    assert data == manifest.data
    assert is_alive(data.processes[0])


def test_clean_kills_and_unlinks_what_the_manifest_names_and_nothing_else(tmp_path: Path) -> None:
    manifest = make_manifest(tmp_path)
    ours, other = segment_name("c", "vm1"), segment_name("c", "vm1")
    with sleeper() as named, sleeper() as bystander:
        manifest.add_process("alpha/kvm", named.pid)
        manifest.add_segment(ours)
        for name in (ours, other):
            os.close(create_segment(name, 65536))

        removed = clean_run_dir(tmp_path / "c")

        assert removed == [
            f"process alpha/kvm ({named.pid})", f"segment {ours}", f"run directory {tmp_path / 'c'}"
        ]  # fmt: skip
        assert named.wait(5) == -9
        assert bystander.poll() is None
        assert unlink_segment(other)
        bystander.kill()


def test_pid_that_was_used_again_is_left_alone(tmp_path: Path) -> None:
    manifest = make_manifest(tmp_path)
    with sleeper() as process:
        manifest.add_process("alpha/kvm", process.pid)
        record = manifest.data.processes[0]
        manifest.data.processes[0] = type(record)(record.target, record.pid, record.start_ticks - 1)
        manifest.drop_process(-1)

        assert clean_run_dir(tmp_path / "c") == [f"run directory {tmp_path / 'c'}"]
        assert process.poll() is None
        process.kill()


def test_clean_touches_neither_a_running_cluster_nor_a_foreign_directory(tmp_path: Path) -> None:
    make_manifest(tmp_path)
    lock = Lock(tmp_path / "c" / LOCK_FILE, "taken")
    assert is_locked(tmp_path / "c" / LOCK_FILE)
    assert clean_run_dir(tmp_path / "c") is None
    lock.release()

    (tmp_path / "c" / "manifest.json").write_text('{"version": 99}')
    assert clean_run_dir(tmp_path / "c") is None
    assert (tmp_path / "c").is_dir()


@pytest.mark.parametrize("names", [[], [LOCK_FILE]])
def test_clean_removes_what_was_killed_before_it_made_anything(tmp_path: Path, names: list[str]) -> None:
    (tmp_path / "c").mkdir()
    for name in names:
        (tmp_path / "c" / name).touch()

    assert clean_run_dir(tmp_path / "c") == [f"run directory {tmp_path / 'c'}"]
    assert not (tmp_path / "c").exists()


def test_segment_name_with_a_path_is_no_segment() -> None:
    assert not unlink_segment("../etc/passwd")


def test_segment_is_zeroed_and_has_the_asked_size() -> None:
    name = segment_name("c", "vm1")
    fd = create_segment(name, 131072)
    try:
        assert os.fstat(fd).st_size == 131072
        assert os.pread(fd, 16, 0) == bytes(16)
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)
        assert unlink_segment(name)


def test_a_segment_takes_as_much_memory_as_another_that_is_in_use() -> None:
    names = [segment_name("c", "vm1"), segment_name("c", "vm1")]
    used, fd = (create_segment(name, 1 << 20) for name in names)
    try:
        for offset in (3 << 16, 9 << 16, (1 << 20) - 1):
            os.pwrite(used, b"x", offset)

        reserve_as_used(fd, names[0])

        assert os.fstat(fd).st_blocks == os.fstat(used).st_blocks
        assert list(data_ranges(fd, 1 << 20)) == [], "what nobody wrote counts as written"
        assert os.pread(fd, 1 << 20, 0) == bytes(1 << 20)
        with pytest.raises(HostFault, match="no room for the RAM that the VM uses: No such file"):
            reserve_as_used(fd, names[0] + "gone")
    finally:
        for name, opened in zip(names, (used, fd), strict=True):
            os.close(opened)
            assert unlink_segment(name)


def test_start_time_of_no_process_is_none() -> None:
    assert start_ticks(os.getpid())
    assert start_ticks(1 << 22) is None


def test_directory_that_others_may_write_is_refused(tmp_path: Path) -> None:
    open_dir = tmp_path / "open"
    open_dir.mkdir()
    open_dir.chmod(0o777)

    with pytest.raises(UserError, match="does not belong to this user alone"):
        make_private_dir(open_dir)


def test_cluster_is_chosen_only_when_it_is_the_only_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(UserError, match="no cluster runs"):
        choose_cluster(None)
    locks = []
    for name in ("one", "two"):
        (tmp_path / "pefbox" / name).mkdir(parents=True)
        locks.append(Lock(tmp_path / "pefbox" / name / LOCK_FILE, "taken"))

    with pytest.raises(UserError, match="--cluster: one, two"):
        choose_cluster(None)
    assert choose_cluster("two") == "two"
    with pytest.raises(UserError, match='no cluster "three" runs; running: one, two'):
        choose_cluster("three")
    locks[0].release()
    assert choose_cluster(None) == "two"
    locks[1].release()


def test_what_is_gone_may_stay_written_down_while_the_disk_is_full(tmp_path: Path) -> None:
    manifest = make_manifest(tmp_path)
    manifest.add_segment("pefbox-c-vm1-1")
    (tmp_path / "c" / "manifest.new").mkdir()

    with pytest.raises(HostFault, match=r"manifest\.json: cannot write"):
        manifest.add_segment("pefbox-c-vm1-2")
    manifest.drop_segment("pefbox-c-vm1-1")
    manifest.drop_process(1)

    data = read_manifest(tmp_path / "c" / "manifest.json")
    assert data is not None
    assert data.segments == ["pefbox-c-vm1-1"]


def test_asking_whether_a_lock_is_held_keeps_nobody_from_taking_it(tmp_path: Path) -> None:
    path = tmp_path / LOCK_FILE
    path.touch()
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(lambda: [is_locked(path) for _ in range(3000)])
        while not asked.done():
            Lock(path, "somebody asked").release()
        assert set(asked.result()) <= {True, False}


def test_killed_cluster_is_named_until_it_is_cleaned_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert left_over_clusters() == []
    (tmp_path / "pefbox").mkdir()
    make_manifest(tmp_path / "pefbox")
    lock = Lock(tmp_path / "pefbox" / "c" / LOCK_FILE, "taken")
    assert left_over_clusters() == []
    lock.release()

    assert left_over_clusters() == ["c"]
    with pytest.raises(UserError, match=r"no cluster runs; killed, .*\(pefbox clean\): c; start one"):
        choose_cluster(None)
    assert clean_run_dir(tmp_path / "pefbox" / "c") is not None
    assert left_over_clusters() == []
