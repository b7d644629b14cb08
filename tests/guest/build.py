"""Builds the programs of this folder with Debian's cross compilers.

A bare-metal program is `programs/NAME.c` with `lib/`, big or little endian; `client/` is a client of Open Firmware, of
32 or 64 bits; `linux/NAME.c` is a program for a guest's Linux. What is built lies in `build/guest/` of the checkout
under the digest of all that it was made from, so that each is compiled once.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
OUT = HERE.parent.parent / "build" / "guest"
ENDIANS = {"be": ("powerpc64-linux-gnu-gcc", "-mbig-endian"), "le": ("powerpc64le-linux-gnu-gcc", "-mlittle-endian")}
CLIENT_BITS = {32: ("-m32",), 64: ("-m64", "-mabi=elfv2")}
PROGRAMS = tuple(sorted(path.stem for path in (HERE / "programs").glob("*.c")))
_BARE_METAL = ("-m64", "-mabi=elfv2")
_MACHINE = ("-mcpu=power9", "-mno-vsx", "-mno-altivec", "-msoft-float")
"""The compiler itself uses no floating point or vectors: a program decides when they are on."""
_CODE = (
    "-ffreestanding",
    "-fno-pic",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
    "-fno-strict-aliasing",
)
_LINK = ("-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,--no-warn-rwx-segments")
_FLAGS = (*_MACHINE, *_CODE, *_LINK, "-O2", "-g0", "-Wall", "-Werror", "-Wno-array-bounds")


def build_program(name: str, endian: str) -> Path:
    """The ELF file of `programs/NAME.c`; raises CalledProcessError with the compiler's words."""
    compiler, order = ENDIANS[endian]
    library = sorted((HERE / "lib").iterdir())
    return _build(f"{name}-{endian}", (compiler, order, *_BARE_METAL), [*library, HERE / "programs" / f"{name}.c"])


def build_client(bits: int) -> Path:
    """The client of Open Firmware as a big-endian ELF file; as `build_program`."""
    compiler, order = ENDIANS["be"]
    return _build(f"client-{bits}", (compiler, order, *CLIENT_BITS[bits]), sorted((HERE / "client").iterdir()))


def build_linux_program(name: str) -> Path:
    """`linux/NAME.c` as a static little-endian program; as `build_program`."""
    compiler, order = ENDIANS["le"]
    return _build(f"linux-{name}", (compiler, order, *_BARE_METAL), [HERE / "linux" / f"{name}.c"])


def _build(name: str, command: tuple[str, ...], files: list[Path]) -> Path:
    command = (*command, *_FLAGS)
    digest = hashlib.sha256(" ".join(command).encode())
    for path in files:
        digest.update(path.read_bytes())
    made = OUT / f"{name}-{digest.hexdigest()[:12]}.elf"
    if made.is_file():
        return made
    OUT.mkdir(parents=True, exist_ok=True)
    sources = [str(path) for path in files if path.suffix in (".S", ".c")]
    layouts = [option for path in files if path.suffix == ".lds" for option in (f"-I{path.parent}", f"-Wl,-T,{path}")]
    making = made.with_suffix(f".{os.getpid()}")
    subprocess.run([*command, *layouts, "-o", str(making), *sources], check=True)
    os.replace(making, made)
    return made
