"""GDB's target description of declared registers."""

from __future__ import annotations

from xml.sax.saxutils import quoteattr

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
    lines = [f"<feature name={quoteattr(feature.name)}>"]
    lines += [feature.types] if feature.types else []
    lines += [_register(register) for register in feature.registers]
    return "\n".join([*lines, "</feature>"])


def _register(register: Register) -> str:
    group = f" group={quoteattr(register.group)}" if register.group else ""
    return f'<reg name={quoteattr(register.name)} bitsize="{register.bits}" type={quoteattr(register.kind)}{group}/>'
