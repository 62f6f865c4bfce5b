"""A report as a reader sees it: opened in a browser, on a screen and on paper."""

import re
from types import SimpleNamespace

import pytest
from metrics_files import MadeUpRun, several_kinds, write_run

from moe_hf.reporting.page import write_report
from moe_hf.reporting.runs import read_runs

# A4 with margins of 15 mm, in CSS pixels.
PRINT_WIDTH = round((210 - 2 * 15) / 25.4 * 96)
HARMFUL = '<b>x&y<img src=x onerror="console.log(1)">'


@pytest.fixture(scope="module")
def opened(browser, tmp_path_factory):
    """Open a report on runs of all kinds, one of a name that must not become HTML and one of many layers."""
    folder = tmp_path_factory.mktemp("runs")
    kinds = several_kinds() | {HARMFUL: MadeUpRun(num_entries=12, sparse_layers=(3,), seed=7)}
    kinds["deep"] = MadeUpRun("loss_free", tuple(range(48)), 48, 128, num_entries=6, seed=8)
    runs = read_runs([write_run(folder / name, kind) for name, kind in kinds.items()])
    path = write_report(runs, folder / "report")
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    messages, requests = [], []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.resolve().as_uri(), wait_until="load")
    yield SimpleNamespace(page=page, names=list(kinds), path=path, messages=messages, requests=requests)
    page.close()


@pytest.fixture
def page(opened):
    opened.page.set_viewport_size({"width": 1280, "height": 900})
    opened.page.emulate_media(media="screen", color_scheme="light")
    return opened.page


def test_nothing_is_fetched_and_nothing_is_complained_about(opened):
    assert opened.messages == []
    own = opened.path.resolve().as_uri()
    assert [url for url in opened.requests if url != own and not url.startswith("data:")] == []
    assert own in opened.requests


def test_the_table_has_a_row_for_each_run(opened, page):
    headings = page.locator("thead th").all_inner_texts()
    assert headings[:3] == ["Run", "Balancing", "Capacity"] and headings[-1] == "Tokens/s"
    assert page.locator("tbody th").all_text_contents() == opened.names
    rows = [row.locator("td").all_inner_texts() for row in page.locator("tbody tr").all()]
    column = {heading: [row[place] for row in rows] for place, heading in enumerate(headings[1:])}
    assert column["Balancing"][:5] == ["aux_loss (global)", "loss_free", "sinkhorn", "none", "dense"]
    assert column["Capacity"][:3] == ["–", "–", "1.25 (position)"]
    assert column["Steps"] == ["500"] * 5 + ["350", "120", "60"]
    assert column["Tokens"][0] == "32.8 M"
    assert column["Dead experts"] == ["0", "0", "0", "2", "–", "0", "0", "0"]
    assert all(re.fullmatch(r"\d\.\d{4}", cell) for cell in column["Training loss"] + column["Eval. loss"])
    # The lines of the table are those of the figures.
    strokes = page.locator("tbody svg line").evaluate_all("lines => lines.map(line => line.getAttribute('stroke'))")
    assert len(set(strokes)) == len(opened.names)
    assert page.locator("figure svg").first.evaluate(
        "(svg, strokes) => strokes.every(stroke => svg.outerHTML.toLowerCase().includes(stroke.toLowerCase()))", strokes
    )


def test_names_are_text(opened, page):
    assert page.locator("tbody th b, tbody th img").count() == 0
    assert page.locator("tbody th", has_text=HARMFUL).count() == 1


def test_headings_captions_and_alternative_texts(page):
    assert page.locator("h1").all_inner_texts() == ["Training report: 8 runs"]
    assert page.locator("h2").all_inner_texts() == ["Summary", "Figures"]
    figures = page.locator("figure").all()
    assert len(figures) == 10
    for number, figure in enumerate(figures, start=1):
        assert figure.locator("figcaption").inner_text().startswith(f"Figure {number}. ")
        assert figure.locator("svg").get_attribute("role") == "img"
        assert len(figure.locator("svg").get_attribute("aria-label")) > 60
    captions = page.locator("figcaption").all_inner_texts()
    assert sum("MaxVio is max" in caption for caption in captions) == 1
    assert page.locator("caption").inner_text().startswith("Table 1. ")


def test_ids_are_unique_and_references_lead_somewhere(page):
    found = page.evaluate(
        r"""() => {
            const ids = [...document.querySelectorAll('[id]')].map(element => element.id);
            const text = document.documentElement.outerHTML;
            const used = [...text.matchAll(/(?:url\(&quot;#|url\(#|href="#)([^")&]+)/g)].map(match => match[1]);
            return {ids, lost: used.filter(id => !document.getElementById(id)), used: used.length};
        }"""
    )
    assert len(found["ids"]) == len(set(found["ids"])) > 50
    assert found["used"] > 500 and found["lost"] == []


def test_figures_are_visible(page):
    for svg in page.locator("figure > svg").all():
        box = svg.bounding_box()
        assert box["width"] > 600 and box["height"] > 100 and svg.is_visible()
        # Something is drawn, and text is text.
        assert svg.locator("path, image").count() > 5 and svg.locator("text").count() > 5


@pytest.mark.parametrize("media, width", [("screen", 1280), ("print", PRINT_WIDTH)])
def test_nothing_overflows(page, media, width):
    page.emulate_media(media=media)
    page.set_viewport_size({"width": width, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    too_wide = page.evaluate(
        """width => [...document.querySelectorAll('h1, h2, p, table, figure, figcaption, figure > svg, td, th')]
            .filter(element => element.getBoundingClientRect().right > width + 1).map(element => element.outerHTML)"""
        "",
        width,
    )
    assert [element[:100] for element in too_wide] == []


def test_only_the_table_scrolls_in_a_narrow_window(page):
    page.set_viewport_size({"width": 500, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= 500
    assert page.locator(".scroll").evaluate("element => element.scrollWidth > element.clientWidth")


def test_texts_of_figures_stay_inside(page):
    """No name, title or number is cut off at the edge of its figure, or runs into the text of another panel."""
    outside = page.evaluate(
        """() => [...document.querySelectorAll('figure > svg')].flatMap(svg => {
            const frame = svg.getBoundingClientRect();
            return [...svg.querySelectorAll('text')].filter(text => {
                const box = text.getBoundingClientRect();
                return box.left < frame.left - 2 || box.right > frame.right + 2
                    || box.top < frame.top - 2 || box.bottom > frame.bottom + 2;
            }).map(text => text.textContent);
        })"""
    )
    assert outside == []


def test_a_dark_desktop_changes_nothing(page):
    page.emulate_media(media="screen", color_scheme="dark")
    colours = "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    assert page.evaluate(colours) == ["rgb(255, 255, 255)", "rgb(26, 26, 26)"]


def test_it_prints_on_a4(page):
    pdf = page.pdf(prefer_css_page_size=True)
    sizes = set(re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", pdf))
    assert {(round(float(width)), round(float(height))) for width, height in sizes} == {(595, 842)}
    assert 5 <= len(re.findall(rb"/Type /Page\b", pdf)) <= 14
