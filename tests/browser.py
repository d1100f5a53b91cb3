"""A browser without a window, driven by the W3C WebDriver protocol: Chromium and its chromedriver."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DRIVER = ("chromedriver", "chromium.chromedriver")


def _which(names: Sequence[str]) -> str:
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise RuntimeError(f"the browser tests need one of {', '.join(names)} on PATH (Debian: chromium-driver)")
    return found


class Browser:
    """One session: a window with a page."""

    def __init__(self, address: str, width: int, height: int, dark: bool, scripts: bool) -> None:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu"]
        settings = {} if scripts else {"profile.managed_default_content_settings.javascript": 2}
        wanted = {
            "goog:chromeOptions": {"binary": _which(CHROMIUM), "args": options, "prefs": settings},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        self.base = address
        self.base += f"/session/{self._post('/session', {'capabilities': {'alwaysMatch': wanted}})['sessionId']}"
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._command("Emulation.setDeviceMetricsOverride", size)
        self.media("screen", dark)

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.base + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def _command(self, name: str, parameters: dict[str, Any]) -> Any:
        """A command of Chromium's own protocol."""
        return self._post("/goog/cdp/execute", {"cmd": name, "params": parameters})

    def media(self, kind: str, dark: bool = False) -> None:
        """What the page is shown on: ``"screen"`` or ``"print"``, and which colours the system asks for."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._command("Emulation.setEmulatedMedia", {"media": kind, "features": [scheme]})

    def open(self, page: Path) -> None:
        """Loads a file."""
        self._post("/url", {"url": page.as_uri()})

    def run(self, script: str, *args: Any) -> Any:
        """What the body of a function returns in the page."""
        return self._post("/execute/sync", {"script": script, "args": list(args)})

    def keys(self, text: str) -> None:
        """Presses keys, wherever the focus is."""
        steps = [{"type": kind, "value": key} for key in text for kind in ("keyDown", "keyUp")]
        self._post("/actions", {"actions": [{"type": "key", "id": "keys", "actions": steps}]})

    def log(self, kind: str) -> list[dict[str, Any]]:
        """The entries since the last call: ``"browser"`` (the console) or ``"performance"``."""
        return list(self._post("/se/log", {"type": kind}))

    def requests(self) -> list[str]:
        """The addresses of everything that was loaded since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return [params["request"]["url"] for params in sent]

    def screenshot(self, file: Path) -> None:
        """The window as a PNG."""
        with urllib.request.urlopen(self.base + "/screenshot", timeout=60) as answer:
            file.write_bytes(base64.b64decode(json.load(answer)["value"]))


@contextlib.contextmanager
def browser(width: int = 1300, height: int = 900, dark: bool = False, scripts: bool = True) -> Iterator[Browser]:
    """A browser that ends with the block.

    Raises:
        RuntimeError: there is none on PATH.
    """
    driver = subprocess.Popen([_which(DRIVER), "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        port = next(
            match[1] for line in driver.stdout if (match := re.search(r"started successfully on port (\d+)", line))
        )
        page = Browser(f"http://127.0.0.1:{port}", width, height, dark, scripts)
        try:
            yield page
        finally:
            urllib.request.urlopen(urllib.request.Request(page.base, method="DELETE"), timeout=60).close()
    finally:
        driver.terminate()
        driver.wait(30)
