"""The kernel and initial RAM disk as they were really built."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from deploy.linux.config import differences, embedded_config, findings_for_secure, fragment_text, parse_config
from deploy.linux.store import LinuxImage
from shared.elf_program import read_program
from shared.esm_kernel import kernel_image
from tests.needs import need_linux


@pytest.fixture(scope="module")
def image() -> LinuxImage:
    return need_linux()


@pytest.mark.linux
def test_the_kernel_is_a_little_endian_power_program_that_starts_at_its_first_byte(image: LinuxImage) -> None:
    program = read_program(Path(image.kernel).read_bytes())

    assert program.little_endian
    assert program.base == program.entry == 0
    assert program.image[: 1 << 20] == kernel_image(Path(image.kernel).read_bytes())[: 1 << 20]


@pytest.mark.linux
def test_the_kernel_carries_the_configuration_that_the_fragment_asks_for(image: LinuxImage) -> None:
    kernel = Path(image.kernel).read_bytes()

    options = embedded_config(kernel)

    assert options is not None
    assert differences(parse_config(fragment_text()), options) == []
    assert options == parse_config(Path(image.config).read_text())
    assert findings_for_secure(kernel) == []


@pytest.mark.linux
def test_the_kernel_can_call_the_ultravisor(image: LinuxImage) -> None:
    with Path(image.kernel).open("rb") as file:
        table = ELFFile(file).get_section_by_name(".symtab")
        assert isinstance(table, SymbolTableSection)
        symbols = {symbol.name for symbol in table.iter_symbols()}

    assert {"ucall_norets", "prom_svm_enable", "dev_attr_svm", "swiotlb_init"} <= symbols


@pytest.mark.linux
def test_the_initial_ram_disk_holds_a_static_busybox_for_the_guest(image: LinuxImage) -> None:
    archive = Path(image.initramfs).read_bytes()

    busybox = ELFFile(io.BytesIO(archive[archive.index(b"\x7fELF") :]))

    assert archive.startswith(b"070701")
    assert (busybox.header["e_machine"], busybox.little_endian) == ("EM_PPC64", True)
    assert not list(busybox.iter_segments("PT_INTERP"))
