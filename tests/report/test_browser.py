"""The page in Chromium: it opens without errors, groups open, the filter works, and everyone can read it.

Playwright drives the Chromium of the system, such as Debian's package `chromium`; it downloads no browser.
"""

import os
import shutil
from pathlib import Path

import pytest

from grpo.report import page as report_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCHEMES, WIDTHS = ("light", "dark"), (400, 1600)

# WCAG 2.1: contrast of each visible text with the backgrounds below it. Returns [[ratio, text], ...].
CONTRASTS = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const mix = (share, a, b) => share * a + (1 - share) * b;
  const over = (top, below) => top.slice(0, 3).map((c, i) => mix(top[3] / 255, c, below[i]));
  const luminance = (rgb) => {
    const linear = (c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = rgb.map((c) => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = (element) => {
    const below = element.parentElement ? background(element.parentElement) : [255, 255, 255];
    return over(rgba(getComputedStyle(element).backgroundColor), below);
  };
  const found = [];
  for (const element of document.body.querySelectorAll("*")) {
    const text = [...element.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data).join("").trim();
    const unseen = ["SCRIPT", "NOSCRIPT", "OPTION"].includes(element.tagName) || !element.checkVisibility();
    if (!text || unseen) continue;
    const style = getComputedStyle(element);
    const below = background(element);
    const colour = over(rgba(element instanceof SVGElement ? style.fill : style.color), below);
    const [high, low] = [luminance(colour), luminance(below)].sort((a, b) => b - a);
    const name = element.tagName + "." + element.getAttribute("class");
    found.push([(high + 0.05) / (low + 0.05), name + " " + text]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        reason = "chromium is not installed (apt-get install chromium)"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


class Opened:
    """A page in the browser, and what it wrote on the console."""

    def __init__(self, browser, file: Path, width: int = 1600, scheme: str = "light") -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on(
            "request", lambda request: self.errors.extend([] if "file:" in request.url else [request.url])
        )
        self.page.goto(file.as_uri())


@pytest.fixture
def open_page(browser):
    opened: list[Opened] = []

    def open_one(*arguments, **keywords):
        opened.append(Opened(browser, *arguments, **keywords))
        return opened[-1]

    yield open_one
    for each in opened:
        assert each.errors == []
        each.context.close()


@pytest.fixture(scope="module")
def file(finished_run, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    report_page.write_report([finished_run], path)
    return path


def test_a_click_opens_a_group_and_a_second_one_closes_it(open_page, file):
    page = open_page(file).page
    button = page.locator("button.group").first
    body = page.locator("#group-0-body")
    assert button.get_attribute("aria-expanded") == "false" and not body.is_visible()
    button.click()
    assert button.get_attribute("aria-expanded") == "true"
    text = body.inner_text()
    assert "Failed attempt" in text and "reward 1.00" in text and "advantage +" in text
    assert body.locator(".episode").count() == 3 and body.locator("pre .t").count() > 10
    assert {
        name[0] for name in body.locator("pre .t").evaluate_all("all => all.map(t => t.classList[1])")
    } == set("tsf")
    assert "log-prob -" in (body.locator("pre .t").first.get_attribute("title") or "")
    button.click()
    assert not body.is_visible()


def test_the_filter_shows_groups_of_a_verdict_and_a_step(open_page, file):
    page = open_page(file).page
    rows = page.locator("#group-list > li:visible")
    every = rows.count()
    page.get_by_role("combobox", name="Step").select_option("1")
    assert 0 < rows.count() < every
    assert set(rows.evaluate_all("all => all.map(row => row.dataset.step)")) == {"1"}
    page.get_by_role("combobox", name="Step").select_option("")
    page.get_by_role("combobox", name="Verdict").select_option("none right")
    shown = rows.all_inner_texts()
    assert shown and all("0 of 3 right" in text for text in shown)
    assert page.locator("#filter-count").inner_text() == f"{len(shown)} of {every} groups"
    page.get_by_role("combobox", name="Verdict").select_option("a verdict is: ok")
    assert all("0 of 3 right" not in text for text in rows.all_inner_texts()) and rows.count() == every - len(
        shown
    )


def test_everything_can_be_reached_and_opened_by_keyboard(open_page, file):
    page = open_page(file).page
    kinds = []
    for _ in range(60):
        page.keyboard.press("Tab")
        focused = page.evaluate("[document.activeElement.tagName, document.activeElement.className]")
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", focused
        kinds.append(focused[0])
        if focused == ["BUTTON", "group"]:
            break
    assert {"A", "SUMMARY", "SELECT", "BUTTON"} <= set(kinds)
    page.keyboard.press("Enter")
    assert page.locator("#group-0-body").is_visible()
    page.keyboard.press("Space")
    assert not page.locator("#group-0-body").is_visible()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_its_width_and_its_text_has_contrast(open_page, file, width, scheme):
    page = open_page(file, width=width, scheme=scheme).page
    page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    for button in page.locator("button.group").all():
        button.click()
    page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 500
    assert [pair for pair in contrasts if pair[0] < 4.5] == []
    colours = [text for _, text in contrasts if text.startswith("SPAN.t ")]
    assert {text.split()[1] for text in colours} == {f"{kind}{i}" for kind in "ts" for i in range(5)} | {
        "fed"
    }
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(19, 21, 24)"
    assert dark == (scheme == "dark")


def test_a_hostile_run_opens_without_running_anything(open_page, hostile_run, tmp_path):
    path = tmp_path / "report.html"
    report_page.write_report([hostile_run], path)
    for width in WIDTHS:
        page = open_page(path, width=width).page
        page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
        for button in page.locator("button.group").all():
            button.click()
        assert page.evaluate("window.attacked") is None
        assert page.locator("img").count() == 0 and page.locator("script:not([type])").count() == 1
        assert "window.attacked = 1" in page.locator("#group-0-body").inner_text()
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_page_of_several_runs_filters_by_run(open_page, finished_run, hostile_run, tmp_path):
    path = tmp_path / "report.html"
    report_page.write_report([finished_run, hostile_run], path)
    page = open_page(path, width=400).page
    page.get_by_role("combobox", name="Run").select_option(hostile_run.name)
    assert page.locator("#group-list > li:visible").count() == 4
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
