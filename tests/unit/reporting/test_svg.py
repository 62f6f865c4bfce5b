"""Figures as SVG elements of one page."""

import re
from xml.etree import ElementTree

from matplotlib.figure import Figure

from moe_hf.reporting.svg import inline_svg


def drawn() -> Figure:
    figure = Figure(figsize=(2, 2))
    axes = figure.subplots()
    axes.plot([1, 2, 3], marker="o")
    axes.set_title("a < b")
    return figure


def test_two_equal_figures_share_no_id_and_refer_to_their_own():
    texts = [inline_svg(drawn(), prefix, "words") for prefix in ("one", "two")]
    ids = [set(re.findall(r' id="([^"]+)"', text)) for text in texts]
    references = [set(re.findall(r'(?:url\(|href=")#([^)"]+)', text)) for text in texts]
    assert ids[0] and not ids[0] & ids[1]
    assert ids == references
    assert texts[0].replace("one-", "two-") == texts[1]


def test_text_is_text_and_nothing_leads_outside():
    text = inline_svg(drawn(), "f", 'say "<this>"')
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg") and root.get("role") == "img" and root.get("aria-label") == 'say "<this>"'
    assert "a < b" in "".join(root.itertext())
    assert root.get("viewBox") and root.get("width") is None
    assert "<style" not in text and "metadata" not in text
    assert set(re.findall(r"https?://[^\"\s<]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
