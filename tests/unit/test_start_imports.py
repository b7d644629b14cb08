"""What a process loads before it is ready: a cluster starts one for each role, and everybody waits for them."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from services.runtime.absent_module import absent_module

FOR_TERMINALS = {"rich", "click"}
UNUSED = {
    "services.guest.service": {*FOR_TERMINALS, "elftools", "unicorn"},
    "services.qemu.service": FOR_TERMINALS,
    "services.kvm.service": {*FOR_TERMINALS, "elftools"},
    "services.ultravisor.service": FOR_TERMINALS,
    "deploy.launcher_main": {*FOR_TERMINALS, "elftools"},
}


@pytest.mark.parametrize("module", UNUSED)
def test_a_process_does_not_load_what_it_does_not_use(module: str) -> None:
    program = f"import {module}, sys; print(*{UNUSED[module]} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout.split() == []


def test_a_module_is_absent_meanwhile_and_there_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "this", raising=False)
    with absent_module("this"), pytest.raises(ModuleNotFoundError):
        importlib.import_module("this")

    assert "this" not in sys.modules


def test_a_module_that_is_loaded_stays() -> None:
    with absent_module("json"):
        import json

    assert sys.modules["json"] is json
