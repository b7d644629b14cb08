"""The guest: a POWER processor and the kernel on it."""
