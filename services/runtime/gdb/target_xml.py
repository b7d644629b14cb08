"""GDB's target description of declared registers."""

from __future__ import annotations

from html import escape

from shared.gdb_registers import Description, Feature, Register

ARCHITECTURE = "powerpc:common64"


def target_xml(description: Description) -> bytes:
    """The annex `target.xml`, whole."""
    features = "\n".join(_feature(feature) for feature in description.features)
    return (
        '<?xml version="1.0"?>\n<!DOCTYPE target SYSTEM "gdb-target.dtd">\n<target version="1.0">\n'
        f"<architecture>{ARCHITECTURE}</architecture>\n{features}\n</target>\n"
    ).encode()


def _feature(feature: Feature) -> str:
    lines = [f"<feature {_attribute('name', feature.name)}>"]
    lines += [feature.types] if feature.types else []
    lines += [_register(register) for register in feature.registers]
    return "\n".join([*lines, "</feature>"])


def _register(register: Register) -> str:
    group = f" {_attribute('group', register.group)}" if register.group else ""
    name, kind = _attribute("name", register.name), _attribute("type", register.kind)
    return f'<reg {name} bitsize="{register.bits}" {kind}{group}/>'


def _attribute(name: str, value: str) -> str:
    return f'{name}="{escape(value)}"'
