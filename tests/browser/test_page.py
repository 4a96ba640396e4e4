"""The page in Chromium, with the daemon and simulated engines: what a person does with it, with keys and without."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.browser.chromium import DESK, HANG_MS, PHONE, axe_source, enter, serious_violations
from tests.browser.conftest import Open
from tests.daemon import Daemon
from tests.gpu_box import GpuBox, needs_compiler
from tests.stub_server import StubServer
from tests.support import wait_until
from tests.test_servers import servers_toml

expect.set_options(timeout=HANG_MS)

KEYS = {"API_KEYS": "bob:user-key", "ADMIN_API_KEYS": "root:admin-key"}
UNAUTHORIZED = ("status of 401",)
EVIL = "<img src=x onerror=alert(1)>"
CONFIG = {"models": {
    "chat": {"model_path": "org/chat", "sleep": 1, "params": {"additional_config": {"sim": {"start_s": 3.0}}}},
    "broken": {"model_path": "org/broken", "params": {"additional_config": {"sim": {"fail": "kv_cache_too_small"}}}},
    "idle": {"model_path": "org/idle"}}}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("page")
    (folder / "config.yaml").write_text(json.dumps(CONFIG))
    with Daemon(folder, {"ALLOW_UNSAFE_PARAMS": "true"}, patch={"web.figures.EVERY_S": 0.5}) as running:
        yield running
        running.remove()


@pytest.fixture(autouse=True)
def nothing_loaded(daemon: Daemon) -> Iterator[None]:
    yield
    daemon.remove()


def row(page: Page, model: str) -> Locator:
    """Of the table of models; its first button has the model's name."""
    named = page.get_by_role("button", name=re.compile(rf"(^|: ){re.escape(model)}$"))
    return page.locator("#models tr").filter(has=named)


def action(page: Page, name: str, model: str) -> None:
    page.get_by_role("button", name=f"{name}: {model}", exact=True).click()


def load(page: Page, model: str) -> None:
    action(page, "Load", model)
    expect(row(page, model).locator(".state").last).to_have_text("ready")


# --- the life of a model ----------------------------------------------------------------------------------------------

def test_a_model_is_loaded_talked_to_looked_into_and_stopped(daemon: Daemon, open_page: Open) -> None:
    page = open_page(daemon).page
    expect(page.locator("#link-text")).to_have_text("Live")
    action(page, "Load", "chat")
    bar = row(page, "chat").get_by_role("progressbar")
    expect(bar).to_be_visible()
    expect(row(page, "chat")).to_contain_text("loading weights")
    assert 0 < int(bar.get_attribute("aria-valuenow") or 0) < 100
    expect(row(page, "chat").locator("span.state")).to_have_text("ready")

    action(page, "Chat", "chat")
    expect(page.locator("#play-model")).to_have_value("chat")
    page.locator("#play-max").fill("30")
    page.locator("#prompt").fill("Hello")
    page.keyboard.press("Enter")
    answer = page.locator("article.model")
    expect(answer.locator(".figures")).to_have_text(re.compile(r"first token .*\d.* tokens/s · 30 tokens"))
    assert len((answer.locator(".said").text_content() or "").split()) > 20

    page.get_by_role("link", name="Overview").click()
    expect(page.locator("#charts .chart .value").first).not_to_have_text("0")
    action(page, "Log", "chat")
    expect(page.locator("#log")).to_contain_text("Application startup complete")
    page.locator("#log-search").fill("startup")
    expect(page.locator("#log mark").first).to_have_text(re.compile("startup", re.IGNORECASE))
    page.get_by_label("Only matches").check()
    assert all("startup" in one.lower() for one in page.locator("#log .line").all_text_contents())
    before = page.locator("#log-about").text_content()
    page.get_by_label("Only matches").uncheck()
    daemon.post("/v1/completions", {"model": "chat", "prompt": "x", "max_tokens": 1})
    expect(page.locator("#log-about")).not_to_have_text(before or "")       # it follows

    page.get_by_role("link", name="Activity").click()
    expect(page.locator("#requests tr").first).to_contain_text("chat")
    expect(page.locator("#events")).to_contain_text("chat: loading → ready")

    page.get_by_role("link", name="Overview").click()
    action(page, "Stop", "chat")
    expect(page.get_by_role("dialog")).to_contain_text("Stop chat?")
    page.get_by_role("dialog").get_by_role("button", name="Stop").click()
    expect(row(page, "chat").locator("span.state")).to_have_text("not loaded")
    assert daemon.instances() == []


def test_it_sleeps_and_wakes(daemon: Daemon, open_page: Open) -> None:
    page = open_page(daemon).page
    load(page, "chat")
    action(page, "Sleep", "chat")
    expect(row(page, "chat").locator("span.state")).to_have_text("asleep")
    action(page, "Wake", "chat")
    expect(row(page, "chat").locator("span.state")).to_have_text("ready")


def test_a_failed_load_tells_its_cause(daemon: Daemon, open_page: Open) -> None:
    page = open_page(daemon).page
    action(page, "Load", "broken")
    expect(row(page, "broken").locator("span.state")).to_have_text("failed")
    expect(row(page, "broken")).to_contain_text("KV cache")
    page.get_by_role("button", name="Details: broken").click()
    expect(page.get_by_role("dialog")).to_contain_text("Last error")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    action(page, "Dismiss", "broken")
    expect(row(page, "broken").locator("span.state")).to_have_text("not loaded")


def test_any_model_can_be_loaded_with_flags(daemon: Daemon, open_page: Open) -> None:
    page = open_page(daemon).page
    page.get_by_role("button", name="Load another model").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Model:").fill("org/other")
    dialog.get_by_label("Flags of vLLM").fill("max_num_seqs = 7\nnonsense")
    dialog.get_by_role("button", name="Load", exact=True).click()
    expect(dialog.get_by_role("alert")).to_contain_text("nonsense")
    dialog.get_by_label("Flags of vLLM").fill("max_num_seqs = 7\nserved-model-name=other")
    dialog.get_by_role("button", name="Load", exact=True).click()
    expect(row(page, "other").locator("span.state")).to_have_text("ready")
    assert daemon.instances()[0]["params"] == {"max_num_seqs": 7, "served_model_name": "other"}


def test_stopping_one_in_use_says_so_and_does_not_cut(daemon: Daemon, open_page: Open) -> None:
    page = open_page(daemon).page
    load(page, "idle")
    with daemon.open("POST", "/v1/completions", {"model": "idle", "prompt": "x", "max_tokens": 2000, "stream": True}):
        expect(row(page, "idle")).to_contain_text("in use")
        action(page, "Stop", "idle")
        expect(page.get_by_role("dialog")).to_contain_text("One request is in it")
        page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
        expect(page.get_by_role("dialog")).to_have_count(0)
        assert daemon.instances()[0]["status"] == "ready"


@needs_compiler
def test_others_that_would_go_are_named_first(tmp_path: Path, open_page: Open) -> None:
    config = {"models": {name: {"model_path": f"org/{name}", "memory_mb": 50 * 1024} for name in ("alpha", "beta")}}
    with GpuBox(tmp_path, [80.0], config=config) as box:
        page = open_page(box.daemon).page
        load(page, "alpha")
        expect(page.locator(".memory-bar")).to_have_attribute("aria-label", re.compile(r"GPU 0: alpha \d"))
        wait_until(lambda: box.daemon.get("/admin/models/beta/plan").json["fits"])      # alpha counts as idle by then
        action(page, "Load", "beta")
        expect(page.get_by_role("dialog")).to_contain_text("alpha: is stopped")
        page.get_by_role("dialog").get_by_role("button", name="Load", exact=True).click()
        expect(row(page, "beta").locator("span.state")).to_have_text("ready")
        expect(row(page, "alpha").locator("span.state")).to_have_text("not loaded")
        box.daemon.remove()


def test_what_an_api_says_is_only_text(daemon: Daemon, open_page: Open) -> None:
    page = open_page(daemon).page
    page.on("dialog", lambda dialog: pytest.fail(f"a script ran: {dialog.message}"))
    daemon.create("org/evil", params={"served_model_name": EVIL})
    expect(row(page, EVIL).locator("span.state")).to_have_text("ready")
    action(page, "Chat", EVIL)
    page.locator("#prompt").fill(EVIL)
    page.keyboard.press("Enter")
    expect(page.locator("article.user .said")).to_have_text(EVIL)
    expect(page.locator("article.model .figures")).to_be_visible()
    for view in ("Activity", "Logs", "Overview"):
        page.get_by_role("link", name=view).click()
        expect(page.locator(f"#{view.lower()}")).to_contain_text(EVIL)
    assert page.locator("main img").count() == 0


def test_a_chat_that_fails_says_why_and_can_be_repeated(daemon: Daemon, open_page: Open) -> None:
    page = open_page(daemon, "playground", allowed=("Failed to load resource",)).page
    page.locator("#play-model").select_option("broken")
    for _ in range(2):
        page.locator("#prompt").fill("Hello")
        page.get_by_role("button", name="Send").click()
        expect(page.get_by_role("button", name="Send")).to_be_enabled()
    expect(page.locator("article.model .error")).to_have_count(2)
    expect(page.locator("article.model .error").first).to_contain_text("KV cache")


def test_an_answer_can_be_stopped(daemon: Daemon, open_page: Open) -> None:
    daemon.create("org/long", params={"served_model_name": "long"})
    page = open_page(daemon, "playground").page
    page.locator("#play-model").select_option("long")
    page.locator("#play-max").fill("5000")
    page.locator("#prompt").fill("Hello")
    page.keyboard.press("Enter")
    expect(page.locator("article.model .said")).to_contain_text("token 9")
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(page.locator("article.model")).to_contain_text("stopped")
    expect(page.locator("article.model .figures")).to_contain_text("tokens/s")


def test_other_servers_are_shown_with_their_health(tmp_path: Path, open_page: Open) -> None:
    with StubServer("far", ("distant-model",)) as server, StubServer("gone", ("m",)) as gone:
        (tmp_path / "servers.toml").write_text(servers_toml([server, gone]))
        gone.stop()
        with Daemon(tmp_path, patch={"web.figures.EVERY_S": 0.5}) as daemon:
            page = open_page(daemon).page
            servers = page.locator("#servers tr")
            expect(servers).to_have_count(2)
            expect(servers.filter(has_text="distant-model").locator("span.state")).to_have_text("up")
            expect(page.locator("#servers-about")).to_have_text("1 of 2 up")
            page.get_by_role("link", name="Playground").click()
            expect(page.locator("#play-model")).to_contain_text("distant-model")


def test_where_management_is_for_the_machine_itself_the_page_says_so(daemon: Daemon, open_page: Open) -> None:
    def from_elsewhere(page: Page) -> None:
        page.set_extra_http_headers({"X-Forwarded-For": "203.0.113.9"})

    page = open_page(daemon, before=from_elsewhere, allowed=("status of 403",)).page
    expect(page.locator("#notices")).to_contain_text("ADMIN_API_KEYS")
    expect(page.get_by_role("dialog")).to_have_count(0)
    page.get_by_role("link", name="Playground").click()
    expect(page.locator("#play-model")).to_contain_text("chat")


# --- keys -------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "config.yaml").write_text(json.dumps(CONFIG))
    with Daemon(folder, KEYS) as running:
        yield running
        for one in running.get("/instances", {"Authorization": "Bearer admin-key"}).json["data"]:
            running.delete(f"/instances/{one['id']}?force=1&wait=1", {"Authorization": "Bearer admin-key"})


def test_a_key_is_asked_for_and_kept_for_this_tab_only(guarded: Daemon, open_page: Open) -> None:
    page = open_page(guarded, allowed=UNAUTHORIZED).page
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    enter(page, "wrong-key")
    expect(page.get_by_role("dialog").get_by_role("alert")).to_contain_text("needs an admin key")
    enter(page, "admin-key")
    expect(page.locator("#link-text")).to_have_text("Live")
    expect(row(page, "chat").locator("span.state")).to_have_text("not loaded")
    load(page, "chat")
    assert "admin-key" not in page.url and not any("admin-key" in url for url in asked)
    stored = "Object.values({store}).includes('admin-key')"
    assert page.evaluate(stored.format(store="localStorage")) is False
    assert page.evaluate(stored.format(store="sessionStorage")) is True
    assert page.evaluate("document.cookie") == ""
    page.reload()
    expect(row(page, "chat").locator("span.state")).to_have_text("ready")


def test_a_key_is_remembered_if_that_is_asked_for_and_forgotten_again(guarded: Daemon, open_page: Open) -> None:
    page = open_page(guarded, allowed=UNAUTHORIZED).page
    enter(page, "admin-key", keep=True)
    expect(page.locator("#link-text")).to_have_text("Live")
    assert page.evaluate("[Object.values(localStorage).includes('admin-key'), sessionStorage.length]") == [True, 0]
    page.get_by_role("button", name="Key", exact=True).click()
    page.get_by_role("button", name="Forget the key").click()
    expect(page.get_by_role("dialog")).to_be_visible()          # it asks again
    assert page.evaluate("Object.values(localStorage).includes('admin-key')") is False


def test_a_key_for_inference_may_chat_and_is_told_so(guarded: Daemon, open_page: Open) -> None:
    page = open_page(guarded, allowed=UNAUTHORIZED).page
    enter(page, "user-key")
    expect(page.locator("#notices")).to_contain_text("may chat, but not manage")
    expect(page.locator("#models tr")).to_have_count(0)
    page.get_by_role("link", name="Playground").click()
    page.locator("#play-model").select_option("idle")
    page.locator("#play-max").fill("5")
    page.locator("#prompt").fill("Hello")
    page.keyboard.press("Enter")
    expect(page.locator("article.model .figures")).to_contain_text("5 tokens")


# --- how it looks and reads -------------------------------------------------------------------------------------------

def test_events_that_do_not_come_are_asked_for(daemon: Daemon, open_page: Open) -> None:
    def block(page: Page) -> None:
        page.route("**/admin/events?follow=1", lambda route: route.abort())

    page = open_page(daemon, before=block, allowed=("ERR_FAILED",)).page
    expect(page.locator("#link-text")).to_have_text("Polling")
    daemon.create("org/seen", params={"served_model_name": "seen"})
    expect(row(page, "seen").locator("span.state")).to_have_text("ready")


def test_a_connection_that_dies_without_a_word_is_noticed(daemon: Daemon, open_page: Open) -> None:
    def hang(page: Page) -> None:
        page.clock.install()
        page.route("**/admin/events?follow=1", lambda route: None)

    page = open_page(daemon, before=hang).page
    expect(row(page, "chat").locator("span.state")).to_have_text("not loaded")

    def polls() -> bool:
        page.clock.fast_forward(40_000)
        return page.locator("#link-text").text_content() == "Polling"

    wait_until(polls)


def test_it_speaks_chinese_to_who_does_and_switches(daemon: Daemon, open_page: Open) -> None:
    page = open_page(daemon, language="zh-CN").page
    expect(page.get_by_role("link", name="试用")).to_be_visible()
    expect(page.locator("html")).to_have_attribute("lang", "zh-CN")
    expect(row(page, "chat").locator("span.state")).to_have_text("未加载")
    page.get_by_role("button", name="English").click()
    expect(row(page, "chat").locator("span.state")).to_have_text("not loaded")
    expect(page.locator("html")).to_have_attribute("lang", "en")
    page.reload()
    expect(page.get_by_role("link", name="Playground")).to_be_visible()


def test_the_theme_is_the_systems_until_one_is_chosen(daemon: Daemon, open_page: Open) -> None:
    page = open_page(daemon, dark=True).page
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.get_by_role("button", name="Theme: as the system").click()
    page.get_by_role("button", name="Theme: light").wait_for()
    light = page.evaluate(ground)
    assert dark != light
    page.reload()
    assert page.evaluate(ground) == light
    page.get_by_role("button", name="Theme: light").click()
    page.get_by_role("button", name="Theme: dark").wait_for()
    assert page.evaluate(ground) == dark


def test_it_works_without_a_mouse(daemon: Daemon, open_page: Open) -> None:
    page = open_page(daemon).page
    expect(row(page, "idle").locator("span.state")).to_have_text("not loaded")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
    page.keyboard.press("Enter")
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.getAttribute('aria-label')") == "Load: idle":
            break
    page.keyboard.press("Enter")
    expect(row(page, "idle").locator("span.state")).to_have_text("ready")
    stop = page.get_by_role("button", name="Stop: idle")
    stop.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(stop).to_be_focused()
    chart = page.locator(".frame").first
    chart.focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator(".tip").first).to_be_visible()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_axe_finds_nothing_serious(daemon: Daemon, open_page: Open, size: dict[str, int], dark: bool) -> None:
    source = axe_source()
    if source is None:
        pytest.skip("axe-core cannot be had here: it takes npm and its registry")
    daemon.post("/admin/models/broken/load", {"wait": True})
    daemon.create("org/seen", params={"served_model_name": "seen"})
    daemon.post("/v1/completions", {"model": "seen", "max_tokens": 5, "prompt": "x"})
    daemon.post("/v1/chat/completions", {"model": "nobody", "messages": []})
    page = open_page(daemon, size=size, dark=dark, bypass_csp=True).page
    expect(page.locator("#link-text")).to_have_text("Live")
    found: list[str] = []

    for view in ("overview", "playground", "logs", "activity"):
        page.locator(f"nav a[data-view={view}]").click()
        expect(page.locator(f"#{view}")).to_be_visible()
        if view == "logs":
            page.locator("#log .line").first.wait_for()
        if view == "activity":
            page.locator("#requests tr").first.wait_for()
        found += serious_violations(page, source, view)
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= size["width"], f"{view} is {width} pixels wide"
    page.locator("nav a[data-view=overview]").click()
    action(page, "Stop", "seen")
    page.get_by_role("dialog").wait_for()
    found += serious_violations(page, source, "dialog")
    assert found == []
