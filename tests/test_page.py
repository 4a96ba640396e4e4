"""The page's files: open to everyone, guarded by headers, complete in both languages.  In a browser: tests/browser."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from instances.instance import State
from instances.startup_log import PHASES
from tests.daemon import CHECKOUT, Daemon

FOLDER = CHECKOUT / "web" / "dashboard"
INDEX = (FOLDER / "index.html").read_text()
SCRIPTS = {path.name: path.read_text() for path in FOLDER.glob("*.js")}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("page"), {"API_KEYS": "user-key", "ADMIN_API_KEYS": "admin-key"}) as running:
        yield running


def test_the_page_is_open_and_its_data_are_not(daemon: Daemon) -> None:
    answer = daemon.get("/")
    assert answer.status == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    parts = re.findall(r'(?:src|href)="(/dashboard/[^"]+)"', INDEX)
    parts += [f"/dashboard/{name}" for text in SCRIPTS.values() for name in re.findall(r"from '\./([^']+)'", text)]
    assert len(parts) > 10
    for part in set(parts):
        assert daemon.get(part).status == 200, part
    for path in ("/instances", "/admin/history", "/v1/models"):
        assert daemon.get(path).status == 401


def test_scripts_and_styles_have_their_types_and_are_not_sent_twice(daemon: Daemon) -> None:
    for name, kind in (("app.js", "text/javascript"), ("style.css", "text/css"), ("icon.svg", "image/svg+xml")):
        answer = daemon.get(f"/dashboard/{name}")
        assert answer.headers["content-type"].startswith(kind)
        again = daemon.get(f"/dashboard/{name}", {"If-None-Match": answer.headers["etag"]})
        assert again.status == 304 and not again.body


def test_its_headers_forbid_what_it_does_not_need(daemon: Daemon) -> None:
    for path in ("/", "/dashboard/app.js"):
        headers = daemon.get(path).headers
        policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == "'self'" and "unsafe" not in str(policy)
        assert policy["require-trusted-types-for"] == "'script'"
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("path", ["/dashboard/none.js", "/dashboard/..%2fpage.py", "/dashboard/x.py", "/dashboard/"])
def test_nothing_else_is_served(daemon: Daemon, path: str) -> None:
    answer = daemon.get(path, {"Authorization": "Bearer user-key"})
    assert answer.status == 404 and answer.error["code"] == "route_not_found"


def test_nothing_is_inline_and_nothing_comes_from_elsewhere() -> None:
    assert not re.findall(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", INDEX)
    for name, text in {"index.html": INDEX, **SCRIPTS, "style.css": (FOLDER / "style.css").read_text()}.items():
        found = set(re.findall(r"https?://[^\s'\"]+", text)) - {"http://www.w3.org/2000/svg"}
        assert not found, (name, found)


def test_nothing_from_the_api_becomes_markup() -> None:
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function"
    for name, text in SCRIPTS.items():
        assert not re.search(forbidden, text), name


def texts(language: str) -> dict[str, str]:
    block = SCRIPTS["texts.js"].split(f"const {language} = {{")[1].split("\n};")[0]
    return {key: (first or second) for key, first, second in
            re.findall(r"(\w+): (?:'((?:[^'\\]|\\.)*)'|\"([^\"]*)\")", block)}


def test_both_languages_have_the_same_words_with_the_same_gaps() -> None:
    english, chinese = texts("EN"), texts("ZH")
    assert len(english) > 150 and english.keys() == chinese.keys()
    for key, text in english.items():
        assert set(re.findall(r"\{\w+\}", text)) == set(re.findall(r"\{\w+\}", chinese[key])), key


def test_every_word_that_is_asked_for_is_there() -> None:
    asked = set(re.findall(r'data-t(?:-label|-placeholder)?="(\w+)"', INDEX))
    for text in SCRIPTS.values():
        asked |= set(re.findall(r"\bt\('(\w+)'", text))
    assert len(asked) > 100 and asked <= texts("EN").keys()


def test_states_and_phases_have_words() -> None:
    assert {str(state) for state in State} | set(PHASES) <= texts("EN").keys()


def test_the_files_are_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 120_000
