"""How is a page looked at as a person would?  Headless Chromium without network keeps what it logged and asked for."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")


def require() -> None:
    """Skips where there is no browser; fails there in CI."""
    if CHROMIUM and DRIVER:
        return
    message = "no chromium and chromedriver on the PATH: on Debian, apt install chromium chromium-driver"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


class Page:
    """A page in a browser of its own."""

    def __init__(self, driver) -> None:
        self.driver = driver

    def open(self, path, anchor: str = "") -> "Page":
        self.driver.get(Path(path).resolve().as_uri() + anchor)
        return self

    def run(self, script: str, *arguments):
        """What JavaScript returns."""
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition: str, seconds: float = 20):
        """Waits until a JavaScript expression is true."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, seconds).until(
            lambda _: self.run(f"return {condition}"), f"never true: {condition}"
        )

    def point(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        """Moves the mouse to a place in a thing, given as shares of its width and height."""
        self.run("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", selector)
        box = self.run(
            "const b = document.querySelector(arguments[0]).getBoundingClientRect();"
            " return [b.x, b.y, b.width, b.height]",
            selector,
        )
        for shift in (3, 0):
            spot = {"type": "mouseMoved", "x": box[0] + box[2] * x + shift, "y": box[1] + box[3] * y}
            self.driver.execute_cdp_cmd("Input.dispatchMouseEvent", spot)

    def logged(self) -> list[str]:
        """Errors of the console since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "ERROR")]

    def requests(self) -> list[str]:
        """Addresses that were asked for since the last call, files and inlined data aside."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [
            event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"
        ]
        asked += [event["params"]["url"] for event in events if event["method"] == "Network.webSocketCreated"]
        return [url for url in asked if not url.startswith(("file:", "data:", "blob:", "about:"))]

    def resize(self, width: int, height: int = 1000) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def dark(self, yes: bool = True) -> None:
        feature = {"name": "prefers-color-scheme", "value": "dark" if yes else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def screenshot(self, path, whole: bool = False) -> Path:
        import base64

        data = self.driver.execute_cdp_cmd(
            "Page.captureScreenshot", {"captureBeyondViewport": whole, **(self._all() if whole else {})}
        )
        Path(path).write_bytes(base64.b64decode(data["data"]))
        return Path(path)

    def _all(self):
        size = self.driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}


@contextlib.contextmanager
def browse(width: int = 1400):
    """A headless browser; every host is unreachable for it, so that a page that needs one is seen to fail."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    switches = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ]
    for switch in [
        *switches,
        "--hide-scrollbars",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
    ]:
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        page = Page(driver)
        page.resize(width)
        yield page
    finally:
        driver.quit()
