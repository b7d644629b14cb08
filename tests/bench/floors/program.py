"""A floor that is a program of its own: `N` on its standard input makes N runs, whose times come as a JSON list."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile


class FloorProgram:
    """`tests.bench.floors.MODULE` with `arguments` and a directory of its own; ends with the context."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="pefbox-floor-")
        command = [sys.executable, "-m", f"tests.bench.floors.{module}", *arguments, self._directory.name]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def times_ns(self, n_runs: int) -> list[int]:
        """Nanoseconds of each of `n_runs` runs."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{n_runs}\n")
        self._process.stdin.flush()
        times_ns: list[int] = json.loads(self._process.stdout.readline())
        return times_ns

    def close(self) -> None:
        """End its processes."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._directory.cleanup()

    def __enter__(self) -> FloorProgram:
        """As it was started."""
        return self

    def __exit__(self, *_: object) -> None:
        """As `close`."""
        self.close()
