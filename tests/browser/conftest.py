"""One Chromium for all tests.  A page that complains in its console fails its test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from playwright.sync_api import Browser, Page

from tests.browser.chromium import DESK, HANG_MS, Complaints, chromium
from tests.daemon import Daemon


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@dataclass(frozen=True)
class Opened:
    page: Page
    complaints: Complaints


Open = Callable[..., Opened]


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """A page of a daemon, in a browser context of its own: no storage, no cookies of another test.

    `allowed`: parts of lines that its console may show.
    """
    opened: list[tuple[Opened, tuple[str, ...]]] = []

    def open_one(daemon: Daemon, view: str = "overview", *, size: dict[str, int] = DESK, dark: bool = False,
                 language: str = "en-US", allowed: tuple[str, ...] = (), before: Callable[[Page], None] | None = None,
                 bypass_csp: bool = False) -> Opened:
        context = browser.new_context(viewport=size, color_scheme="dark" if dark else "light",  # type: ignore[arg-type]
                                      locale=language, bypass_csp=bypass_csp, reduced_motion="reduce")
        context.set_default_timeout(HANG_MS)
        page = context.new_page()
        made = Opened(page, Complaints(page))
        opened.append((made, allowed))
        if before is not None:
            before(page)
        page.goto(f"http://127.0.0.1:{daemon.port}/#/{view}")
        return made

    yield open_one
    for one, allowed in opened:
        found = one.complaints.beside(*allowed)
        one.page.context.close()
        assert found == []
