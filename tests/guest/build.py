"""Builds the bare-metal programs of this folder, big and little endian, with Debian's cross compilers.

A program is `programs/NAME.c` with `lib/`. What is built lies in `build/guest/` of the checkout under the digest of all
that it was made from, so that each is compiled once.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
OUT = HERE.parent.parent / "build" / "guest"
ENDIANS = {"be": ("powerpc64-linux-gnu-gcc", "-mbig-endian"), "le": ("powerpc64le-linux-gnu-gcc", "-mlittle-endian")}
PROGRAMS = tuple(sorted(path.stem for path in (HERE / "programs").glob("*.c")))
_MACHINE = ("-m64", "-mcpu=power9", "-mabi=elfv2", "-mno-vsx", "-mno-altivec", "-msoft-float")
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
    source = HERE / "programs" / f"{name}.c"
    digest = hashlib.sha256(" ".join((compiler, *_FLAGS)).encode())
    for path in (*library, source):
        digest.update(path.read_bytes())
    made = OUT / f"{name}-{endian}-{digest.hexdigest()[:12]}.elf"
    if made.is_file():
        return made
    OUT.mkdir(parents=True, exist_ok=True)
    sources = [str(path) for path in library if path.suffix in (".S", ".c")]
    making = made.with_suffix(f".{os.getpid()}")
    command = [compiler, *_FLAGS, order, f"-I{HERE / 'lib'}", f"-Wl,-T,{HERE / 'lib' / 'program.lds'}"]
    subprocess.run([*command, "-o", str(making), *sources, str(source)], check=True)
    os.replace(making, made)
    return made
