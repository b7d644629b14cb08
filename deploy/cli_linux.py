"""`pefbox linux`: the Linux kernel and initial RAM disk for guests that run real POWER code, and disks with them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from deploy.cli_support import json_option, parse_size

if TYPE_CHECKING:
    from deploy.linux.store import LinuxImage

_state_option = click.option(
    "--state", "cache", type=click.Path(path_type=Path, file_okay=False), help="Cache; default: ~/.cache/pefbox."
)


@click.group("linux")
def linux() -> None:
    """Build and show the Linux kernel and initial RAM disk for guests."""


@linux.command("build")
@_state_option
@click.option("--update", is_flag=True, help="Look for newer packages first.")
@json_option
def build(cache: Path | None, update: bool, as_json: bool) -> None:
    """Fetch Debian's kernel source and busybox, build, and keep the result in the cache.

    Takes some minutes the first time and a second from then on. Needs no root: what is not installed is unpacked in
    the cache.
    """
    # Imported here: the other commands should not wait for it.
    from deploy.linux.build import build_linux
    from deploy.linux.store import default_cache

    image, was_there = build_linux(_absolute(cache or default_cache()), _say, update=update)
    _show(image, as_json, cached=was_there)


@linux.command("show")
@_state_option
@json_option
def show(cache: Path | None, as_json: bool) -> None:
    """Show the newest image in the cache for the present configuration: files, versions, what it can do."""
    _show(_built(cache), as_json, cached=True)


@linux.command("fetch-debian")
@_state_option
@click.option("--update", is_flag=True, help="Look for a newer package first.")
@json_option
def fetch_debian(cache: Path | None, update: bool, as_json: bool) -> None:
    """Fetch Debian's own kernel for ppc64el, which boots as a normal VM."""
    from deploy.linux.config import lacks_for_secure, parse_config
    from deploy.linux.debian import fetch_debian_kernel
    from deploy.linux.store import default_cache

    kernel, was_there = fetch_debian_kernel(_absolute(cache or default_cache()), _say, update=update)
    facts = {
        "kernel": kernel.kernel,
        "config": kernel.config,
        "package": kernel.name,
        "cached": was_there,
        "lacks_for_secure": lacks_for_secure(parse_config(Path(kernel.config).read_text())),
    }
    _print(facts, as_json)


@linux.command("boot-disk")
@click.argument("disk", type=click.Path(path_type=Path))
@click.option("--kernel", type=click.Path(path_type=Path), help="A ppc64le vmlinux; default: the built one.")
@click.option(
    "--root", type=click.Path(path_type=Path), help="A directory, or the image of a file system; default: busybox."
)
@click.option("--root-size", help="Size of the file system that is made of a directory.")
@_state_option
@json_option
def boot_disk(
    disk: Path, kernel: Path | None, root: Path | None, root_size: str | None, cache: Path | None, as_json: bool
) -> None:
    """Write an image DISK from which firmware starts Linux: a PReP boot partition with the kernel, and its root.

    The root file system is the second partition, /dev/vda2 in the guest.
    """
    from deploy.linux.boot_disk import make_busybox_tree, write_boot_disk

    root_bytes = None if root_size is None else parse_size(root_size, "--root-size")
    with tempfile.TemporaryDirectory(prefix="pefbox-root-") as tree:
        if root is None:
            root = Path(tree)
            make_busybox_tree(Path(_built(cache).initramfs), root)
        written = write_boot_disk(disk, kernel or Path(_built(cache).kernel), root, root_bytes)
    _print(msgspec.to_builtins(written), as_json)


def _built(cache: Path | None) -> LinuxImage:
    """The newest image in the cache; raises UserError with the command that makes one."""
    from deploy.linux.store import built_image, default_cache

    return built_image(_absolute(cache or default_cache()))


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()


def _say(text: str) -> None:
    click.echo(text, err=True)


def _show(image: LinuxImage, as_json: bool, *, cached: bool) -> None:
    _print(_facts(image, cached=cached), as_json)


def _print(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        text = "; ".join(value) or "nothing" if isinstance(value, list) else str(value)
        click.echo(f"{name.replace('_', ' '):<18}{text}")


def _facts(image: LinuxImage, *, cached: bool) -> dict[str, Any]:
    from deploy.linux.config import lacks_for_secure, parse_config

    inputs = image.facts.inputs
    return {
        "kernel": image.kernel,
        "kernel_bytes": image.facts.kernel_bytes,
        "initramfs": image.initramfs,
        "initramfs_bytes": image.facts.initramfs_bytes,
        "config": image.config,
        "source_version": inputs.source_version,
        "busybox_version": inputs.busybox_version,
        "compiler": inputs.compiler,
        "key": inputs.key,
        "build_seconds": image.facts.seconds,
        "cached": cached,
        "lacks_for_secure": lacks_for_secure(parse_config(Path(image.config).read_text())),
    }
