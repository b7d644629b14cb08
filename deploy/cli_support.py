"""What all commands have in common: options, targets, commands that are imported only when they run."""

from __future__ import annotations

import importlib
import math
import re
from pathlib import Path
from typing import Any

import click

from deploy.run_dirs import MANIFEST_FILE, choose_cluster, runtime_root, state_root
from protocol.errors import UserError
from shared.terminal_text import one_line

cluster_option = click.option("--cluster", metavar="NAME", help="The cluster meant; default: the only one running.")
state_option = click.option(
    "--state", "state_dir", type=click.Path(path_type=Path), help="State directory of a cluster that is down."
)
json_option = click.option("--json", "as_json", is_flag=True, help="JSON instead of text.")


class NumberRange(click.FloatRange):
    """As click's, without NaN, which no comparison keeps out."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ANN401
        """As click.ParamType."""
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is no number", param, ctx)
        return number


class LazyGroup(click.Group):
    """A group whose commands live in other modules; `places` maps a name to `module:attribute`."""

    def __init__(self, *, name: str, help: str, places: dict[str, str]) -> None:
        super().__init__(name=name, help=help)
        self._places = places

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names in their declared order."""
        return list(self._places)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of a command."""
        place = self._places.get(cmd_name)
        if place is None:
            return None
        module, _, attribute = place.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with the nearest name for one that does not exist."""
        from deploy.cluster_section import did_you_mean

        if args and args[0] not in self._places and not args[0].startswith("-"):
            ctx.fail(f'no command "{args[0]}"{did_you_mean(args[0], self._places)}')
        return super().resolve_command(ctx, args)


def state_dir_of(cluster: str | None, state_dir: Path | None) -> Path:
    """The state directory that a command means: the given one, that of a running cluster, or a default one."""
    if state_dir is not None:
        return state_dir
    default = state_root() / cluster if cluster is not None else None
    try:
        run_dir = runtime_root() / choose_cluster(cluster)
    except UserError:
        if default is not None and default.is_dir():
            return default
        raise
    from deploy.manifest import read_manifest

    manifest = read_manifest(run_dir / MANIFEST_FILE)
    if manifest is None:
        raise UserError(f'cluster "{run_dir.name}" has no manifest that this version understands')
    return Path(manifest.state_dir)


def printable(text: str) -> str:
    """`text` of several lines for a terminal: each as `one_line`, tabs and line breaks stay."""
    return re.sub(r"[^\t\n]+", lambda part: one_line(part[0]), text)


def parse_size(text: str, option: str) -> int:
    """A size in bytes as cluster files write it: `512M`; raises UserError that names the option."""
    from deploy.cluster_file import MIN_VM_BYTES
    from deploy.cluster_section import size_of
    from protocol.geometry import MAX_VM_BYTES, PAGE_BYTES

    n_bytes = size_of(text)
    if n_bytes is None:
        raise UserError(f'{option}: "{text}" is no size; allowed: bytes, or a text such as 512M or 1G')
    if not MIN_VM_BYTES <= n_bytes <= MAX_VM_BYTES or n_bytes % PAGE_BYTES:
        raise UserError(
            f"{option}: {text} is not possible; allowed: {MIN_VM_BYTES} to {MAX_VM_BYTES} bytes, a multiple of 64K"
        )
    return n_bytes


def parse_number(text: str) -> int:
    """A number as people type addresses: decimal or 0x..., of 64 bits at most; raises UserError."""
    try:
        number = int(text, 0)
    except ValueError:
        raise UserError(f'"{text}" is no number: decimal, or hexadecimal with 0x') from None
    if not 0 <= number < 1 << 64:
        raise UserError(f"{text} is no address: it has more than 64 bits")
    return number


def tell_down(cluster: str) -> None:
    """To who followed it."""
    click.echo(f'pefbox: cluster "{cluster}" is down', err=True)
