"""The entry of VS Code's `launch.json` by which it attaches to a process."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from deploy.files import beside


def entry(target: str, host: str, port: int) -> dict[str, Any]:
    """What VS Code needs to know, under a name that says which process it is."""
    return {
        "name": f"pefbox {target}",
        "type": "debugpy",
        "request": "attach",
        "connect": {"host": host, "port": port},
        "justMyCode": False,
    }


def add_entry(path: Path, target: str, host: str, port: int) -> str | None:
    """Put the entry into `path`, in the place of an earlier one of the target; what hindered that, or None.

    A file that this cannot read, since people may write comments into it, is left as it is.
    """
    new = entry(target, host, port)
    try:
        settings: dict[str, Any] = (
            json.loads(path.read_text()) if path.exists() else {"version": "0.2.0", "configurations": []}
        )
        entries = settings["configurations"]
        settings["configurations"] = [old for old in entries if old.get("name") != new["name"]] + [new]
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path.resolve(), json.dumps(settings, indent=4) + "\n")
    except OSError as error:
        return f"not written: {error.strerror}; the entry is {json.dumps(new)}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"left as it is, since it holds more than plain JSON; add: {json.dumps(new)}"
    return None


def _replace(path: Path, text: str) -> None:
    """What the user's file holds from now on, which keeps its mode; raises OSError."""
    with beside(path) as new:
        new.write_text(text)
        if path.exists():
            shutil.copymode(path, new)
        os.replace(new, path)
