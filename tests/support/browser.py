"""A headless Chromium that opens pages on screens of any width."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

WIDTHS = {"phone": 390, "desk": 1280, "wide": 1600}
# Words of tables that are broken over lines, but long values (class words) in pieces of eight letters or more.
BROKEN = """
const broken = [];
for (const cell of document.querySelectorAll("th, td")) {
  const texts = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    for (const word of texts.currentNode.data.matchAll(/[^\\s]+/g)) {
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


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Start Chromium by its driver. Tests fail without them, because a skipped test would prove nothing."""
    program, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.fail("tests marked browser need Chromium and its driver: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chromium = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    yield chromium
    chromium.quit()


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
