"""XML as libvirt's tools write it: indented, with elements of our own in a namespace."""

from __future__ import annotations

import re
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

NAMESPACE = "urn:pefbox:1"
PREFIX = "pefbox"
_NO_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_BYTES_A_KIB = 1024
ElementTree.register_namespace(PREFIX, NAMESPACE)


def own(name: str) -> str:
    """The name of an element that is ours, not libvirt's."""
    return f"{{{NAMESPACE}}}{name}"


def child(parent: Element, name: str, text: object = None, /, **attributes: object) -> Element:
    """A new last child; `text` and attributes are made text, an attribute that is None is left out."""
    given = {key: _clean(value) for key, value in attributes.items() if value is not None}
    element = SubElement(parent, name, given)
    element.text = None if text is None else _clean(text)
    return element


def kib(parent: Element, name: str, n_bytes: int) -> Element:
    """A size as libvirt writes it."""
    return child(parent, name, n_bytes // _BYTES_A_KIB, unit="KiB")


def yes_no(value: bool) -> str:
    """A boolean as libvirt writes it."""
    return "yes" if value else "no"


def to_text(root: Element) -> str:
    """The document; reading it gives every text back, but for characters that XML cannot hold."""
    ElementTree.indent(root)
    # A carriage return in a text would be read as a line feed; those of attributes are escaped already.
    return ElementTree.tostring(root, encoding="unicode").replace("\r", "&#13;")


def _clean(value: object) -> str:
    return _NO_XML.sub("\ufffd", str(value))
