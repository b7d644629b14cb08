"""`pefbox linux`: build and show the Linux kernel and initial RAM disk for guests that run real POWER code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploy.cli_support import json_option
from protocol.errors import UserError

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
    from deploy.linux.config import fragment_sha256
    from deploy.linux.store import Store, default_cache

    directory = _absolute(cache or default_cache())
    image = Store(directory).newest(fragment_sha256())
    if image is None:
        raise UserError(f"no kernel for the present configuration in {directory}; run: pefbox linux build")
    _show(image, as_json, cached=True)


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
