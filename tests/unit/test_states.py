"""Texts of guests and services on their way to the operator's terminal."""

from __future__ import annotations

from deploy.states import MAX_TEXT_CHARS, printable


def test_control_characters_never_reach_the_terminal() -> None:
    assert printable("bad\x1b[2J\rtext\x07") == "bad?[2J?text?"


def test_a_long_text_is_cut() -> None:
    assert printable("x" * 10_000) == "x" * MAX_TEXT_CHARS + "..."
