"""Following something long for people: a display that goes on until it is over, and Ctrl-C that cancels it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import click

from protocol.errors import UserError

_POLL_SECONDS = 0.1
Facts = dict[str, Any]


_OVER = frozenset({"done", "failed", "cancelled", "in-doubt"})


def is_over(facts: Facts) -> bool:
    """Whether a migration, a snapshot or a restore is: nothing follows by itself."""
    return facts["phase"] in _OVER


@dataclass(frozen=True, slots=True)
class Followed:
    """What is followed: how far it is, whether that is over, how it is shown, and how it is cancelled."""

    ask: Callable[[], Facts]
    over: Callable[[Facts], bool]
    lines: Callable[[Facts], list[str]]
    cancel: Callable[[], None]


def follow(what: Followed, facts: Facts, *, quiet: bool) -> Facts:
    """Show how far it is until it is over; the first Ctrl-C cancels it, a second one only stops watching."""
    cancelled = False
    with _screen(what.lines, quiet) as show:
        while not what.over(facts):
            try:
                show(facts)
                time.sleep(_POLL_SECONDS)
                facts = what.ask()
            except KeyboardInterrupt:
                if cancelled:
                    raise
                cancelled = True
                try:
                    what.cancel()
                except UserError as error:
                    click.echo(f"pefbox: {error}", err=True)
    return facts


@contextlib.contextmanager
def _screen(lines: Callable[[Facts], list[str]], quiet: bool) -> Iterator[Callable[[Facts], None]]:
    """Where progress is shown: nowhere, when nobody looks."""
    from deploy.tables import console

    output = console(stderr=True)
    if quiet or not output.is_terminal:
        yield lambda facts: None
        return
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    with Live(console=output, transient=True, auto_refresh=False) as live:

        def show(facts: Facts) -> None:
            live.update(Group(*(Text(line) for line in lines(facts))), refresh=True)

        yield show
