"""The cache of built images: one directory a key, moved into place whole, so that what is there is complete.

KEY/            vmlinux, initramfs.cpio, config, image.json
work/KEY/       source and objects of a build that has not ended; the next run goes on with them
tools/, apt/    programs and package lists that the machine lacks
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec

from deploy.linux.apt import Say
from deploy.linux.config import fragment_sha256
from protocol.errors import UserError

KERNEL_FILE = "vmlinux"
INITRAMFS_FILE = "initramfs.cpio"
CONFIG_FILE = "config"
_FACTS_FILE = "image.json"
_KEY_DIGITS = 16


class Inputs(msgspec.Struct, frozen=True):
    """All that decides what is built; equal inputs give the same key."""

    source_version: str
    busybox_version: str
    compiler: str
    fragment_sha256: str
    recipe: str
    """Digest of the code that builds."""

    @property
    def key(self) -> str:
        """The directory of what these inputs give."""
        return hashlib.sha256(msgspec.msgpack.encode(self)).hexdigest()[:_KEY_DIGITS]


class ImageFacts(msgspec.Struct, frozen=True):
    """What a build leaves behind beside its files."""

    inputs: Inputs
    seconds: float
    """How long the kernel took to build."""
    kernel_bytes: int
    initramfs_bytes: int


class LinuxImage(msgspec.Struct, frozen=True):
    """A built kernel and its initial RAM disk."""

    kernel: str
    initramfs: str
    config: str
    facts: ImageFacts


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/pefbox`, else `~/.cache/pefbox`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pefbox"


class Store:
    """The cache below `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def find(self, key: str) -> LinuxImage | None:
        """The image of that key."""
        place = self.directory / key
        try:
            facts = msgspec.json.decode((place / _FACTS_FILE).read_bytes(), type=ImageFacts)
        except (OSError, msgspec.MsgspecError):
            return None
        return LinuxImage(
            kernel=str(place / KERNEL_FILE),
            initramfs=str(place / INITRAMFS_FILE),
            config=str(place / CONFIG_FILE),
            facts=facts,
        )

    def all(self) -> list[LinuxImage]:
        """Every image, the newest first."""
        places = sorted(self.directory.glob(f"*/{_FACTS_FILE}"), key=lambda path: path.stat().st_mtime, reverse=True)
        return [image for place in places if (image := self.find(place.parent.name)) is not None]

    def newest(self, fragment_sha256: str) -> LinuxImage | None:
        """The newest image that was built from this fragment."""
        return next((image for image in self.all() if image.facts.inputs.fragment_sha256 == fragment_sha256), None)

    def work_dir(self, key: str) -> Path:
        """Where the image of `key` is built; those of other keys are dropped, their inputs have changed."""
        work = self.directory / "work"
        for other in work.glob("*"):
            if other.name != key:
                shutil.rmtree(other)
        (work / key).mkdir(parents=True, exist_ok=True)
        return work / key

    def put(self, key: str, result: Path, facts: ImageFacts) -> None:
        """Move the directory `result` into place as the image of `key`, and drop what it was built from."""
        (result / _FACTS_FILE).write_bytes(msgspec.json.encode(facts))
        place = self.directory / key
        shutil.rmtree(place, ignore_errors=True)
        os.replace(result, place)
        shutil.rmtree(self.directory / "work" / key, ignore_errors=True)

    @contextlib.contextmanager
    def locked(self, say: Say) -> Iterator[None]:
        """Only one build at a time; another one waits here."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("waiting for another build")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def built_image(cache: Path) -> LinuxImage:
    """The newest image of the present configuration in `cache`; raises UserError with the command that makes one."""
    image = Store(cache).newest(fragment_sha256())
    if image is None:
        raise UserError(f"no kernel for the present configuration in {cache}; run: pefbox linux build")
    return image
