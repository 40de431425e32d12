"""A headless Chromium that opens pages on screens of any width."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

SCHEMES = ("light", "dark")
WIDTHS = {"phone": 390, "desk": 1280, "wide": 1600}
# Words of tables that are broken over lines elsewhere than at a hyphen. Long values (class words) may be in pieces of
# eight letters or more.
BROKEN = """
const broken = [];
for (const cell of document.querySelectorAll("th, td")) {
  const texts = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    for (const word of texts.currentNode.data.matchAll(/[^\\s\\u2010-]+/g)) {
      const range = document.createRange();
      range.setStart(texts.currentNode, word.index);
      range.setEnd(texts.currentNode, word.index + word[0].length);
      const lines = new Set([...range.getClientRects()].map(box => Math.round(box.top))).size;
      const least = cell.classList.contains("words") ? 8 : Infinity;
      if (lines > 1 && word[0].length / lines < least) broken.push(`${word[0]} on ${lines} lines`);
    }
  }
}
return broken;
"""
# Cells that the screen cuts: of tables that are wider than their box, if these do not scroll, or if none may.
CUT = """
const [mayScroll] = arguments;
const boxOf = e => { for (e = e.parentElement; e; e = e.parentElement)
  if (["auto", "scroll"].includes(getComputedStyle(e).overflowX)) return e;
  return document.documentElement; };
return [...document.querySelectorAll("th, td")].filter(cell => {
  const table = cell.closest("table");
  const box = table.scrollWidth > table.clientWidth ? table : boxOf(table), edge = box.getBoundingClientRect().right;
  const scrolls = box !== document.documentElement && mayScroll;
  return !scrolls && cell.getClientRects().length && cell.getBoundingClientRect().right > edge + 1;
}).map(cell => cell.innerText.slice(0, 40));
"""
# Every visible text, with its contrast by WCAG 2.2 against the nearest background behind it.
CONTRASTS = r"""
const channel = c => { c /= 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
const parse = s => { const n = s.match(/[\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
const luminance = c => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
const over = (a, b) => [0, 1, 2].map(i => a[3] * a[i] + (1 - a[3]) * b[i]);
const behind = e => {
  for (; e; e = e.parentElement) {
    const c = parse(getComputedStyle(e).backgroundColor);
    if (c[3] === 1) return c;
    if (c[3] > 0) return over(c, behind(e.parentElement));
  }
  return [255, 255, 255];
};
const texts = [];
for (const e of document.querySelectorAll("body *")) {
  const own = [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.textContent.trim()).join(" ").trim();
  if (!own || e.tagName === "title" || !e.getClientRects().length) continue;
  const style = getComputedStyle(e), back = behind(e);
  const colour = over(parse(e.namespaceURI.endsWith("svg") ? style.fill : style.color), back);
  const [light, dark] = [luminance(colour), luminance(back)].sort((a, b) => b - a);
  texts.push([(light + 0.05) / (dark + 0.05), own.slice(0, 40), parseFloat(style.fontSize)]);
}
return texts;
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Start Chromium for the tests of a module. Tests fail without it, because a skipped test would prove nothing."""
    chromium = browser_of()
    yield chromium
    chromium.quit()


def browser_of() -> Any:
    """Return a Chromium that was started by its driver."""
    program, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.fail("tests marked browser need Chromium and its driver: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))


def show(browser: Any, page: str, scheme: str = "light", width: int = 1280) -> None:
    """Open the page on a screen of this width, with this preferred colour scheme."""
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    browser.get(page)
