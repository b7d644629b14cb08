"""The model guest kernel: a small Linux-like kernel in Python (docs/model-kernel.md)."""
