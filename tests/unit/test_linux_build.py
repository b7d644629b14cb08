"""Building and caching the kernel, with programs of our own in place of apt, compiler and make."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.linux.apt import Apt
from deploy.linux.build import build_linux
from deploy.linux.config import fragment_text
from deploy.linux.debian import fetch_debian_kernel, newest_debian_kernel
from deploy.linux.kernel import run_with_progress
from deploy.linux.store import ImageFacts, Inputs, Store
from deploy.linux.toolchain import COMPILER, find_toolchain
from protocol.errors import UserError

APT = """
import os, sys
from pathlib import Path
options = dict(word.split("=", 1) for flag, word in zip(sys.argv, sys.argv[1:]) if flag == "-o")
words = [w for i, w in enumerate(sys.argv[1:], 1) if w != "-o" and sys.argv[i - 1] != "-o"]
state = Path(os.environ["FAKE"])
with (state / "apt.log").open("a") as log:
    log.write(" ".join(words) + "\\n")
if words[0] == "update":
    (Path(options["Dir::State"]) / "lists" / "x_Packages").write_text("")
if words[0] == "policy":
    print(f"{words[1]}:\\n  Candidate: {(state / 'version').read_text()}")
if words[0] == "depends":
    print(f"{words[1]}\\n  Depends: linux-image-{(state / 'version').read_text()}-powerpc64le:ppc64el")
if words[0] == "download":
    for word in words[1:]:
        Path(word.replace(":", "_") + ".deb").write_text(word)
"""

DPKG_DEB = """
import os, sys, tarfile, io
from pathlib import Path
archive, into = Path(sys.argv[2]), Path(sys.argv[3])
if archive.name.startswith("busybox"):
    (into / "bin").mkdir(parents=True)
    (into / "bin/busybox").write_bytes(b"\\x7fELF busybox")
elif archive.name.startswith("linux-image"):
    (into / "boot").mkdir(parents=True)
    (into / "boot/vmlinux-6.1").write_bytes(b"\\x7fELF kernel of Debian")
    (into / "boot/config-6.1").write_text("CONFIG_SMP=y\\n")
    (into / "lib/modules").mkdir(parents=True)
else:
    (into / "usr/src").mkdir(parents=True)
    with tarfile.open(into / "usr/src/linux-source-6.1.tar.xz", "w:xz") as tar:
        for name in ("linux-source-6.1/Makefile", "linux-source-6.1/a.rst"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
"""

MAKE = """
import os, sys
from pathlib import Path
words = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
objects = Path(words["O"])
with (Path(os.environ["FAKE"]) / "make.log").open("a") as log:
    log.write(sys.argv[-1] + "\\n")
if sys.argv[-1] == "allnoconfig":
    (objects / ".config").write_text(Path(words["KCONFIG_ALLCONFIG"]).read_text())
elif (Path(os.environ["FAKE"]) / "broken").exists():
    print("  CC      a.o")
    sys.exit("a.c:1: error: it does not compile")
else:
    (objects / "vmlinux").write_bytes(b"\\x7fELF kernel")
"""

PROGRAMS = {
    "apt-get": APT,
    "apt-cache": APT,
    "dpkg-deb": DPKG_DEB,
    "dpkg-query": "import sys; sys.exit(1)",
    "make": MAKE,
    COMPILER: "print('powerpc64le-linux-gnu-gcc (Debian 12) 12.2.0')",
    **{name: "" for name in ("gcc", "xz", "perl", "bison", "flex", "bc")},
}


class Machine:
    """A machine whose programs are ours; `said` is what the build told."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fake, self.cache = directory / "fake", directory / "cache"
        self.bin = directory / "bin"
        self.said: list[str] = []
        self.fake.mkdir()
        self.bin.mkdir()
        (self.fake / "version").write_text("6.1.1-1")
        for name, text in PROGRAMS.items():
            self.install(name, text)
        (self.bin / "tar").symlink_to(shutil.which("tar") or "tar")
        (self.bin / "xz").unlink()
        (self.bin / "xz").symlink_to(shutil.which("xz") or "xz")
        monkeypatch.setenv("PATH", str(self.bin))
        monkeypatch.setenv("FAKE", str(self.fake))

    def install(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(f"#!{sys.executable}\n{text}")
        path.chmod(0o755)

    def build(self) -> tuple[str, bool]:
        image, was_there = build_linux(self.cache, self.said.append)
        return image.kernel, was_there

    def log(self, program: str) -> list[str]:
        path = self.fake / f"{program}.log"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    yield Machine(tmp_path, monkeypatch)


def test_a_build_leaves_kernel_initramfs_and_config_and_nothing_else(machine: Machine) -> None:
    kernel, was_there = machine.build()

    place = Path(kernel).parent
    assert not was_there
    assert Path(kernel).read_bytes() == b"\x7fELF kernel"
    assert sorted(path.name for path in place.iterdir()) == ["config", "image.json", "initramfs.cpio", "vmlinux"]
    assert (place / "config").read_text() == fragment_text()
    assert list((machine.cache / "work").iterdir()) == []


def test_the_second_time_it_comes_from_the_cache_without_the_network(machine: Machine) -> None:
    first, _ = machine.build()
    downloads = [line for line in machine.log("apt") if not line.startswith("policy")]

    second, was_there = machine.build()

    assert (second, was_there) == (first, True)
    assert [line for line in machine.log("apt") if not line.startswith("policy")] == downloads
    assert machine.log("make") == ["allnoconfig", "vmlinux"]


def test_another_source_version_is_another_image(machine: Machine) -> None:
    first, _ = machine.build()
    (machine.fake / "version").write_text("6.1.2-1")

    second, was_there = machine.build()

    assert not was_there
    assert second != first
    assert Path(first).exists()


def test_a_build_that_failed_shows_the_compilers_words_and_goes_on_where_it_stopped(machine: Machine) -> None:
    (machine.fake / "broken").touch()
    with pytest.raises(UserError, match=r"make vmlinux failed with status 1:\n(.*\n)*.*it does not compile"):
        machine.build()
    downloads = machine.log("apt").count("download linux-source-6.1")
    (machine.fake / "broken").unlink()

    _, was_there = machine.build()

    assert not was_there
    assert machine.log("apt").count("download linux-source-6.1") == downloads == 1
    assert machine.log("make") == ["allnoconfig", "vmlinux", "vmlinux"]


def test_a_source_that_does_not_take_the_configuration_is_named(machine: Machine) -> None:
    machine.install("make", MAKE.replace(".read_text())", ".read_text().replace('PPC_SVM=y', 'X=y'))"))

    with pytest.raises(UserError, match="does not take the configuration: CONFIG_PPC_SVM is n, wanted y"):
        machine.build()


def test_files_that_nobody_compiles_are_not_unpacked(machine: Machine) -> None:
    (machine.fake / "broken").touch()
    with pytest.raises(UserError):
        machine.build()

    (source,) = (machine.cache / "work").glob("*/source")

    assert [path.name for path in source.iterdir()] == ["Makefile"]


@pytest.mark.parametrize(("program", "line"), [("gcc", "apt-get install gcc libc6-dev"), ("xz", "xz-utils")])
def test_a_missing_program_is_named_with_the_line_that_helps(machine: Machine, program: str, line: str) -> None:
    (machine.bin / program).unlink()

    with pytest.raises(UserError, match=line):
        machine.build()


def test_missing_cross_tools_are_unpacked_into_the_cache_once(machine: Machine) -> None:
    (machine.bin / "bison").unlink()
    apt, tools = Apt(machine.cache / "apt", machine.said.append), machine.cache / "tools"
    machine.install("apt-get", APT + "\nif words[0] == '-s': print('Inst bison (1)\\nInst m4 (2)')")
    machine.install("dpkg-deb", "")

    toolchain = find_toolchain(apt, tools, machine.said.append)
    find_toolchain(apt, tools, machine.said.append)

    assert machine.log("apt").count("download bison m4") == 1
    assert toolchain.environment["PATH"].startswith(f"{tools}/usr/bin:")


def test_a_machine_without_apt_is_told_so(machine: Machine) -> None:
    (machine.bin / "apt-get").unlink()

    with pytest.raises(UserError, match="no program apt-get: packages are fetched on Debian"):
        machine.build()


def test_a_half_written_image_is_none(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (tmp_path / "aa").mkdir()
    (tmp_path / "aa" / "image.json").write_text('{"inputs": {')

    assert store.find("aa") is None
    assert store.all() == []


def test_the_newest_image_of_a_fragment_is_found(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for age, (key, fragment) in enumerate([("aa", "one"), ("bb", "two"), ("cc", "one")]):
        result = tmp_path / "result"
        result.mkdir()
        store.put(key, result, ImageFacts(Inputs(key, "1", "gcc", fragment, "r"), 1.0, 1, 1))
        os.utime(tmp_path / key / "image.json", (100 + age, 100 + age))

    newest = store.newest("one")

    assert newest is not None
    assert newest.facts.inputs.source_version == "cc"
    assert store.newest("three") is None


def test_show_without_an_image_says_what_to_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deploy.cli", "linux", "show", "--state", str(tmp_path)]

    result = subprocess.run(command, capture_output=True, text=True)

    assert result.returncode == 1
    assert "pefbox linux build" in result.stderr
    assert result.stderr.count("\n") == 1


def test_show_tells_what_an_image_can_do(tmp_path: Path) -> None:
    from deploy.linux.config import fragment_sha256

    result = tmp_path / "result"
    result.mkdir()
    (result / "config").write_text(fragment_text().replace("CONFIG_PPC_64K_PAGES=y\n", ""))
    Store(tmp_path).put("aa", result, ImageFacts(Inputs("6.1", "1.35", "gcc", fragment_sha256(), "r"), 200.0, 8, 9))

    command = [sys.executable, "-m", "deploy.cli", "linux", "show", "--json", "--state", str(tmp_path)]
    facts = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert facts["source_version"] == "6.1"
    assert any("PPC_64K_PAGES" in line for line in facts["lacks_for_secure"])


def test_progress_is_told_and_a_failure_has_the_last_lines() -> None:
    said: list[str] = []
    with pytest.raises(UserError, match=r"make failed with status 3:\nline 5\n(.*\n)*line 19$"):
        run_with_progress(
            [sys.executable, "-c", "for n in range(20): print('line', n)\nraise SystemExit(3)"],
            os.environ,
            "make",
            said.append,
        )


def test_an_installed_program_that_is_not_found_is_told_so(machine: Machine) -> None:
    (machine.bin / "bison").unlink()

    with pytest.raises(UserError, match="installed, but not on the PATH: bison; or run: apt-get install bison"):
        find_toolchain(Apt(machine.cache / "apt", machine.said.append), machine.cache / "tools", machine.said.append)


def test_debians_kernel_is_fetched_once_and_again_when_there_is_a_newer_one(machine: Machine) -> None:
    assert newest_debian_kernel(machine.cache) is None
    kernel, was_there = fetch_debian_kernel(machine.cache, machine.said.append)
    assert (kernel.name, was_there) == ("linux-image-6.1.1-1-powerpc64le_6.1.1-1", False)
    assert Path(kernel.kernel).read_bytes() == b"\x7fELF kernel of Debian"
    assert sorted(path.name for path in Path(kernel.kernel).parent.iterdir()) == ["config", "vmlinux"]

    assert fetch_debian_kernel(machine.cache, machine.said.append) == (kernel, True)
    assert sum(line.startswith("download") for line in machine.log("apt")) == 1

    (machine.fake / "version").write_text("6.1.2-1")
    newer, was_there = fetch_debian_kernel(machine.cache, machine.said.append)
    assert not was_there
    assert newest_debian_kernel(machine.cache) == newer
    assert newer.name != kernel.name


def test_a_package_without_a_kernel_is_named(machine: Machine) -> None:
    machine.install("dpkg-deb", "")
    with pytest.raises(UserError, match="powerpc64le:ppc64el has no boot/vmlinux"):
        fetch_debian_kernel(machine.cache, machine.said.append)
    assert newest_debian_kernel(machine.cache) is None
