"""A page in a real browser: how tests open one, use it, look for what is wrong with it, and keep pictures of it.

Chromium is the one that `CHROMIUM` names, else that of `make browser`, else an installed one. The audit of
accessibility is axe-core's, from the browser extra. Pictures go to build/screenshots, or to what `SCREENSHOTS` names.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

ROOT = Path(__file__).parents[2]
OURS = ROOT / "build" / "browser" / "chromium"
PICTURES = Path(os.environ.get("SCREENSHOTS") or ROOT / "build" / "screenshots")
VIEWS = ("overview", "curves", "episodes", "compare", "evaluations", "settings", "budget", "episode=0.3")
TALLEST = 6_000
"""Pixels of a page that a picture shows."""
SERIOUS = ("serious", "critical")
USE = """async () => {
  const settled = () => new Promise((go) => setTimeout(go, 10));
  const all = (what) => [...document.querySelectorAll(`#main ${what}`)];
  let used = 0;
  for (const what of ["summary", "input", "select", "button"])
    for (let at = 0; at < Math.min(all(what).length, 12); at++) {
      const one = all(what)[at], kind = what === "input" ? "input" : "change";
      if (one.tagName === "SUMMARY" || one.tagName === "BUTTON") { one.click(); used++; await settled(); continue; }
      const values = one.tagName === "SELECT" ? [...one.options].slice(-3).map((option) => option.value) : ["1", ""];
      for (const value of [...values, one.value]) {
        if (!one.isConnected) break;
        one.value = value;
        one.dispatchEvent(new Event(kind, { bubbles: true }));
        used++;
        await settled();
      }
    }
  await new Promise((go) => setTimeout(go, 150));
  return used;
}"""
"""Use everything in a view that can be used: fold and unfold, type, choose, press."""
T = TypeVar("T")


def chromium() -> str:
    """The browser, empty where there is none."""
    installed = (shutil.which(name) for name in ("chromium", "chromium-browser"))
    there = [os.environ.get("CHROMIUM"), str(OURS) if OURS.is_file() else None, *installed]
    return next((name for name in there if name), "")


def axe() -> str:
    """The script of the audit, empty where it is not installed."""
    found = importlib.util.find_spec("axe_playwright_python")
    folders = (found and found.submodule_search_locations) or []
    return next((Path(folder, "axe.min.js").read_text(encoding="utf-8") for folder in folders), "")


@contextmanager
def opened() -> Iterator[Any]:
    """A headless browser; the test that asks for it skips where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'echelon[browser]'")
    if not chromium():
        pytest.skip("no Chromium: make browser, or apt-get install chromium, or name one in CHROMIUM")
    with api.sync_playwright() as started:
        fonts = {"FONTCONFIG_PATH": str(OURS.parent / "fonts")} if Path(chromium()) == OURS else {}
        browser = started.chromium.launch(
            executable_path=chromium(), args=["--no-sandbox"], env={**os.environ, **fonts}
        )
        yield browser
        browser.close()


class Elsewhere:
    """A browser in a thread of its own: beside it, tests can run event loops of theirs."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._open = opened()
        self._browser = self._do(self._open.__enter__)

    def _do(self, what: Callable[[], T]) -> T:
        return self._thread.submit(what).result()

    def look(self, at: Callable[[Any], T]) -> T:
        """Call `at` with the browser."""
        return self._do(lambda: at(self._browser))

    def close(self) -> None:
        """End the browser and its thread."""
        self._do(lambda: self._open.__exit__(None, None, None))
        self._thread.shutdown()


class Tab:
    """A page in the browser, and everything it has complained about."""

    def __init__(
        self, browser: Any, page: Path | str, *, width: int = 1280, mode: str = "light", audit: bool = False
    ) -> None:
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.width = width
        self.context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme=mode,
            offline=isinstance(page, Path),
            bypass_csp=audit,
        )
        self.context.set_default_timeout(120_000)
        self.page = self.context.new_page()
        self.page.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.address = page.as_uri() if isinstance(page, Path) else page
        self.page.goto(self.address)
        self.page.wait_for_selector("#main > *")

    def go(self, view: str) -> None:
        """Show a view."""
        self.page.evaluate("view => { location.hash = view; }", view)
        self.until("location.hash", f"#{view}")
        self.page.wait_for_timeout(150)

    def until(self, expression: str, value: object) -> None:
        """Wait for an expression to have a value; the page's own policy lets it evaluate nothing in the page."""
        end = time.monotonic() + 120
        while self.page.evaluate(expression) != value:
            assert time.monotonic() < end, f"{expression} is {self.page.evaluate(expression)!r}, not {value!r}"
            self.page.wait_for_timeout(50)

    @property
    def text(self) -> str:
        """What can be read."""
        return str(self.page.inner_text("#main"))

    def quiet(self) -> bool:
        """Whether nothing was complained about and nothing asked for but the page itself, and what is below it."""
        others = [url for url in self.asked if not url.startswith((self.address, "data:"))]
        return (self.complaints, others) == ([], [])

    def fits(self) -> bool:
        """Whether nothing is wider than the screen."""
        return bool(self.page.evaluate("document.documentElement.scrollWidth <= innerWidth"))

    def picture(self, name: str) -> None:
        """Keep what is shown, all of its height with its curves drawn."""
        PICTURES.mkdir(parents=True, exist_ok=True)
        tall = min(TALLEST, max(900, self.page.evaluate("document.documentElement.scrollHeight")))
        self.page.set_viewport_size({"width": self.width, "height": tall})
        self.page.wait_for_timeout(200)
        self.page.screenshot(path=str(PICTURES / f"{name}.png"))
        self.page.set_viewport_size({"width": self.width, "height": 900})

    def findings(self, script: str) -> list[str]:
        """What the audit of accessibility finds serious."""
        self.page.evaluate(script)
        found = self.page.evaluate("axe.run()")["violations"]
        return [f"{one['id']}: {one['nodes'][0]['html'][:120]}" for one in found if one["impact"] in SERIOUS]
