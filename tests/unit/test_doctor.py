"""`pefbox doctor`: what it looks at, and what it says of an absence."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deploy import doctor


def test_every_absence_says_what_it_costs() -> None:
    findings = doctor.examine()

    assert len({finding.name for finding in findings}) == len(findings)
    for finding in findings:
        assert finding.detail
        assert finding.ok or finding.cost
        assert ("cost" in finding.as_json()) is not finding.ok


def test_other_machine_is_refused_as_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")

    finding = next(finding for finding in doctor.examine() if finding.name == "x86-64")

    assert (finding.ok, finding.required, finding.detail) == (False, True, "aarch64")


def test_program_that_is_not_on_the_path_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name, path=None: None)

    assert not next(finding for finding in doctor.examine() if finding.name == "gdb-multiarch").ok


def test_looking_leaves_no_descriptor_open() -> None:
    before = os.listdir("/proc/self/fd")

    doctor.examine()

    # What other tests left may be collected meanwhile.
    assert len(os.listdir("/proc/self/fd")) <= len(before)


def test_what_a_killed_cluster_left_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "pefbox" / "old").mkdir(parents=True)

    finding = next(finding for finding in doctor.examine() if finding.name == "left over")

    assert (finding.ok, finding.required, finding.detail) == (False, False, "killed: old")
