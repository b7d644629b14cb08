"""Every command that the documents show runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONSOLE = re.compile(r"```console\n(.*?)```", re.DOTALL)
RUN_ELSEWHERE = {
    "make demo": "tests/cluster/test_demo.py",
    "make linux-demo": "tests/cluster/test_linux_demo.py",
    "make test": "this run",
    "make bench": "tests.bench",
    "pefbox compare --out report": "tests/cluster/test_dma_designs.py runs a part of it",
    "pefbox compare --designs quirk,iommu-always,nothing --workload read --secure --out report": "as above",
    "pefbox compare --cost hypercall_ns=350 --cost world_switch_ns=2000 --out report": "as above",
    'pefbox gdb vm1 --run -- -nx -q -batch -ex "set endian big" -ex detach': "tests/cluster/test_gdb.py",
    "pefbox linux boot-disk disk.img": "tests/unit/test_boot_disk.py",
}


def commands_of(document: Path) -> list[list[str]]:
    """The `$ ` lines of each console block."""
    blocks = CONSOLE.findall(document.read_text())
    return [[line[2:] for line in block.splitlines() if line.startswith("$ ")] for block in blocks]


def blocks() -> list[tuple[str, list[str]]]:
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [(document.name, block) for document in documents for block in commands_of(document) if block]


BLOCKS = blocks()


@pytest.fixture
def run_dir() -> Iterator[str]:
    # pytest's own directories are too long for the path of a Unix socket.
    with tempfile.TemporaryDirectory(prefix="pb-") as directory:
        yield directory


@pytest.mark.parametrize(("document", "commands"), BLOCKS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(BLOCKS)])
def test_the_commands_of_a_console_block_run(document: str, commands: list[str], run_dir: str, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "XDG_RUNTIME_DIR": run_dir,
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "COLUMNS": "120",
    }
    try:
        for command in commands:
            if command in RUN_ELSEWHERE:
                continue
            done = subprocess.run(
                ["bash", "-c", command],
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=120,
                stdin=subprocess.DEVNULL,
                check=False,
            )
            assert done.returncode == 0, f"{document}: {command}\n{done.stdout}\n{done.stderr}"
    finally:
        subprocess.run(["pefbox", "down"], env=environment, capture_output=True, timeout=60, check=False)


def test_the_readme_shows_commands() -> None:
    assert sum(len(block) for block in commands_of(ROOT / "README.md")) > 8
