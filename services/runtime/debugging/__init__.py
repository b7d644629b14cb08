"""Debuggers in a process that was started debuggable: a prompt (`prompt.py`), and debugpy for editors (`dap.py`)."""
