"""The prompt in a thread: whatever is typed, and whenever, the thread lives and is let go at the end."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from services.runtime.debugging.dap import ThreadCommands
from services.runtime.debugging.threads import MainThread
from tests.unit.debugged_thread import DebuggedThread, Operator


def long_enough_to_be_interrupted() -> None:
    """In the debugged thread: an interrupt that is under way arrives here."""
    until = time.monotonic() + 0.2
    while time.monotonic() < until:
        time.sleep(0.01)


@pytest.mark.parametrize("begun", [False, True], ids=["waits", "runs"])
def test_what_a_line_does_is_broken_off_and_nothing_else(begun: bool) -> None:
    """Also one that has not begun yet."""
    with DebuggedThread() as thread:
        operator = thread.debugged()
        operator.prompt()
        operator.type("answer = 6 * 7")
        operator.prompt()
        operator.type("while True: pass")
        while begun and not operator.session.evaluation.under_way:
            time.sleep(0.001)
        operator.interrupt()
        assert "KeyboardInterrupt" in operator.prompt()
        operator.type("p answer")
        assert "42" in operator.prompt()
        operator.type("detach")
        operator.vanish()
        thread.check_works()


def test_what_is_no_unicode_is_shown_escaped() -> None:
    with DebuggedThread() as thread:
        operator = thread.debugged()
        operator.prompt()
        operator.type(r"raise Exception('\ud800')")
        assert r"\ud800" in operator.prompt()
        operator.vanish()
        thread.check_works()


def test_what_goes_wrong_in_the_debugger_is_not_the_services(monkeypatch: pytest.MonkeyPatch) -> None:
    with DebuggedThread() as thread:
        operator = thread.debugged()
        operator.prompt()

        def fails(*_: object) -> None:
            raise ArithmeticError("in it")

        monkeypatch.setattr("services.runtime.debugging.prompt._place", fails)
        operator.type("next")
        thread_goes_on(thread)
        operator.vanish()
        thread.check_works()
        assert "of the debugger: ArithmeticError: in it" in operator.shown


def test_ctrl_c_before_the_prompt_of_a_held_thread_leaves_it_held() -> None:
    interrupts: list[Operator] = []

    def on_held(held: bool) -> None:
        if held and interrupts:
            interrupts.pop().interrupt()
            long_enough_to_be_interrupted()

    with DebuggedThread(on_held) as thread:
        operator = thread.debugged()
        operator.prompt()
        interrupts.append(operator)
        operator.type("next")
        operator.prompt()
        operator.vanish()
        thread.check_works()


def test_ctrl_c_that_comes_too_late_for_a_line_does_not_keep_the_thread_held() -> None:
    with DebuggedThread() as thread:
        operator = thread.debugged()
        session = operator.session
        go_on = session.go_on

        def interrupted_go_on() -> None:
            operator.interrupt()
            long_enough_to_be_interrupted()
            go_on()

        operator.prompt()
        session.go_on = interrupted_go_on  # type: ignore[method-assign]
        operator.type("continue")
        thread_goes_on(thread)
        session.go_on = go_on  # type: ignore[method-assign]
        operator.interrupt()
        operator.prompt()
        operator.vanish()
        thread.check_works()


def thread_goes_on(thread: DebuggedThread) -> None:
    """Returns when it was told that it is not held any more."""
    until = time.monotonic() + 5
    while thread.holds[-1] and thread.died is None and time.monotonic() < until:
        time.sleep(0.01)


def test_the_commands_of_a_breakpoint_run_in_a_held_thread_and_are_broken_off() -> None:
    with DebuggedThread() as thread:
        operator = thread.debugged()
        operator.prompt()
        for line in ("break meet", "commands", "p 6 * 7"):
            operator.type(line)
            operator.prompt()
        operator.type("end")
        operator.prompt()
        operator.type("continue")
        assert "42" in operator.prompt()
        assert thread.holds == [True, False, True]
        for line in ("commands 1", "while True: pass"):
            operator.type(line)
            operator.prompt()
        operator.type("end")
        operator.prompt()
        operator.type("continue")
        operator.vanish()
        thread.check_works()


def test_an_operator_who_vanishes_while_he_lists_commands_leaves_nothing_held() -> None:
    with DebuggedThread() as thread:
        operator = thread.debugged()
        operator.prompt()
        for line in ("break meet", "commands", "p 1"):
            operator.type(line)
            operator.prompt()
        assert operator.vanish() < 10
        thread.check_works()


def test_an_operator_who_vanishes_ends_what_swallows_interrupts() -> None:
    with DebuggedThread() as thread:
        operator = thread.debugged()
        operator.prompt()
        operator.type("n = 0")
        operator.prompt()
        operator.type("exec('while n < 3:\\n try:\\n  while 1: pass\\n except KeyboardInterrupt:\\n  n += 1')")
        operator.vanish()
        thread.check_works()


@pytest.mark.parametrize("seed", range(4))
def test_whenever_ctrl_c_comes_and_the_operator_goes_the_thread_goes_on(seed: int) -> None:
    choice = random.Random(seed)
    with DebuggedThread() as thread:
        for _ in range(12):
            operator = thread.debugged()
            operator.prompt()
            operator.type("break meet")
            for _ in range(choice.randrange(4)):
                if choice.random() < 0.5:
                    operator.interrupt()
                else:
                    operator.type(choice.choice(("continue", "next", "step", "p 1", "sum(range(9999))")))
                if choice.random() < 0.3:
                    time.sleep(choice.random() * 0.004)
            operator.vanish()
            thread.check_works()


@pytest.fixture
def main_thread() -> Iterator[MainThread]:
    """This one, whose signal is the debugger's meanwhile."""
    before = signal.getsignal(signal.SIGUSR1)
    yield MainThread()
    signal.signal(signal.SIGUSR1, before)


def test_whatever_is_asked_of_the_main_thread_before_it_listens_is_done(main_thread: MainThread) -> None:
    done: list[str] = []
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        for name in ("forget", "hold"):
            asker = threading.Thread(target=main_thread.interrupt, args=(lambda _frame, name=name: done.append(name),))
            asker.start()
            asker.join()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    assert done == ["forget", "hold"]


def test_what_an_editor_has_a_thread_do_is_ended_and_nothing_else() -> None:
    commands, over = ThreadCommands(), threading.Event()
    outcomes = {"ended": 0, "died": 0}

    def compute() -> None:
        while True:
            sum(range(9))

    def serve() -> None:
        try:
            while not over.is_set():
                try:
                    commands.run(compute)
                except KeyboardInterrupt:
                    outcomes["ended"] += 1
                sum(range(9))
        except KeyboardInterrupt:
            outcomes["died"] += 1

    thread = threading.Thread(target=serve)
    thread.start()
    choice = random.Random(1)
    for _ in range(60):
        commands.allow()
        time.sleep(choice.random() * 0.004)
        commands.end(lambda action: None)
    over.set()
    thread.join(5)
    assert not thread.is_alive()
    assert outcomes["ended"] > 20
    assert outcomes["died"] == 0
