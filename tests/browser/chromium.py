"""The system's Chromium, driven by Playwright; and axe-core, from npm into the cache folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

EXECUTABLE = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
AXE = "axe-core@4.14.1"
HANG_MS = 60_000        # a guard: nothing that works takes nearly so long
DESK, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}


@contextmanager
def chromium() -> Iterator[Browser]:
    assert EXECUTABLE, "there is no Chromium: apt install chromium, or name one with CHROMIUM"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=EXECUTABLE, headless=True, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


class Complaints:
    """What a page writes to its console as a warning or an error, and what it throws.

    That an answer had a bad status is Chromium's own line: a test that wants one says so with `allowed`.
    """

    def __init__(self, page: Page) -> None:
        self.found: list[str] = []
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.found.append(str(error)))

    def _note(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.found.append(f"{message.type}: {message.text} {message.location.get('url', '')}")

    def beside(self, *allowed: str) -> list[str]:
        return [one for one in self.found if not any(text in one for text in allowed)]


def axe_source() -> str | None:
    """axe.min.js; None where npm is missing or the registry cannot be reached."""
    cache = Path(os.environ.get("VLLM_SERVER_CACHE")
                 or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-server")
    kept = cache / f"{AXE.replace('@', '-')}.min.js"
    if not kept.exists():
        npm = shutil.which("npm")
        if npm is None:
            return None
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run([npm, "pack", AXE, "--silent"], cwd=folder, capture_output=True, timeout=120)
            packed = next(Path(folder).glob("*.tgz"), None)
            if done.returncode or packed is None:
                return None
            with tarfile.open(packed) as archive:
                file = archive.extractfile("package/axe.min.js")
                assert file is not None
                draft = Path(folder) / "axe.min.js"
                draft.write_bytes(file.read())
                shutil.copy(draft, f"{kept}.draft")
                Path(f"{kept}.draft").replace(kept)
    return kept.read_text()


def serious_violations(page: Page, axe: str, where: str) -> list[str]:
    """What axe-core (its source: `axe`) finds on the page as it is now; its context must bypass the page's policy."""
    page.evaluate(axe)
    result = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [f"{where}: {one['id']} ({one['impact']}): {[node['html'][:160] for node in one['nodes'][:3]]}"
            for one in result["violations"] if one["impact"] in ("serious", "critical")]


def enter(page: Page, key: str, *, keep: bool = False) -> None:
    page.get_by_label("API key").fill(key)
    if keep:
        page.get_by_label("Remember it on this device").check()
    page.get_by_role("button", name="Use it").click()
