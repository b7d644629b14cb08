"""Devices with the bus's DMA windows and with their own, in a cluster of real processes, driven by POWER code."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.api import cluster
from tests.guest.build import ENDIANS, build_program
from tests.needs import need_cross_compilers

pytestmark = pytest.mark.cross

_CLUSTER = """
[hosts.alpha]
secure_memory = "64K"

[vms.vm1]
host = "alpha"
memory = "64M"
time = "{time}"

[vms.vm1.guest]
kernel = "machine"
boot = "program"
image = "{image}"

[[vms.vm1.devices]]
kind = "edu"
name = "shared"

[[vms.vm1.devices]]
kind = "edu"
name = "own"
iommu_domain = "own"
"""


@pytest.mark.parametrize(("endian", "time"), [("be", "instructions"), ("le", "wall")])
async def test_each_device_reaches_memory_through_its_own_table_alone(tmp_path: Path, endian: str, time: str) -> None:
    need_cross_compilers()
    assert endian in ENDIANS
    file = tmp_path / "c.toml"
    file.write_text(_CLUSTER.format(image=build_program("domains", endian), time=time))

    async with cluster(file) as running:
        vm = running.vm("vm1")
        await vm.wait_state("off")
        output, _ = await vm.console_read()
        log = vm.qemu.log().splitlines()

    lines = output.decode().splitlines()
    assert [line for line in lines if not line.startswith("ok ")] == [], output.decode()
    assert len(lines) >= 16
    faults = [line for line in log if "device fault" in line]
    assert len(faults) == 2
    assert "vm1/shared" in faults[0] and "ioba 0x200000 of liobn 0x80000000" in faults[0]
    assert "vm1/own" in faults[1] and "ioba 0x100000 of liobn 0x80000004" in faults[1]
