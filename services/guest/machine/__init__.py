"""The engine that runs real POWER machine code."""
