"""The kernel configuration: what the fragment asks for, what a built kernel says of itself."""

from __future__ import annotations

import gzip

import pytest

from deploy.linux.config import (
    FOR_SECURE,
    differences,
    embedded_config,
    findings_for_secure,
    fragment_text,
    lacks_for_secure,
    parse_config,
)

NEEDED = [
    "PPC64",
    "PPC_BOOK3S_64",
    "CPU_LITTLE_ENDIAN",
    "PPC_PSERIES",
    "PPC_SVM",
    "PPC_RADIX_MMU",
    "PPC_64K_PAGES",
    "RELOCATABLE",
    "PPC_OF_BOOT_TRAMPOLINE",
    "KEXEC",
    "KEXEC_FILE",
    "SMP",
    "ALTIVEC",
    "VSX",
    "HVC_CONSOLE",
    "PCI",
    "PCI_MSI",
    "VIRTIO_PCI",
    "VIRTIO_BLK",
    "VIRTIO_NET",
    "VIRTIO_CONSOLE",
    "VIRTIO_BALLOON",
    "HW_RANDOM_VIRTIO",
    "EXT4_FS",
    "BLK_DEV_INITRD",
    "DEVTMPFS",
    "PROC_FS",
    "SYSFS",
    "TMPFS",
    "BINFMT_ELF",
    "BINFMT_SCRIPT",
    "NET",
    "INET",
    "IKCONFIG",
    "PPC_SPLPAR",
]

GOOD = dict.fromkeys(FOR_SECURE, "y")


def kernel_with(options: dict[str, str]) -> bytes:
    text = "".join(f"CONFIG_{name}={value}\n" for name, value in options.items() if value != "n")
    return b"\x7fELF code" + b"IKCFG_ST" + gzip.compress(text.encode()) + b"IKCFG_ED" + b" more code"


@pytest.mark.parametrize("option", NEEDED)
def test_the_fragment_asks_for_what_a_guest_needs(option: str) -> None:
    assert parse_config(fragment_text())[option] == "y"


def test_the_fragment_leaves_out_what_costs_build_time() -> None:
    fragment = parse_config(fragment_text())

    assert fragment["EXPERT"] == "y"
    assert fragment["PPC_POWERNV"] == "n"
    assert not {"MODULES", "VT", "IPV6", "DEBUG_INFO"} & set(fragment)


def test_an_option_that_the_source_did_not_take_is_named() -> None:
    wanted = {"PPC_SVM": "y", "NR_CPUS": "8", "PPC_POWERNV": "n"}

    assert differences(wanted, {"PPC_SVM": "y", "NR_CPUS": "8"}) == []
    assert differences(wanted, {"NR_CPUS": "2048", "PPC_POWERNV": "y"}) == [
        "CONFIG_PPC_SVM is n, wanted y",
        "CONFIG_NR_CPUS is 2048, wanted 8",
        "CONFIG_PPC_POWERNV is y, wanted n",
    ]


def test_a_kernel_tells_its_configuration() -> None:
    options = embedded_config(kernel_with({**GOOD, "NR_CPUS": "8"}))

    assert options == {**GOOD, "NR_CPUS": "8"}
    assert lacks_for_secure(options) == []


@pytest.mark.parametrize(
    "kernel", [b"", b"\x7fELF", b"IKCFG_ST not gzip IKCFG_ED", b"IKCFG_ST" + gzip.compress(b"", mtime=0)]
)
def test_a_file_without_its_configuration_tells_nothing(kernel: bytes) -> None:
    assert embedded_config(kernel) is None
    assert findings_for_secure(kernel) == []


@pytest.mark.parametrize("option", FOR_SECURE)
def test_what_keeps_a_kernel_from_being_secure_is_told_with_the_reason(option: str) -> None:
    kernel = kernel_with({**GOOD, option: "n"})

    assert findings_for_secure(kernel) == [f"no CONFIG_{option}: {FOR_SECURE[option]}"]


def test_pages_of_4_kib_are_named_as_the_reason() -> None:
    kernel = kernel_with({**GOOD, "PPC_64K_PAGES": "n", "PPC_4K_PAGES": "y"})

    (finding,) = findings_for_secure(kernel)

    assert "counts pages of 4 KiB where UV_SHARE_PAGE counts 64 KiB" in finding


def test_a_configuration_that_unpacks_without_end_is_bounded() -> None:
    bomb = b"IKCFG_ST" + gzip.compress(bytes(64 << 20)) + b"IKCFG_ED"

    assert embedded_config(bomb) == {}
