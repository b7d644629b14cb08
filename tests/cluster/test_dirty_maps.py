"""Dirty maps between real processes: who reads whose, that a page is dirty once, and maps of hostile givers."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from protocol import control
from protocol.errors import UserError
from protocol.geometry import PAGE_BYTES
from services.testing.host import RealHost, real_host
from services.testing.process import QueryFailed
from services.ultravisor.identity import ensure_keys
from tests.cluster.svm_rig import N_PAGES, Rig, svm_rig

MEMORY_BYTES = 4 << 20
SEALED = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


async def dirty(process: Any, gfn: int = 0, n_pages: int = N_PAGES) -> set[int]:  # noqa: ANN401
    """What `page.dirty` of kvm or ultravisor says."""
    answer = await process.query("page.dirty", {"vm": "vm1", "gpa": gfn * PAGE_BYTES, "n": n_pages})
    return set(answer["gfns"])


async def test_kvm_collects_what_a_normal_vm_wrote(tmp_path: Path) -> None:
    async with svm_rig(tmp_path, secure=False, command_line="") as rig:
        gfn = await rig.free_gfn()
        assert gfn in await dirty(rig.kvm)
        assert gfn not in await dirty(rig.kvm)

        await rig.ask(f"fill {gfn} 0x5a")
        assert gfn not in await dirty(rig.kvm, 0, gfn)
        assert gfn in await dirty(rig.kvm, gfn, 1)
        assert gfn not in await dirty(rig.kvm)
        with pytest.raises(UserError, match="not secure"):
            await dirty(rig.ultravisor)


async def test_the_ultravisor_collects_what_a_secure_vm_wrote_and_kvm_learns_nothing_of_it(tmp_path: Path) -> None:
    async with svm_rig(tmp_path) as rig:
        gfn = await rig.free_gfn()
        assert gfn in await dirty(rig.ultravisor)
        by_the_host = await dirty(rig.kvm)
        assert by_the_host, "qemu loaded kernel and device tree"
        assert gfn not in by_the_host

        await rig.ask(f"fill {gfn} 0x5a")

        assert gfn not in await dirty(rig.kvm)
        assert gfn in await dirty(rig.ultravisor)
        assert gfn not in await dirty(rig.ultravisor)
        await move_out_and_in(rig, gfn)
        assert gfn not in await dirty(rig.ultravisor)


async def move_out_and_in(rig: Rig, gfn: int) -> None:
    """Paging changes no content: the page is as clean as before."""
    assert await rig.move("out", gfn) == {"H_SUCCESS": 1}
    assert await rig.move("in", gfn) == {"H_SUCCESS": 1}


async def test_an_unshared_page_is_dirty_since_it_was_zeroed(tmp_path: Path) -> None:
    async with svm_rig(tmp_path) as rig:
        gfn = await rig.free_gfn()
        assert await rig.ask(f"share {gfn}") == "ok"
        await dirty(rig.ultravisor)

        assert await rig.ask(f"unshare {gfn}") == "ok"

        assert gfn in await dirty(rig.ultravisor)


# -- hostile givers ---------------------------------------------------------------------------------------------------


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[RealHost]:
    with tempfile.TemporaryDirectory(prefix="pb-") as directory:
        async with real_host(Path(directory), ensure_keys(tmp_path, "alpha")) as running:
            await running.add_vm("vm1", memory_bytes=MEMORY_BYTES)
            yield running


async def give(host: RealHost, to: str, tag: str, n_bytes: int, seals: int) -> None:
    """What the launcher passes on of a guest or qemu that made this file."""
    process = host.kvm if to == "kvm" else host.ultravisor
    fd = os.memfd_create("hostile", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, n_bytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    await process.send(control.Gift(tag, "vm1", "vm1/guest"), [fd])
    os.close(fd)
    await process.barrier()


@pytest.mark.parametrize(
    ("to", "tag"),
    [("kvm", "guest-dirty-map"), ("kvm", "device-dirty-map"), ("ultravisor", "secure-dirty-map")],
)
async def test_s5_a_map_of_a_wrong_size_or_without_seals_is_refused_and_a_good_one_is_taken(
    host: RealHost, to: str, tag: str
) -> None:
    n_pages = MEMORY_BYTES // PAGE_BYTES
    process = host.kvm if to == "kvm" else host.ultravisor
    for n_bytes, seals in ((n_pages - 1, SEALED), (n_pages * 2, SEALED), (n_pages, fcntl.F_SEAL_GROW)):
        await give(host, to, tag, n_bytes, seals)
    assert host.log_text(process).count('"gift refused"') == 3

    await give(host, to, tag, n_pages, SEALED)
    assert '"unexpected descriptor"' not in host.log_text(process)
    await give(host, to, tag, n_pages, SEALED)
    assert host.log_text(process).count('"unexpected descriptor"') == 1
    assert process.alive


async def test_without_the_maps_there_is_no_answer(host: RealHost) -> None:
    with pytest.raises(QueryFailed, match="guest-dirty-map"):
        await host.kvm.query("page.dirty", vm="vm1", gpa=0, n=1)
