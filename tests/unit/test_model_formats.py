"""Formats of the model: kernel image and boot partition."""

from __future__ import annotations

import io
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import ImageRefused
from protocol.geometry import PAGE_BYTES
from services.guest.model import image
from services.guest.model.state import Workload
from shared import boot_partition
from shared.boot_partition import PartitionType

# -- image ----------------------------------------------------------------------------------------------------------


def test_an_image_names_its_sources_workload_and_options() -> None:
    built = image.build_image("demo", {"swiotlb_slots": 2048, "dma": "iommu-always"})
    header = image.parse_header(built[:PAGE_BYTES])
    assert len(built) % PAGE_BYTES == 0
    assert header.sources_sha512 == image.sources_digest()
    assert header.settings.workload is Workload.DEMO
    assert header.settings.options == {"swiotlb_slots": 2048, "dma": "iommu-always"}
    assert built[image.HEADER_BYTES :][: header.payload_bytes] == image.sources()


def test_the_same_settings_give_the_same_image_in_whatever_order() -> None:
    assert image.build_image("disk", {"seed": 1, "disk_ops": 2}) == image.build_image(
        "disk", {"disk_ops": 2, "seed": 1}
    )
    assert image.build_image("disk") != image.build_image("idle")


@pytest.mark.parametrize(
    "settings_", [("games", {}), ("demo", {"colour": 1}), ("demo", {"dma": "magic"}), ("demo", {"seed": "x"})]
)
def test_wrong_settings_are_refused(settings_: tuple[str, dict[str, image.Option]]) -> None:
    with pytest.raises(ImageRefused, match="allowed are"):
        image.build_image(*settings_)


@pytest.mark.parametrize("at", [0, 9, 13, 16, 85, 90])
def test_a_damaged_header_is_refused(at: int) -> None:
    damaged = bytearray(image.build_image("demo")[:PAGE_BYTES])
    damaged[at] ^= 0xFF
    with pytest.raises(ImageRefused):
        header = image.parse_header(bytes(damaged))
        if header.sources_sha512 != image.sources_digest():
            raise ImageRefused("other sources")


# -- boot partition ---------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.binary(min_size=1, max_size=3000), st.binary(max_size=3000), st.text("abc=, ", max_size=60))
def test_a_boot_partition_gives_its_three_files_back(kernel: bytes, initrd: bytes, command_line: str) -> None:
    built = boot_partition.build_boot_partition(kernel, initrd, command_line)
    header = boot_partition.parse_header(built[:512], len(built))
    files = [built[part.offset_bytes :][: part.n_bytes] for part in (header.image, header.initrd, header.command_line)]
    assert files == [kernel, initrd, command_line.encode()]
    assert len(built) % 512 == 0


def test_a_disk_has_three_aligned_partitions() -> None:
    boot = boot_partition.build_boot_partition(b"kernel", b"", "svm=on")
    with tempfile.TemporaryFile() as file:
        layout = boot_partition.write_disk(file, boot, data=io.BytesIO(b"data" * 100), data_bytes=3 << 20)
        file.seek(0)
        content = file.read()
    found = boot_partition.parse_mbr(content[:512])
    assert [part.type for part in found] == [PartitionType.BOOT, PartitionType.DATA, PartitionType.SCRATCH]
    assert content[found[0].first_sector * 512 :][: len(boot)] == boot
    assert content[found[1].first_sector * 512 :][:400] == b"data" * 100
    assert found[1].n_sectors * 512 == 3 << 20
    assert len(content) == layout.size_bytes
    assert layout.scratch.offset_bytes == found[2].first_sector * 512


def test_an_empty_image_and_a_disk_without_table_are_refused() -> None:
    with pytest.raises(ImageRefused):
        boot_partition.build_boot_partition(b"", b"", "")
    with pytest.raises(ImageRefused):
        boot_partition.parse_mbr(bytes(512))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 63), st.integers(1, 255))
def test_a_damaged_boot_header_never_points_outside_the_partition(at: int, change: int) -> None:
    built = bytearray(boot_partition.build_boot_partition(b"k" * 700, b"i" * 900, "x"))
    built[at] ^= change
    try:
        header = boot_partition.parse_header(bytes(built[:512]), len(built))
    except ImageRefused:
        return
    for part in (header.image, header.initrd, header.command_line):
        assert part.offset_bytes + part.n_bytes <= len(built)
