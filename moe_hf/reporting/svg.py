"""Matplotlib figures as SVG that can stand inside of a page, beside others."""

import io
import re
from xml.etree import ElementTree

from matplotlib import rc_context
from matplotlib.figure import Figure

from .style import STYLE

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_REFERENCE = re.compile(r"""(?:url\(|href=")#([^)"]+)""")
# Of pictures inside of a figure (heat maps), in dots per inch.
_RESOLUTION = 220


def inline_svg(figure: Figure, prefix: str, alt: str) -> str:
    """Return a figure as an `<svg>` element.

    Args:
        figure: to be drawn.
        prefix: put before every id, because those of two figures of one page are the same otherwise.
        alt: text for those who do not see it.
    """
    buffer = io.BytesIO()
    with rc_context(STYLE):
        figure.savefig(
            buffer, format="svg", dpi=_RESOLUTION, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(buffer.getvalue())
    for name in ("metadata", "defs/style"):
        _remove(root, name)
    _rename_ids(root, prefix)
    del root.attrib["width"], root.attrib["height"]
    root.set("role", "img")
    root.set("aria-label", alt)
    return ElementTree.tostring(root, encoding="unicode")


def _rename_ids(root: ElementTree.Element, prefix: str) -> None:
    """Put the prefix before ids and references; ids that nothing refers to are dropped, some occur more than once."""
    used = set(_REFERENCE.findall(ElementTree.tostring(root, encoding="unicode")))
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)
        for name, value in element.attrib.items():
            if name == "id":
                element.set(name, f"{prefix}-{value}")
            elif name in ("href", f"{{{_XLINK}}}href") and value.startswith("#"):
                element.set(name, f"#{prefix}-{value[1:]}")
            else:
                element.set(name, re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", value))


def _remove(root: ElementTree.Element, path: str) -> None:
    """Take away an element that would describe, or style, the whole page."""
    parent_path, _, name = path.rpartition("/")
    for parent in root.findall(f"{{{_SVG}}}{parent_path}") if parent_path else [root]:
        for child in parent.findall(f"{{{_SVG}}}{name}"):
            parent.remove(child)
