"""`make = "linux"`: what is made of the built kernel for a VM, and when it is made again."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from deploy import linux_files
from deploy.cluster_file import Cluster, parse_cluster, resolve_state
from deploy.linux_files import make_linux_files
from protocol.errors import UserError

CLUSTER = """
make = "linux"
[hosts.alpha]
secure_memory = "64M"
[vms.vm1]
host = "alpha"
memory = "64M"
[vms.vm1.guest]
kernel = "machine"
boot = "kernel"
firmware = "slof.bin"
image = "@state/vmlinux"
esm_blob = "@state/esm"
"""


class Built:
    """A cache with one kernel, and blobs that are the kernel's content."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
        self._kernel = directory / "built"
        self.refuses = False
        monkeypatch.setattr(linux_files, "built_linux", lambda: SimpleNamespace(kernel=str(self._kernel)))
        monkeypatch.setattr(linux_files, "read_program_file", Path.read_bytes)
        monkeypatch.setattr(linux_files, "parts_blob", self._blob)
        for name in ("ensure_keys", "public_key_of"):
            monkeypatch.setattr(linux_files, name, lambda *_: b"key")

    def kernel_is(self, content: bytes) -> None:
        """Of equal content the date is equal, too."""
        self._kernel.write_bytes(content)
        os.utime(self._kernel, (len(content), len(content)))

    def _blob(self, _parts: object, program: bytes, *_: object) -> bytes:
        if self.refuses:
            raise UserError("no CONFIG_PPC_SVM")
        return b"blob of " + program


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Built:
    return Built(monkeypatch, tmp_path)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir()
    return tmp_path / "state"


def cluster(state: Path) -> Cluster:
    return resolve_state(parse_cluster(CLUSTER, "c.toml", state.parent, "c"), state)


def made(state: Path) -> tuple[bytes, bytes]:
    return (state / "vmlinux").read_bytes(), (state / "esm").read_bytes()


def test_kernel_and_blob_are_made_and_made_again_when_the_kernel_changed(built: Built, state: Path) -> None:
    for content in (b"first", b"the second"):
        built.kernel_is(content)
        make_linux_files(cluster(state), state)

        assert made(state) == (content, b"blob of " + content)


def test_what_was_left_half_made_is_not_taken_for_what_was_made_before(built: Built, state: Path) -> None:
    built.kernel_is(b"first")
    make_linux_files(cluster(state), state)
    built.kernel_is(b"the second")
    built.refuses = True
    with pytest.raises(UserError):
        make_linux_files(cluster(state), state)

    built.kernel_is(b"first")
    built.refuses = False
    make_linux_files(cluster(state), state)

    assert made(state) == (b"first", b"blob of first")


def test_files_that_lie_elsewhere_are_the_users(built: Built, state: Path) -> None:
    built.kernel_is(b"built")
    (state.parent / "mine").write_bytes(b"my kernel")
    text = CLUSTER.replace("@state/vmlinux", str(state.parent / "mine"))

    make_linux_files(resolve_state(parse_cluster(text, "c.toml", state.parent, "c"), state), state)

    assert (state.parent / "mine").read_bytes() == b"my kernel"
    assert (state / "esm").read_bytes() == b"blob of my kernel"
