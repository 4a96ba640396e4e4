"""The page with the real engine: a model is loaded from it, watched, talked to, looked into and stopped."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("playwright.sync_api", reason="needs Playwright: make browser installs it")

from playwright.sync_api import Page, expect

from tests.browser.chromium import EXECUTABLE, axe_source, enter, serious_violations
from tests.browser.conftest import Open, browser, open_page  # noqa: F401

from .conftest import Models
from .real_daemon import LOAD_S, RealDaemon

pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="there is no Chromium: apt install chromium")

KEYS = {"API_KEYS": "bob:user-key", "ADMIN_API_KEYS": "root:admin-key"}
AS_ADMIN = {"Authorization": "Bearer admin-key"}
UNAUTHORIZED = ("status of 401",)      # what the console says of the first look without a key

Seen = Callable[[str], None]


@pytest.fixture(autouse=True)
def patience() -> None:
    expect.set_options(timeout=LOAD_S * 1000)


def test_a_model_from_load_to_stop(daemon: RealDaemon, models: Models, open_page: Open,  # noqa: F811
                                   note: Callable[[str], None]) -> None:
    for one in daemon.instances():
        if models.third.alias in one["aliases"]:
            daemon.delete(f"/instances/{one['id']}?wait=1")
    page = open_page(daemon).page
    note(f"page: {from_load_to_stop(page, models, lambda view: None)}")
    assert not any(models.third.alias in one["aliases"] for one in daemon.instances())


def test_a_model_from_load_to_stop_with_keys(engine: str, tmp_path: Path, models: Models, open_page: Open,  # noqa: F811
                                             note: Callable[[str], None]) -> None:
    """With axe-core looking at each view on the way, where it can be had."""
    axe, found = axe_source(), list[str]()
    with RealDaemon(tmp_path, engine, KEYS) as daemon:
        assert daemon.get("/instances").status == 401
        page = open_page(daemon, allowed=UNAUTHORIZED, bypass_csp=axe is not None).page
        enter(page, "admin-key")
        seen: Seen = lambda view: found.extend(serious_violations(page, axe, view) if axe else ())     # noqa: E731
        note(f"page with keys: {from_load_to_stop(page, models, seen)}")
        assert daemon.get("/instances", AS_ADMIN).json["data"] == []
    assert found == []


def from_load_to_stop(page: Page, models: Models, seen: Seen) -> str | None:
    """`seen` is told whenever there is another view to look at.  The figures beside the answer."""
    page.get_by_role("button", name="Load another model").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Model:").fill(str(models.third.folder))
    dialog.get_by_label("Flags of vLLM").fill(f"served_model_name={models.third.alias}\nmax_model_len=256")
    seen("dialog")
    dialog.get_by_role("button", name="Load", exact=True).click()
    row = page.locator("#models tr").filter(has=page.get_by_role("button", name=f"Details: {models.third.alias}"))
    bar = row.get_by_role("progressbar")
    expect(bar).to_be_visible()
    progress = {int(bar.get_attribute("aria-valuenow") or 0)}
    expect(row).to_contain_text(re.compile("initializing|loading weights|sizing the cache|warming up"))
    progress.add(int(bar.get_attribute("aria-valuenow") or 0))
    seen("loading")
    expect(row.locator("span.state")).to_have_text("ready")
    assert len(progress) > 1 and max(progress) < 100

    page.get_by_role("button", name=f"Chat: {models.third.alias}").click()
    page.locator("#play-max").fill("24")
    page.locator("#prompt").fill("A small model")
    page.keyboard.press("Enter")
    figures = page.locator("article.model .figures")
    expect(figures).to_contain_text("24 tokens")
    assert len((page.locator("article.model .said").text_content() or "").split()) > 4
    shown = figures.text_content()
    seen("playground")

    page.get_by_role("link", name="Overview").click()
    expect(page.locator("#charts .chart .value").first).not_to_have_text("0")     # the sample after it
    seen("overview")
    page.get_by_role("button", name=f"Log: {models.third.alias}").click()
    expect(page.locator("#log")).to_contain_text("Application startup complete")
    page.locator("#log-search").fill("loading weights took")
    expect(page.locator("#log mark").first).to_be_visible()
    seen("log")

    page.get_by_role("link", name="Overview").click()
    page.get_by_role("button", name=f"Stop: {models.third.alias}").click()
    dialog.get_by_role("button", name="Stop").click()
    expect(row).to_have_count(0)
    return shown
