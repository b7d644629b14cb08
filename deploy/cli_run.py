"""`pefbox run`: a bare-metal program to its end, its terminal on standard output, its exit status."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from deploy.cli_support import NumberRange, json_option, parse_size

_TIMES = ("instructions", "wall")


@click.command("run")
@click.argument("program", type=click.Path(path_type=Path))
@click.option("--secure", is_flag=True, help="Have the VM turn secure before the program starts.")
@click.option("--append", "command_line", default="", metavar="ARGS", help="Command line: /chosen/bootargs.")
@click.option("--initrd", type=click.Path(path_type=Path), help="Initial RAM disk: /chosen/linux,initrd-start.")
@click.option("--memory", default="64M", show_default=True, help="RAM of the VM.")
@click.option("--time", "time", type=click.Choice(_TIMES), default=_TIMES[0], show_default=True, help="Its clock.")
@click.option("--timeout", type=NumberRange(min=0, min_open=True), metavar="SECONDS", help="End it after that.")
@json_option
def run(
    program: Path,
    secure: bool,
    command_line: str,
    initrd: Path | None,
    memory: str,
    time: str,
    timeout: float | None,
    as_json: bool,
) -> None:
    """Run the ELF file PROGRAM on a VM of its own, without firmware, and end with its exit status.

    124: timeout. 125: it could not be started, or the VM failed. 130: interrupted.
    """
    # Imported here: the other commands should not wait for it.
    import msgspec

    from deploy.run_program import STATUS_FAILED, RunOrder, run_program
    from protocol.errors import PefboxError

    def show(data: bytes) -> None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()

    try:
        order = RunOrder(
            program=program,
            initrd=initrd,
            secure=secure,
            command_line=command_line,
            memory_bytes=parse_size(memory, "--memory"),
            time=time,
            timeout_seconds=timeout,
            count_calls=as_json,
        )
        report = run_program(order, (lambda data: None) if as_json else show)
    except PefboxError as error:
        # 1 would be the program's own.
        click.echo(f"pefbox: {error}", err=True)
        raise SystemExit(STATUS_FAILED) from None
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(report), indent=2))
    if report.reason:
        click.echo(f"pefbox: {program}: {report.reason}", err=True)
    raise SystemExit(report.exit_status)
