"""Figures of the running machine against floors measured in the same run: `python -m tests.bench`."""
