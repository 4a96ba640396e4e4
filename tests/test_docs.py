"""README, in both languages, says what is there: settings, routes, failure codes, targets, and lines that work."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest

import app
import config
import errors
from configuration.config_file import SECTIONS
from configuration.schema import schema
from instance_manager import FIXED
from instances import launcher
from instances.instance import State
from instances.startup_log import CAUSES
from scripts import make_docs
from tests.daemon import CHECKOUT
from tests.demo_run import DemoRun, shell
from tests.support import wait_until

READMES = {name: (CHECKOUT / name).read_text() for name in ("README.md", "README_zh.md")}
SETTINGS_TITLES = ("Settings", "配置")
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "ANY")
each_readme = pytest.mark.parametrize("readme", READMES.values(), ids=READMES.keys())


def rows(readme: str) -> dict[str, list[str]]:
    """First cell, a single name in backticks -> the other cells, of all tables."""
    found = re.findall(r"^\| `([^`]+)` \|(.*)\|$", readme, re.MULTILINE)
    return {name: [cell.strip() for cell in rest.split("|")] for name, rest in found}


def code_blocks(readme: str) -> list[tuple[str, str]]:
    """(language, code); comments may be translated."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    return [(language, re.sub(r" +# .*$", "", code, flags=re.MULTILINE)) for language, code in found]


def section(readme: str, title: str) -> str:
    """A chapter with its sub-chapters."""
    return re.split(r"^## ", readme.split(f"\n## {title}\n")[1], flags=re.MULTILINE)[0]


# --- what is listed ---------------------------------------------------------------------------------------------------

@each_readme
def test_every_setting_stands_there_with_its_default(readme: str) -> None:
    table = rows(readme)
    for setting in config.SETTINGS:
        default, text = table[setting.name]
        assert default == f"`{setting.default}`", setting.name
        assert all(f"`{name}`" in text for name in setting.older), setting.name


@each_readme
def test_every_key_of_a_model_stands_there(readme: str) -> None:
    keys = schema()["definitions"]["model"]["properties"].keys() - {"max_model_len"}
    assert keys <= rows(section(readme, SETTINGS_TITLES[readme is READMES["README_zh.md"]])).keys()
    assert all(re.search(rf"`{key}`\s*[(（]`{name}`", readme) for (_, key), name in SECTIONS.items())


@each_readme
def test_what_a_reload_leaves_stands_there(readme: str) -> None:
    [sentence] = re.findall(r"^(?:A reload cannot|以下配置不能)(.*?)\n\n", readme, re.MULTILINE | re.DOTALL)
    fixed = {setting.name for setting in config.SETTINGS if setting.field in FIXED}
    assert set(re.findall(r"`([A-Z_]+)`", sentence)) == fixed


@each_readme
def test_every_route_stands_there_and_no_other(readme: str) -> None:
    listed = re.findall(rf"`((?:{'|'.join(METHODS)}) /[^`]*)`", section(readme, "API"))
    assert set(listed) == routes()


def routes() -> set[str]:
    """`METHOD /path` of everything that the daemon serves."""
    manager = MagicMock()
    manager.settings.command = ("vllm",)
    served = app.create_app(app.Deps(manager, MagicMock(), None, MagicMock(), MagicMock()))
    found: dict[str, set[str]] = {}
    for rule in served.url_map.iter_rules():
        if not rule.defaults:       # else it is another one without its end
            path = re.sub(r"<\w+:", "<", rule.rule)
            found.setdefault(path, set()).update((rule.methods or set()) - {"HEAD", "OPTIONS"})
    return {f"{method}{path}" for path, methods in found.items()
            for method in (["ANY "] if len(methods) == 5 else [f"{method} " for method in methods])}


@each_readme
def test_every_failure_code_stands_there_with_its_status(readme: str) -> None:
    table = rows(readme)
    again = {True: ("no", "否"), False: ("yes", "是")}
    for cause in CAUSES:
        status, repeated, _ = table[cause.code]
        assert int(status) == cause.status, cause.code
        assert repeated in again[cause.permanent], cause.code
    assert other_codes() <= table.keys()


def other_codes() -> set[str]:
    """What else `last_error.code` may be: problems that the source makes, and errors before the engine runs."""
    made = {"not_enough_gpus", errors.NoRoom.code, errors.NoFreePort.code, launcher.LaunchError.code,
            launcher.LaunchRefused.code}
    for path in (CHECKOUT / "instances").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("Problem", "Cause"):
                made |= {str(word.value) for word in node.args[:1] if isinstance(word, ast.Constant)}
    assert {"start_timeout", "engine_hung", "exited"} <= made       # else this test has lost its sight
    return made


@each_readme
def test_every_state_and_every_target_stands_there(readme: str) -> None:
    assert {str(state) for state in State if state is not State.STOPPED} <= rows(readme).keys()
    phony = re.findall(r"^\.PHONY: (.*)$", (CHECKOUT / "Makefile").read_text(), re.MULTILINE)[0].split()
    assert {name for name in rows(readme) if name.startswith("make ")} == {f"make {name}" for name in phony}


@pytest.mark.parametrize("path", sorted(make_docs.documents()), ids=lambda path: path.name)
def test_what_is_written_from_the_code_is_up_to_date(path: Path) -> None:
    assert path.read_text() == make_docs.documents()[path], ".venv/bin/python -m scripts.make_docs writes it anew"


def test_both_languages_show_the_same_code() -> None:
    assert code_blocks(READMES["README.md"]) == code_blocks(READMES["README_zh.md"])


DOCUMENTS = sorted(str(path.relative_to(CHECKOUT)) for path in (*CHECKOUT.glob("*.md"), *CHECKOUT.glob("docs/*.md"),
                                                                *CHECKOUT.glob("client/*.md")))


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCUMENTS)
def test_links_lead_somewhere(path: str) -> None:
    text = (CHECKOUT / path).read_text()
    links = re.findall(r"\]\(([^):]+)\)", text) + re.findall(r'href="(\./[^"]+)"', text)
    for link in links:
        file, _, anchor = link.partition("#")
        target = (CHECKOUT / path).parent / file if file else CHECKOUT / path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


@each_readme
def test_the_named_parts_exist(readme: str) -> None:
    [tree] = [code for language, code in code_blocks(readme) if "instance_manager.py" in code]
    names = [line.split()[0] for line in tree.splitlines()]
    assert [name for name in names if not (CHECKOUT / name).exists()] == []
    assert {path.name for path in CHECKOUT.glob("*.py")} <= set(names)


# --- what is said to work ---------------------------------------------------------------------------------------------

def test_its_lines_work_as_printed_in_order(tmp_path: Path) -> None:
    """Against the simulated engine; only the port differs, and where .venv lies."""
    with DemoRun(tmp_path, "--demo") as demo:
        demo.wait_for("serving on")
        python = Path(sys.executable)
        env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "VLLM_SERVER_CACHE": str(tmp_path / "cache")}

        def here(code: str) -> str:
            return code.replace("localhost:5000", f"localhost:{demo.port}").replace(".venv/bin/python", str(python))

        readme = READMES["README.md"]
        for language, code in code_blocks(section(readme, "Try it")):
            if language == "bash":
                # -f: an HTTP error is a failure.
                output = shell(here(code).replace("curl ", "curl -fsS "), env, CHECKOUT)
                assert '"error"' not in output.replace('"error":null', ""), output
            else:
                done = subprocess.run([python, "-c", here(code)], text=True, capture_output=True, timeout=120)
                assert done.stdout.count("simulated") == 2, done.stderr
        [knobs] = [code for _, code in code_blocks(section(readme, "Development")) if code.startswith("curl")]
        shell(here(knobs.partition("\nSIMULATOR")[0]).replace("curl ", "curl -fsS "), env)
        assert {"demo", "Qwen/Qwen3-0.6B", "facebook/opt-125m", "slow-model"} <= names(demo)
        wait_until(lambda: "bert" not in names(demo))       # deleted in between


def names(demo: DemoRun) -> set[str]:
    return {name for view in demo.instances() for name in (view["model_name"], *view["aliases"])}
