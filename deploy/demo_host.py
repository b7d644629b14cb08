"""What a host of the demo does to a secure VM: it reads pages, and pages them out."""

from __future__ import annotations

import random
from pathlib import Path

from deploy.api import RunningCluster
from deploy.cluster_file import VmSpec
from deploy.demo_evidence import SEGMENT_DIR, frame_is_hole, read_frame
from deploy.demo_report import VmReport
from deploy.manifest import read_manifest
from protocol.errors import UserError
from protocol.geometry import PAGE_BYTES, PAGE_SHIFT, gpa_of
from protocol.roles import Role

_ANSWER_SECONDS = 5.0
_RUN_PAGES = 4


async def read_as_host(running: RunningCluster, spec: VmSpec, gfns: list[int], report: VmReport) -> list[bytes]:
    """What qemu reads of secure pages. That their frames are holes before, and hold just that after, is checked."""
    segment = _segment_of(running, spec.name)
    if not all(frame_is_hole(segment, gpa_of(gfn), PAGE_BYTES) for gfn in gfns):
        report.problems.append("the raw frame of a secure page is no hole")
    images = []
    for gfn in gfns:
        answer = await running.vm(spec.name).qemu.query("page.bytes", {"gpa": gpa_of(gfn)}, _ANSWER_SECONDS)
        images.append(answer["bytes"])
        if read_frame(segment, gpa_of(gfn), PAGE_BYTES) != answer["bytes"]:
            report.problems.append(f"gfn {gfn:#x}: qemu did not read what is in the frame")
    return images


def are_ciphertext(images: list[bytes], report: VmReport, *, show_content: bool) -> bool:
    """Whether images of pages with equal content are ciphertext: not that content, not equal, not zeros."""
    if show_content or len(set(images)) != len(images) or not all(any(image) for image in images):
        report.problems.append("a host's read of a secure page shows its content")
        report.host_read_of_secure_page = "plain"
        return False
    report.host_read_of_secure_page = "ciphertext"
    return True


async def press(running: RunningCluster, spec: VmSpec, share: float) -> int:
    """Have kvm page out this share of all pages, chosen at random; how many went."""
    kvm, gone = running.process(f"{spec.host}/{Role.KVM.value}"), 0
    n_runs = (spec.memory_bytes >> PAGE_SHIFT) // _RUN_PAGES
    for run in random.Random(spec.name).sample(range(n_runs), int(share * n_runs)):
        arguments = {"vm": spec.name, "gpa": gpa_of(run * _RUN_PAGES), "n": _RUN_PAGES}
        gone += (await kvm.query("page.out", arguments, _ANSWER_SECONDS))["codes"].get("H_SUCCESS", 0)
    return gone


async def secure_state(running: RunningCluster, spec: VmSpec, gfn: int) -> str:
    """The ultravisor's state of a page."""
    ultravisor = running.process(f"{spec.host}/{Role.ULTRAVISOR.value}")
    page = await ultravisor.query("page.secure", {"vm": spec.name, "gpa": gpa_of(gfn)}, _ANSWER_SECONDS)
    return str(page["state"])


def _segment_of(running: RunningCluster, vm: str) -> Path:
    manifest = read_manifest(running.paths.manifest)
    names = [] if manifest is None else manifest.segments
    prefix = f"pefbox-{running.name}-{vm}-"
    for name in names:
        if name.startswith(prefix):
            return SEGMENT_DIR / name
    raise UserError(f"{vm}: no RAM segment in the manifest")
