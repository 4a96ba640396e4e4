"""docs/API.md and docs/CONFIGURATION.md, in both languages: the same, complete, and their examples run.

That they are up to date is looked at in test_docs.py.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from configuration.schema import schema
from configuration.servers import CONFIG_KEYS, SERVER_KEYS
from configuration.settings_table import SETTINGS
from scripts import doc_words, make_docs
from tests.daemon import CHECKOUT
from tests.demo_run import DemoRun, shell
from tests.test_docs import code_blocks, routes
from web.openapi_routes import ROUTES


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    return {path.name: text for path, text in make_docs.documents().items()}


@pytest.mark.parametrize("name", ["API.md", "API_zh.md"])
def test_every_route_and_every_code_stands_there(name: str, made: dict[str, str]) -> None:
    reference = make_docs.MARKS.search(made[name])
    assert reference is not None
    assert set(re.findall(r"`((?:GET|POST|PUT|PATCH|DELETE|ANY) /[^`]*)`", reference[0])) == routes()
    for route in ROUTES:
        for what in route.errors.values():
            assert all(code in reference[0] for code in re.findall(r"`[a-z]+_[a-z_]+`", what)), route.call


@pytest.mark.parametrize("name", ["CONFIGURATION.md", "CONFIGURATION_zh.md"])
def test_every_setting_and_key_stands_there(name: str, made: dict[str, str]) -> None:
    listed = set(re.findall(r"^\| `([^`]+)` \|", made[name], re.MULTILINE))
    definitions = schema()["definitions"]
    keys = {*definitions["model"]["properties"], *definitions["key"]["properties"], *SERVER_KEYS, *CONFIG_KEYS,
            *schema()["properties"]["gpu"]["properties"], *schema()["properties"]["proxy"]["properties"]}
    assert {setting.name for setting in SETTINGS} | keys <= listed


@pytest.mark.parametrize("name", ["API", "CONFIGURATION"])
def test_both_languages_say_the_same(name: str) -> None:
    english, chinese = (make_docs.named(name, language).read_text() for language in make_docs.LANGUAGES)
    assert code_blocks(english) == code_blocks(chinese)
    assert re.findall(r"^#+ ", english, re.MULTILINE) == re.findall(r"^#+ ", chinese, re.MULTILINE)
    first = re.compile(r"^\| (`[^|]+`) \|", re.MULTILINE)
    assert first.findall(english) == first.findall(chinese)


def test_what_is_not_translated_is_named() -> None:
    with pytest.raises(doc_words.NoChinese, match="docs_zh.yaml"):
        doc_words.told("Nobody has translated this", "zh")


@pytest.mark.whole
def test_the_examples_run_as_printed(tmp_path: Path) -> None:
    """Against the simulated engine, in order; only the port differs."""
    with DemoRun(tmp_path, "--demo") as demo:
        demo.wait_for("serving on")
        env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
        blocks = [code for language, code in code_blocks((CHECKOUT / "docs/API.md").read_text()) if language == "bash"]
        first, *others = [code.replace("localhost:5000", f"localhost:{demo.port}") for code in blocks]
        assert '"code":"model_not_found"' in shell(first, env, CHECKOUT)
        for code in others:
            output = shell(code.replace("curl ", "curl -fsS "), env, CHECKOUT)
            assert '"error":{' not in output
