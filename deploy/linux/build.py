"""`pefbox linux build`: kernel and initial RAM disk for the machine's inputs, from the cache when they are there."""

from __future__ import annotations

import hashlib
import tempfile
from importlib import resources
from pathlib import Path

from deploy.linux.apt import Apt, Say
from deploy.linux.config import fragment_sha256
from deploy.linux.initramfs import BUSYBOX_PACKAGE, build_initramfs, fetch_busybox, init_script
from deploy.linux.kernel import SOURCE_PACKAGE, KernelBuild
from deploy.linux.store import INITRAMFS_FILE, KERNEL_FILE, ImageFacts, Inputs, LinuxImage, Store
from deploy.linux.toolchain import Toolchain, find_toolchain
from protocol.errors import UserError

_RECIPE = ("kernel.py", "initramfs.py", "init.sh")


def build_linux(cache: Path, say: Say, *, update: bool = False) -> tuple[LinuxImage, bool]:
    """The image for this machine's inputs, and whether it was in the cache; raises UserError.

    `say` is told the progress; `update` looks for newer packages first.
    """
    store = Store(cache)
    with store.locked(say):
        apt = Apt(cache / "apt", say)
        if update:
            apt.update()
        toolchain = find_toolchain(apt, cache / "tools", say)
        inputs = Inputs(
            source_version=apt.candidate(SOURCE_PACKAGE),
            busybox_version=apt.candidate(BUSYBOX_PACKAGE),
            compiler=toolchain.compiler,
            fragment_sha256=fragment_sha256(),
            recipe=_recipe_sha256(),
        )
        found = store.find(inputs.key)
        if found is not None:
            return found, True
        try:
            _build(store, inputs, apt, toolchain, say)
        except OSError as error:
            raise UserError(f"{cache}: {error.strerror or error}") from None
        made = store.find(inputs.key)
        assert made is not None
        return made, False


def _build(store: Store, inputs: Inputs, apt: Apt, toolchain: Toolchain, say: Say) -> None:
    work = store.work_dir(inputs.key)
    with tempfile.TemporaryDirectory(dir=work, prefix="result-") as scratch:
        result, packages = Path(scratch) / "image", Path(scratch) / "packages"
        result.mkdir()
        initramfs = build_initramfs(init_script(), fetch_busybox(apt, packages))
        (result / INITRAMFS_FILE).write_bytes(initramfs)
        seconds = KernelBuild(work, apt, toolchain, say).run(inputs.source_version, result)
        kernel_bytes = (result / KERNEL_FILE).stat().st_size
        store.put(inputs.key, result, ImageFacts(inputs, round(seconds, 1), kernel_bytes, len(initramfs)))


def _recipe_sha256() -> str:
    files = resources.files("deploy.linux")
    return hashlib.sha256(b"".join((files / name).read_bytes() for name in _RECIPE)).hexdigest()
