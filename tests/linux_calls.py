"""What a guest asked of its machine, from the records of its processes, as the table of docs/linux.md.

python -m tests.linux_calls STATE_DIR VM          hypercalls and RTAS services
python -m tests.linux_calls VMLINUX               special registers that a kernel's code names
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from elftools.elf.constants import SH_FLAGS
from elftools.elf.elffile import ELFFile

from deploy.run_dirs import Paths
from deploy.trace.reader import FrameReader, SeenFrame
from protocol.hcalls import H_REGISTER_PROC_TBL, H_RTAS, HCALLS
from protocol.messages import EXIT_RTAS
from protocol.rtas import RTAS
from protocol.wire import Envelope, MessageKind, decode

BY_KVM = "ibm,set-xive and its kin"
"""RTAS services that kvm answers itself are no exits, and their block is not recorded."""
UNKNOWN = "a service that the tree does not name"
_SPR_MASK, _MFSPR, _MTSPR = 0xFC0007FE, 0x7C0002A6, 0x7C0003A6

Calls = Counter[tuple[str, bool]]
"""How often a call was made: by its name, and whether Linux made it (firmware before)."""


def calls_made(state_dir: Path, vm: str) -> Calls:
    """Hypercalls and RTAS services of a VM since its first start; Linux begins with its process table."""
    calls: Calls = Counter()
    linux_ns = 0
    for t_ns, envelope in _calls(state_dir, vm + "/guest", "out"):
        call = HCALLS.by_number.get(envelope.number)
        if call is None:
            continue
        if call is H_REGISTER_PROC_TBL and not linux_ns:
            linux_ns = t_ns
        calls[call.name, bool(linux_ns)] += 1
    for t_ns, envelope in _calls(state_dir, vm + "/qemu", "in"):
        if envelope.number == EXIT_RTAS.number:
            token = EXIT_RTAS.decode_body(envelope.body).token
            service = RTAS.by_number.get(token)
            name = UNKNOWN if service is None else service.name
            calls[name, bool(linux_ns) and t_ns >= linux_ns] += 1
    for by_linux in (False, True):
        exits = sum(n for (name, when), n in calls.items() if when is by_linux and not name.startswith("H_"))
        calls[BY_KVM, by_linux] = calls[H_RTAS.name, by_linux] - exits
    return calls


def _calls(state_dir: Path, process: str, direction: str) -> Iterator[tuple[int, Envelope]]:
    record = Paths(state_dir, state_dir).trace_file(process)
    frames: Iterator[SeenFrame] = FrameReader(record).read()
    for recorded in frames:
        envelope = decode(recorded.frame)
        if recorded.direction == direction and envelope.kind is MessageKind.CALL:
            yield recorded.t_ns, envelope


def registers_named(vmlinux: Path) -> Counter[tuple[int, bool]]:
    """How often a little-endian kernel's code names each special register: by its number, and whether it writes it."""
    named: Counter[tuple[int, bool]] = Counter()
    with vmlinux.open("rb") as file:
        for section in ELFFile(file).iter_sections():
            if not section["sh_flags"] & SH_FLAGS.SHF_EXECINSTR:
                continue
            words = memoryview(section.data()[: section["sh_size"] // 4 * 4]).cast("I")
            for word in words:
                if word & _SPR_MASK in (_MFSPR, _MTSPR):
                    number = word >> 16 & 31 | (word >> 11 & 31) << 5
                    named[number, word & _SPR_MASK == _MTSPR] += 1
    return named


def table_of_registers(vmlinux: Path) -> list[str]:
    """Its lines."""
    named = registers_named(vmlinux)
    numbers = sorted({number for number, _ in named})
    rows = [f"| {number} | {named[number, False]} | {named[number, True]} |" for number in numbers]
    return ["| register | reads | writes |", "|---|---|---|", *rows]


def table_of_calls(state_dir: Path, vm: str) -> list[str]:
    """Its lines: hypercalls, then RTAS services."""
    calls = calls_made(state_dir, vm)
    names = sorted({name for name, _ in calls}, key=lambda name: (not name.startswith("H_"), name))
    return [
        "| call | before | Linux |",
        "|---|---|---|",
        *(f"| {name} | {calls[name, False]} | {calls[name, True]} |" for name in names),
    ]


def main(words: list[str]) -> None:
    """Write a table."""
    lines = table_of_registers(Path(words[0])) if len(words) == 1 else table_of_calls(Path(words[0]), words[1])
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
