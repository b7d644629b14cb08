"""What `make = "..."` in a cluster file stands for: files that `up` makes before it starts anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from deploy.cluster_file import Cluster
from deploy.demo_files import make_demo_files
from deploy.linux_files import make_linux_files
from protocol.errors import UserError

Maker = Callable[[Cluster, Path], None]
"""Makes the files that a cluster names, below its state directory, where they are missing or out of date."""

MAKERS: dict[str, Maker] = {"demo": make_demo_files, "linux": make_linux_files}


def make(cluster: Cluster, state_dir: Path) -> None:
    """Make what the cluster file asks for; raises UserError when nothing here can."""
    if cluster.make is None:
        return
    maker = MAKERS.get(cluster.make)
    if maker is None:
        raise UserError(f'{cluster.path}: make = "{cluster.make}": nothing here makes these files yet')
    maker(cluster, state_dir)
