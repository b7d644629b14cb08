"""Breaks on messages in a running cluster: what each action does to a secure VM's page-outs, and how all goes on."""

from __future__ import annotations

import functools
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from deploy.api import cluster
from deploy.qmp_client import execute
from protocol.geometry import PAGE_BYTES
from tests.cluster.debugging import PEFBOX, refusal_of
from tests.cluster.svm_rig import Rig, svm_rig
from tests.cluster.test_debugger import states, wait_for
from tests.cluster.test_debugger_prompt import MINIMAL
from tests.cluster.vm_files import console_until

ULTRAVISOR = "alpha/ultravisor"
HOLD_SECONDS = 6.5
N_PAGES = 3


def pefbox(rig: Rig, *words: str) -> str:
    """What a command prints; it must succeed."""
    done = subprocess.run([*PEFBOX, *words, "--cluster", rig.cluster.name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


async def command(rig: Rig, *words: str) -> Any:  # noqa: ANN401
    """The same with --json, in a thread."""
    return json.loads(await trio.to_thread.run_sync(functools.partial(pefbox, rig, *words, "--json")))


async def set_break(rig: Rig, text: str, action: str = "stop", code: str | None = None, nth: int = 0) -> None:
    """As the command, without one."""
    await rig.cluster.order("break", {"text": text, "action": action, "code": code, "nth": nth})


async def until(rig: Rig, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The list of breaks, as soon as it `holds`."""
    with trio.fail_after(10):
        while True:
            listed: dict[str, Any] = await rig.cluster.order("breaks")
            if holds(listed):
                return listed
            await trio.sleep(0.05)


async def clear(rig: Rig) -> None:
    """No break is left, and the VM runs."""
    await rig.cluster.order("break-delete", {"id": "all"})
    assert await rig.cluster.order("breaks") == {"breaks": [], "kept": []}
    await rig.vm.wait_state("running", seconds=5)
    assert (await rig.ask("pages")).startswith("ok ")


@pytest.mark.slow
async def test_breaks_on_the_messages_of_a_secure_vm(tmp_path: Path) -> None:
    async with svm_rig(tmp_path, debug=True) as rig:
        gfns = [await rig.free_gfn() - n for n in range(N_PAGES)]
        first = min(gfns)
        for gfn in range(first, first + N_PAGES):
            await rig.ask(f"fill {gfn} {gfn & 0xFF}")
        sums = [await rig.ask(f"sum {gfn}") for gfn in range(first, first + N_PAGES)]
        await check_a_page_out_is_stopped(rig, first)
        await check_a_call_fails_with_a_code(rig, first)
        await check_a_message_is_dropped(rig, first)
        await check_results_are_counted_and_logged(rig, first)
        await check_hypercalls_through_the_ultravisor_fail(rig)
        await check_every_message_is_stepped(rig)
        await check_a_vm_that_its_user_paused_stays_so(rig, first)
        await check_a_guests_own_message_is_kept(rig, first)
        assert [await rig.ask(f"sum {gfn}") for gfn in range(first, first + N_PAGES)] == sums
        await check_a_new_process_has_the_breaks(rig)
        assert {"break-set", "break-hit"} <= {line.event for line in rig.all_audit()}


async def check_a_page_out_is_stopped(rig: Rig, first: int) -> None:
    """Longer than any bound: nobody gives up, the other pages go out, and `step` shows and passes the message."""
    gpa = (first + 1) * PAGE_BYTES
    made = await command(rig, "break", f"ucall UV_PAGE_OUT if gpa == {gpa:#x}")
    assert made["counts"] == {ULTRAVISOR: 0}
    codes: dict[str, int] = {}

    async def page_out() -> None:
        arguments = {"vm": "vm1", "gpa": first * PAGE_BYTES, "n": N_PAGES}
        codes.update((await rig.kvm.query("page.out", arguments, 60.0))["codes"])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(page_out)
        listed = await until(rig, lambda listed: bool(listed["kept"]))
        (kept,) = listed["kept"]
        assert f"gpa={gpa:#x}" in kept["text"]
        assert (kept["process"], kept["vm"]) == (ULTRAVISOR, "vm1")
        await rig.vm.wait_state("paused", seconds=5)
        await wait_for(rig.cluster, "alpha/kvm", "waiting", f"waiting for {ULTRAVISOR}")
        await trio.sleep(HOLD_SECONDS)
        assert codes == {}
        now = await states(rig.cluster)
        assert now[ULTRAVISOR] == ("running", "keeps a message that a break has stopped")
        assert "failed" not in {state for state, _ in now.values()}
        assert (await command(rig, "step"))["number"] == kept["number"]
    assert codes == {"H_SUCCESS": N_PAGES}
    assert (await rig.vm.row()).state == "paused"
    assert await command(rig, "continue") == {"passed": 0}
    await clear(rig)


async def check_a_call_fails_with_a_code(rig: Rig, first: int) -> None:
    await rig.move("in", first, N_PAGES)
    await set_break(rig, "ucall UV_PAGE_OUT if vm == 'vm1'", "fail", "U_RETRY", nth=1)
    assert await rig.move("out", first, N_PAGES) == {"H_BUSY": 1, "H_SUCCESS": N_PAGES - 1}
    listed = await rig.cluster.order("breaks")
    assert listed["breaks"][0]["counts"] == {ULTRAVISOR: N_PAGES}
    await clear(rig)


async def check_a_message_is_dropped(rig: Rig, first: int) -> None:
    """The guest never hears of an invalidation: the page stays, and the next one goes out."""
    await rig.move("in", first, N_PAGES)
    await set_break(rig, "message MAP_INVALIDATE if sender == 'alpha/ultravisor'", "drop", nth=1)
    assert await rig.move("out", first) == {"H_BUSY": 1}
    assert await rig.move("out", first) == {"H_SUCCESS": 1}
    await clear(rig)


async def check_results_are_counted_and_logged(rig: Rig, first: int) -> None:
    await rig.move("in", first, N_PAGES)
    await command(rig, "break", "ucall UV_PAGE_OUT if result == U_SUCCESS", "--do", "count")
    await set_break(rig, "ucall UV_PAGE_OUT if order == 16 and not (flags != 0)", "log")
    await rig.move("out", first, N_PAGES)
    listed = await rig.cluster.order("breaks")
    assert [row["counts"] for row in listed["breaks"]] == [{"alpha/kvm": N_PAGES}, {ULTRAVISOR: N_PAGES}]
    assert f"gpa={first * PAGE_BYTES:#x}" in rig.ultravisor.log()
    text = await trio.to_thread.run_sync(functools.partial(pefbox, rig, "break"))
    assert f"ucall UV_PAGE_OUT if result == U_SUCCESS  count  alpha/kvm {N_PAGES}\n" in text
    await clear(rig)


async def check_hypercalls_through_the_ultravisor_fail(rig: Rig) -> None:
    """A reflected hypercall is answered by UV_RETURN, also when a break answers it."""
    await set_break(rig, "hcall H_CPPR if receiver == 'alpha/kvm'", "fail", "H_PARAMETER")
    assert (await rig.ask("null 3")).startswith("ok")
    listed = await rig.cluster.order("breaks")
    assert listed["breaks"][0]["counts"]["alpha/kvm"] >= 3
    await clear(rig)


async def check_every_message_is_stepped(rig: Rig) -> None:
    """With `any`, each `step` is a message of the VM on its way; deleting the break lets all go."""
    since = await rig.console_end()
    await set_break(rig, "any if vm == 'vm1' and sender == 'vm1/guest'", "stop-cluster")
    await rig.vm.console_write(b"pages\r")
    await until(rig, lambda listed: bool(listed["kept"]))
    assert " from vm1/guest on " in (await command(rig, "step", "vm1"))["text"]
    await rig.cluster.order("break-delete", {"id": "all"})
    await console_until(rig.vm, "\r\n> ", since=since)
    await clear(rig)


async def check_a_vm_that_its_user_paused_stays_so(rig: Rig, first: int) -> None:
    await rig.move("in", first, N_PAGES)
    await trio.to_thread.run_sync(execute, await rig.monitor(), "stop")
    await set_break(rig, "ucall UV_PAGE_OUT", nth=1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.move, "out", first)
        await until(rig, lambda listed: bool(listed["kept"]))
        assert (await rig.cluster.order("continue", {"vm": None}))["passed"] == 1
    await rig.cluster.order("break-delete", {"id": "all"})
    assert (await rig.vm.row()).state == "paused"
    await trio.to_thread.run_sync(execute, await rig.monitor(), "cont")
    await clear(rig)


async def check_a_guests_own_message_is_kept(rig: Rig, first: int) -> None:
    """In the processor's thread: the order waits, the processor does not."""
    await rig.move("in", first, N_PAGES)
    await set_break(rig, "message MAP_INVALIDATE if receiver == 'vm1/guest'", nth=1)
    assert await rig.move("out", first) == {"H_BUSY": 1}
    listed = await until(rig, lambda listed: bool(listed["kept"]))
    assert listed["kept"][0]["process"] == "vm1/guest"
    await rig.vm.wait_state("paused", seconds=5)
    assert await command(rig, "continue", "vm1") == {"passed": 1}
    await rig.vm.wait_state("running", seconds=5)
    await clear(rig)


async def check_a_new_process_has_the_breaks(rig: Rig) -> None:
    await set_break(rig, "message VCPU_START", "count")
    await rig.vm.restart()
    await rig.booted()
    listed = await rig.cluster.order("breaks")
    assert listed["breaks"][0]["counts"] == {"vm1/guest": 1}
    assert (await command(rig, "break", "--delete", "all"))["breaks"] == []


async def test_what_cannot_be_asked_gets_one_line_and_changes_nothing(tmp_path: Path) -> None:
    async with cluster(MINIMAL, state_dir=tmp_path / "s", debug=True) as running:
        refused: list[tuple[str, dict[str, object], str]] = [
            ("break", {"text": "ucall UV_PAGE_OUT if gp == 1"}, 'no argument gp; did you mean "gpa"?'),
            ("break", {"text": "message VCPU_START"}, "only vm1/guest receives it"),
            ("break-delete", {"id": "7"}, "no break 7; there are: none"),
            ("break-delete", {"id": "x"}, '"x" is no number of a break'),
            ("step", {"vm": None}, "no message is stopped"),
            ("step", {"vm": "vm9"}, 'no VM "vm9"'),
        ]
        for order, arguments, words in refused:
            assert words in refusal_of(running, order, arguments)
        assert await running.order("breaks") == {"breaks": [], "kept": []}
    async with cluster(MINIMAL, state_dir=tmp_path / "t", debuggable=("alpha/kvm",)) as running:
        expected = "breaks on messages are for a cluster started with `pefbox up --debug`"
        assert refusal_of(running, "break", {"text": "any"}) == expected
