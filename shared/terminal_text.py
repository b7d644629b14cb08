"""Texts that anybody may have written, on their way to a terminal."""

from __future__ import annotations


def one_line(text: str) -> str:
    """Safe for one line of a terminal: no control characters, no line breaks."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else "?" for char in text)
