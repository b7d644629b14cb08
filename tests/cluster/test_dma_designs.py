"""Every DMA design on real processes: it works as it should, and its cell changes when its mechanism is taken away."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from deploy.api import Vm, cluster
from deploy.compare.measure import Outcome, run_trial, time_requests, wait_ready
from deploy.compare.plan import Purpose, Trial, Workload
from deploy.compare.report import Report
from deploy.compare.results import Works
from deploy.compare.vm_files import write_trial
from shared.dma_designs import DmaDesign as D
from tests.cluster.vm_files import PROMPT, answer_of, console_until

FEATURES_OK = "the device refuses the features (FEATURES_OK)"
NO_ANSWER = "queue 0: no answer within 2 s"
READ = (Workload.READ,)


def calls_a_request(outcome: Outcome) -> float:
    (only,) = outcome.rounds["read"]
    return sum(only.calls.values()) / only.requests


async def run(design: D, *, secure: bool, driver: D | None = None, **options: int | bool) -> Outcome:
    """One VM with the machine of `design`, the drivers of `driver`."""
    return await run_trial(Trial(design, Purpose.COUNT, secure, driver or design, READ), options)


@dataclass(frozen=True)
class Broken:
    """A design whose mechanism is taken away: `machine` is another design's, or the kernel has `options`."""

    design: D
    failure: str
    machine: D | None = None
    driver: D | None = None
    options: dict[str, int | bool] = field(default_factory=dict)
    ddw: bool = True


BROKEN = [
    Broken(D.QUIRK, NO_ANSWER, driver=D.NOTHING),
    Broken(D.IOMMU_ALWAYS, "does not offer ACCESS_PLATFORM", machine=D.NOTHING),
    Broken(D.NO_TRANSLATION, NO_ANSWER, machine=D.NOTHING),
    Broken(D.DMA_POOL, "page-integrity", driver=D.DMA_LIMIT),
    Broken(D.DDW_IDENTITY, NO_ANSWER, options={"dma_mask": 32}),
    Broken(D.DDW_IDENTITY, NO_ANSWER, ddw=False),
    Broken(D.RUNTIME_SWITCH, NO_ANSWER, machine=D.NOTHING),
    Broken(D.GUEST_POKE, "no switch that puts it behind the IOMMU", machine=D.NOTHING),
    Broken(D.OPTIONAL_PLATFORM, NO_ANSWER, machine=D.NOTHING),
    Broken(D.RESTRICTED_MEMORY, "access to memory is restricted", machine=D.NOTHING),
]


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: f"{case.design}-{case.failure.split()[0]}-{case.ddw}")
async def test_a_secure_vm_fails_when_the_mechanism_of_its_design_is_taken_away(case: Broken) -> None:
    trial = Trial(case.machine or case.design, Purpose.COUNT, True, case.driver or case.design, ddw=case.ddw)

    outcome = await run_trial(trial, case.options)

    assert outcome.secure
    assert not outcome.works
    assert case.failure in outcome.failure
    if case.driver is D.NOTHING:
        assert outcome.device_faults


async def test_a_device_model_without_the_bypass_costs_what_the_iommu_costs() -> None:
    with_bypass = await run(D.BYPASS_PROPERTY, secure=True)
    without = await run(D.IOMMU_ALWAYS, driver=D.BYPASS_PROPERTY, secure=True)

    assert with_bypass.works
    assert without.works
    assert calls_a_request(without) > 50 * calls_a_request(with_bypass)


async def test_firmware_says_of_every_device_that_demands_the_bit_that_it_can_be_taken_out_of_the_iommu() -> None:
    """Of the network card, too, which firmware does not drive."""
    trial = Trial(D.BYPASS_PROPERTY, Purpose.TIME, True, D.BYPASS_PROPERTY, (Workload.NET,))

    outcome = await run_trial(trial, {})

    assert outcome.works, outcome.failure
    assert all(sum(one.calls.values()) < one.requests for one in outcome.rounds["net"])


async def test_without_dynamic_windows_no_identity_is_promised_and_every_mapping_is_a_call() -> None:
    with_windows = await run(D.IDENTITY_ADDRESS, secure=True)
    trial = Trial(D.IDENTITY_ADDRESS, Purpose.COUNT, True, D.IDENTITY_ADDRESS, READ, ddw=False)
    without = await run_trial(trial, {})

    assert with_windows.works
    assert without.works
    assert calls_a_request(with_windows) < 1 < calls_a_request(without)


@pytest.mark.parametrize("dma_offset", [1 << 30, 16 << 20])
async def test_the_hook_of_the_architecture_gives_a_wrong_address_on_a_bus_with_an_offset(dma_offset: int) -> None:
    """Beyond RAM the device faults; inside it, it reads and writes what it was never given."""
    outcome = await run(D.ARCH_HOOK, secure=True, dma_offset=dma_offset)

    assert not outcome.works
    assert outcome.failure == NO_ANSWER or "page-integrity" in outcome.failure
    if dma_offset > 64 << 20:
        assert [fault for fault in outcome.device_faults if f"gpa {dma_offset >> 28:#x}" in fault]


async def test_an_old_device_model_ignores_the_poke_and_takes_bus_addresses_for_guest_addresses() -> None:
    outcome = await run(D.NOTHING, driver=D.GUEST_POKE, secure=True, poke_unchecked=True)

    assert outcome.secure
    assert not outcome.works


@pytest.mark.parametrize("purpose", [Purpose.OLD_GUEST, Purpose.OLD_FIRMWARE])
@pytest.mark.parametrize("design", [D.IOMMU_ALWAYS, D.OPTIONAL_PLATFORM, D.NO_TRANSLATION])
async def test_only_a_device_that_demands_the_bit_shuts_out_who_does_not_know_it(design: D, purpose: Purpose) -> None:
    driver = D.NOTHING if purpose is Purpose.OLD_GUEST else design

    outcome = await run_trial(Trial(design, purpose, False, driver), {})

    assert outcome.works is (design is not D.IOMMU_ALWAYS)
    assert outcome.failure == ("" if outcome.works else FEATURES_OK)


LIVES = [D.QUIRK, D.IOMMU_ALWAYS, D.BYPASS_PROPERTY, D.IDENTITY_ADDRESS, D.DDW_IDENTITY, D.RUNTIME_SWITCH, D.GUEST_POKE]


@pytest.mark.parametrize("design", LIVES)
async def test_a_secure_kernel_takes_over_the_devices_that_firmware_and_a_first_kernel_used(
    tmp_path: Path, design: D
) -> None:
    """Firmware and boot loader read the disk, a normal kernel does, then it starts the secure image in its place."""
    files = write_trial(Trial(design, Purpose.COUNT, False, design), tmp_path, {})
    async with cluster(files.cluster_file, state_dir=files.state_dir) as running:
        vm = running.vm("vm1")
        await wait_ready(vm)
        before = await time_requests(vm, "io randread 4096 8 32")
        assert "secure=0" in await console_text(vm)

        await vm.console_write(b"esm\r")
        await console_until(vm, "secure=1")
        await console_until(vm, PROMPT, since=(await console_text(vm)).index("secure=1"))

        after = await time_requests(vm, "io randread 4096 8 32")
        assert after.bounced_bytes == 32 * 4096
        assert before.bounced_bytes == 0
        assert answer_of(await vm.console_command("hash")) == f"ok {files.disk_sha256} {files.disk.stat().st_size}"
        assert (await vm.row()).secure


async def test_a_kernel_whose_esm_is_refused_goes_on_with_its_devices(tmp_path: Path) -> None:
    trial = Trial(D.IDENTITY_ADDRESS, Purpose.COUNT, False, D.IDENTITY_ADDRESS)
    files = write_trial(trial, tmp_path, {})
    text = files.cluster_file.read_text()
    files.cluster_file.write_text(text.replace("tell_secure", "secure = false\ntell_secure"))
    async with cluster(files.cluster_file, state_dir=files.state_dir) as running:
        vm = running.vm("vm1")
        await wait_ready(vm)

        assert answer_of(await vm.console_command("esm")) == "error U_PARAMETER"

        assert answer_of(await vm.console_command("hash")) == f"ok {files.disk_sha256} {files.disk.stat().st_size}"
        assert not (await vm.row()).secure


async def console_text(vm: Vm) -> str:
    return (await vm.console_read())[0].decode(errors="replace")


async def test_counts_are_the_same_in_every_run() -> None:
    first, second = [await run(D.IOMMU_ALWAYS, secure=True) for _ in range(2)]
    assert first.works
    assert first.rounds == second.rounds
    assert first.boot_calls == second.boot_calls


def test_the_command_writes_its_report_and_bears_the_claims_out(tmp_path: Path) -> None:
    designs = "quirk,iommu-always"
    command = [sys.executable, "-m", "deploy.cli", "compare", "--designs", designs, "--workload", "randread,boot"]

    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=300, check=False)

    assert done.returncode == 0, done.stderr
    report = msgspec.json.decode((tmp_path / "report.json").read_bytes(), type=Report)
    rows = {row.design: row for row in report.comparison.designs}
    assert set(rows) == set(designs.split(","))
    assert rows["quirk"].secure.verdict.works is Works.YES
    assert rows["quirk"].old_firmware.works is Works.YES
    assert rows["iommu-always"].old_firmware.reason == FEATURES_OK
    work = {design: row.normal.workloads["randread"].work for design, row in rows.items()}
    assert all(one is not None for one in work.values())
    assert rows["quirk"].normal.workloads["randread"].timing is not None
    assert not [claim for claim in report.claims if claim.verdict == "not borne out"]
    assert (tmp_path / "report.html").stat().st_size > 5000
    assert not [name for name in os.listdir("/dev/shm") if "compare" in name]
