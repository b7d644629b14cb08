"""Kernel configurations: our fragment, the .config that it became, and the one that a built kernel carries inside.

CONFIG_IKCONFIG puts a gzip of .config between two marks into the image (Linux `kernel/configs.c`), so a kernel file
can be asked what it can do before it is started.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Mapping
from importlib import resources

FRAGMENT_NAME = "fragment.config"
_IKCONFIG_START, _IKCONFIG_END = b"IKCFG_ST", b"IKCFG_ED"
_GZIP_WINDOW = 31
_MAX_CONFIG_BYTES = 4 << 20

Options = Mapping[str, str]
"""Option without `CONFIG_` -> its value; `n` for one that is not set."""

FOR_SECURE: Mapping[str, str] = {
    "PPC_SVM": "it cannot ask for UV_ESM and runs as a normal VM",
    "PPC_64K_PAGES": (
        "it counts pages of 4 KiB where UV_SHARE_PAGE counts 64 KiB, so it would share other memory than it means to"
    ),
    "PPC_RADIX_MMU": "it has no MMU that works here",
    "SWIOTLB": "its devices have no shared memory to work in",
    "PPC_OF_BOOT_TRAMPOLINE": "it cannot be entered from firmware, and only there it calls UV_ESM",
}
"""What a kernel needs to run as a secure VM, and what happens without it."""


def fragment_text() -> str:
    """The fragment that our kernel is built from."""
    return (resources.files("deploy.linux") / FRAGMENT_NAME).read_text()


def fragment_sha256() -> str:
    """What tells one fragment from another."""
    return hashlib.sha256(fragment_text().encode()).hexdigest()


def parse_config(text: str) -> dict[str, str]:
    """The options of a .config or a fragment."""
    options = dict(re.findall(r"^CONFIG_(\w+)=(.*)$", text, re.MULTILINE))
    unset = re.findall(r"^# CONFIG_(\w+) is not set$", text, re.MULTILINE)
    return {**dict.fromkeys(unset, "n"), **options}


def differences(wanted: Options, built: Options) -> list[str]:
    """Where `built` is not what `wanted` asks for, one a line."""
    return [
        f"CONFIG_{name} is {built.get(name, 'n')}, wanted {value}"
        for name, value in wanted.items()
        if built.get(name, "n") != value
    ]


def embedded_config(kernel: bytes) -> dict[str, str] | None:
    """The options of a kernel file that carries its configuration, else None."""
    start = kernel.find(_IKCONFIG_START)
    end = kernel.find(_IKCONFIG_END, start)
    if start < 0 or end < 0:
        return None
    unpacker = zlib.decompressobj(_GZIP_WINDOW)
    try:
        text = unpacker.decompress(kernel[start + len(_IKCONFIG_START) : end], _MAX_CONFIG_BYTES)
    except zlib.error:
        return None
    return parse_config(text.decode(errors="replace"))


def lacks_for_secure(options: Options) -> list[str]:
    """What keeps a kernel with these options from being a secure VM, one a line."""
    return [f"no CONFIG_{name}: {cost}" for name, cost in FOR_SECURE.items() if options.get(name) != "y"]


def findings_for_secure(kernel: bytes) -> list[str]:
    """What keeps a kernel file, by its own word, from being a secure VM, one a line.

    A kernel without its configuration inside, or a program that is no Linux, is taken as it is.
    """
    options = embedded_config(kernel)
    return lacks_for_secure(options) if options is not None else []
