"""The `pefbox` command."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import click

from deploy.cli_support import LazyGroup
from protocol.errors import PefboxError
from shared.process_end import leave

COMMANDS = {
    "up": "deploy.cli_cluster:up",
    "ps": "deploy.cli_cluster:ps",
    "status": "deploy.cli_cluster:status",
    "top": "deploy.cli_top:top",
    "capabilities": "deploy.cli_manage:capabilities",
    "dumpxml": "deploy.cli_manage:dumpxml",
    "logs": "deploy.cli_logs:logs",
    "calls": "deploy.cli_logs:calls",
    "trace": "deploy.cli_trace:trace",
    "page": "deploy.cli_vm:page",
    "console": "deploy.cli_vm:console",
    "qmp": "deploy.cli_vm:qmp",
    "gdb": "deploy.cli_gdb:gdb",
    "debug": "deploy.cli_debug:debug",
    "break": "deploy.cli_break:break_",
    "step": "deploy.cli_break:step",
    "continue": "deploy.cli_break:continue_",
    "balloon": "deploy.cli_balloon:balloon",
    "migrate": "deploy.cli_migrate:migrate",
    "can-migrate": "deploy.cli_migrate:can_migrate",
    "jobinfo": "deploy.cli_migrate:jobinfo",
    "recover": "deploy.cli_migrate:recover",
    "snapshot": "deploy.cli_snapshot:snapshot",
    "restore": "deploy.cli_snapshot:restore",
    "link": "deploy.cli_link:link",
    "restart": "deploy.cli_cluster:restart",
    "down": "deploy.cli_cluster:down",
    "key": "deploy.cli_state:key",
    "audit": "deploy.cli_state:audit",
    "esm": "deploy.esm_commands:esm",
    "run": "deploy.cli_run:run",
    "linux": "deploy.cli_linux:linux",
    "demo": "deploy.cli_demo:demo",
    "compare": "deploy.cli_compare:compare",
    "doctor": "deploy.cli_cluster:doctor",
    "clean": "deploy.cli_cluster:clean",
}

_HELP = "POWER secure virtual machines as a cluster of ordinary processes."
pefbox = LazyGroup(name="pefbox", help=_HELP, places=COMMANDS)


def main() -> NoReturn:
    """Run a command; a mistake is one line on standard error and exit status 1, a wrong command line 2."""
    leave(_status())


def _status() -> int:
    try:
        status: int | None = pefbox.main(prog_name="pefbox", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:
        # Whoever read our output has enough. The status is what click and rich give for it.
        _drop_output()
        return 1
    except PefboxError as error:
        click.echo(f"pefbox: {error}", err=True)
        return 1
    except OSError as error:
        _drop_output()
        click.echo(f"pefbox: {error.filename or 'cannot write the output'}: {error.strerror or error}", err=True)
        return 1
    return status or 0


def _drop_output() -> None:
    """Nothing more can be written, not even what still waits for it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    main()
