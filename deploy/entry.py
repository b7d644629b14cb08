"""The `pefbox` program: Ctrl-C ends it without a traceback, also while it still loads."""

from __future__ import annotations

import signal


def main() -> None:
    """As deploy.cli.main, which takes the longest part of a short command to load."""
    heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heard:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from deploy import cli

    if heard:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main()
