"""The demo's checks, each of which can fail."""

from __future__ import annotations

import tomllib
from typing import Any

import msgspec
import pytest

from deploy.demo_host import are_ciphertext
from deploy.demo_linux import LinuxGuest
from deploy.demo_model import ModelGuest
from deploy.demo_report import MigrationReport, VmReport, conclude

GOOD = VmReport(
    secure=True,
    disk_sha256_guest="ab",
    disk_sha256_host="ab",
    disk_bytes=512,
    bytes_through_swiotlb=512,
    hypercalls={"H_RTAS": 1},
    ultracalls={"UV_ESM": 1},
    host_read_of_secure_page="ciphertext",
    shared_marker_found=True,
    written_region_on_disk=True,
)


def with_changes(**changes: object) -> VmReport:
    return msgspec.structs.replace(GOOD, problems=[], **changes)


def test_a_good_report_has_no_problems() -> None:
    report = with_changes()
    conclude(report)
    assert report.problems == []


@pytest.mark.parametrize(
    "changes",
    [
        {"secure": False},
        {"disk_sha256_guest": "ac"},
        {"disk_sha256_guest": "", "disk_sha256_host": ""},
        {"bytes_through_swiotlb": 511},
        {"disk_bytes": 0, "bytes_through_swiotlb": 0},
        {"secrets_found": ["kernel in normal RAM"]},
        {"shared_marker_found": False},
        {"written_region_on_disk": False},
        {"ultracalls": {}},
        {"host_read_of_secure_page": "plain"},
        {"migration": MigrationReport(source="a", destination="b", seconds=1.0, downtime_ms=9, disk_sha256_host="ab")},
    ],
)
def test_each_check_can_fail(changes: dict[str, Any]) -> None:
    report = with_changes(**changes)
    conclude(report)
    assert len(report.problems) == 1


@pytest.mark.parametrize(
    ("images", "show_content", "ciphertext"),
    [
        ([b"\x01\x02", b"\x03\x04"], False, True),
        ([b"\x01\x02", b"\x01\x02"], False, False),
        ([b"\x00\x00", b"\x03\x04"], False, False),
        ([b"\x01\x02", b"\x03\x04"], True, False),
    ],
)
def test_equal_pages_have_images_that_tell_nothing(images: list[bytes], show_content: bool, ciphertext: bool) -> None:
    report = with_changes(host_read_of_secure_page="")
    assert are_ciphertext(images, report, show_content=show_content) is ciphertext
    assert report.host_read_of_secure_page == ("ciphertext" if ciphertext else "plain")
    assert bool(report.problems) is not ciphertext


def test_the_demos_keep_their_files_apart() -> None:
    """They share a state directory, and what one writes on a disk is nothing for the other."""
    model, linux = (tomllib.loads(guest.cluster_file.read_text())["vms"] for guest in (ModelGuest, LinuxGuest))
    of_model, of_linux = (
        {disk["path"] for vm in vms.values() for disk in vm["disks"].values()} for vms in (model, linux)
    )

    assert of_model and of_linux and not of_model & of_linux
