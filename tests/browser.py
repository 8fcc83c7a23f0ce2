"""A real browser without a window, for the pages of this project: chromium through selenium, where both are there."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-default-browser-check",
]  # fmt: skip


class Page:
    """A tab: a file of ours, at any width."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, path: Path, width: int = 1280, height: int = 1600) -> None:
        """Show a file; everything that the page says to its console from now on is kept."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(path.resolve().as_uri())

    def run(self, script: str, *arguments: Any) -> Any:
        """What a piece of JavaScript returns."""
        return self.driver.execute_script(script, *arguments)

    def click(self, selector: str, number: int = 0) -> None:
        """Click on one of the elements that a CSS selector finds."""
        element = self.driver.find_elements("css selector", selector)[number]
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def type(self, selector: str, text: str) -> None:
        """Replace the text of a field, key by key."""
        element = self.driver.find_element("css selector", selector)
        element.clear()
        element.send_keys(text)

    def put(self, selector: str, text: str) -> None:
        """Replace the text of a field at once, as by pasting."""
        script = "const field = document.querySelector(arguments[0]); field.value = arguments[1];"
        self.run(script + "field.dispatchEvent(new Event('input', {bubbles: true}));", selector, text)

    def texts(self, selector: str) -> list[str]:
        """The texts of all that a CSS selector finds."""
        script = "return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent)"
        return list(self.run(script, selector))

    def overflow(self) -> int:
        """By how many pixels the page is wider than the window."""
        return int(self.run("return document.scrollingElement.scrollWidth - window.innerWidth"))

    def faults(self) -> list[str]:
        """Errors that the page raised or logged."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def asked(self) -> list[str]:
        """The addresses that were asked for since the last time, but for files, data and the browser's own pages."""
        entries = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [
            entry["params"]["request"]["url"] for entry in entries if entry["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in sent if not url.startswith(("file:", "data:", "chrome:", "chrome-"))]


@contextmanager
def opened() -> Iterator[Page]:
    """A browser for as long as it takes; the test is skipped where there is none."""
    selenium = pytest.importorskip("selenium.webdriver", reason="no selenium is installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium with its chromedriver is installed")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        browser = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
        try:
            yield Page(browser)
        finally:
            browser.quit()
