"""The command `vllm-server` against the daemon with the simulated engine: what it prints, and its exit codes."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from tests.command import OnTerminal, environment, vllm_server
from tests.daemon import HANG_S, Daemon, with_knobs
from tests.support import wait_until
from tests.test_docs import READMES, rows
from vllm_server_client import (
    ConnectionFailed,
    NotFound,
    ServerError,
    TimedOut,
    TooManyRequests,
    VLLMProxyError,
)
from vllm_server_client.cli import find, models, words
from vllm_server_client.cli.exits import MEANINGS, Exit, exit_code
from vllm_server_client.cli.main import cli

pytestmark = pytest.mark.whole

ESCAPE = "\x1b["
KEYS = {"API_KEYS": "user-key", "ADMIN_API_KEYS": "admin-key"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("command")) as daemon:
        yield daemon


@pytest.fixture
def daemon(server: Daemon) -> Iterator[Daemon]:
    """One for all tests, empty at the beginning of each."""
    yield server
    server.remove()


@pytest.fixture
def demo(daemon: Daemon) -> dict[str, Any]:
    return daemon.create("org/tiny", params={"served_model_name": "demo"})


def sim(**knobs: object) -> list[str]:
    return ["-p", f"additional_config={json.dumps({'sim': knobs})}"]


# --- what it shows ----------------------------------------------------------------------------------------------------

def test_ps_shows_instances_and_json_is_the_apis(daemon: Daemon, demo: dict[str, Any]) -> None:
    shown = vllm_server(daemon, "ps")
    assert shown.code == 0 and shown.err == "" and ESCAPE not in shown.out
    header, line = shown.out.splitlines()
    assert header.split()[:3] == ["id", "model", "state"]
    assert line.split()[:3] == [demo["id"], "demo", "ready"]
    [one] = vllm_server(daemon, "ps", "--json").json
    assert one["id"] == demo["id"] and one.keys() == demo.keys()
    assert vllm_server(daemon, "--json", "ps").json[0]["id"] == demo["id"]


def test_an_empty_list_says_what_to_do(daemon: Daemon) -> None:
    assert "vllm-server load" in vllm_server(daemon, "ps").out
    assert vllm_server(daemon, "ps", "--json").json == []
    assert "vllm-server load" in vllm_server(daemon, "models").out
    assert vllm_server(daemon, "stop", "--all").out == "nothing to stop\n"


def test_models_and_devices_are_listed(daemon: Daemon, demo: dict[str, Any]) -> None:
    assert "demo" in vllm_server(daemon, "models").out
    assert {one["id"] for one in vllm_server(daemon, "models", "--json").json} == {"demo", "org/tiny"}
    assert demo["id"] in vllm_server(daemon, "gpus").out
    assert vllm_server(daemon, "gpus", "--json").json["data"][0]["instances"] == [demo["id"]]


def test_colours_are_for_terminals_only(daemon: Daemon, demo: dict[str, Any]) -> None:
    with OnTerminal(daemon, "ps") as terminal:
        assert terminal.wait() == 0
    assert f"{ESCAPE}32mready" in terminal.screen and "demo" in terminal.text
    with OnTerminal(daemon, "ps", NO_COLOR="1") as terminal:
        assert terminal.wait() == 0
    assert "32m" not in terminal.screen


def test_a_narrow_terminal_cuts_the_models_name_and_nothing_else(daemon: Daemon) -> None:
    one = daemon.create("organisation/" + "long-name-of-a-model-" * 4)
    with OnTerminal(daemon, "ps", columns=70) as terminal:
        assert terminal.wait() == 0
    line = next(line for line in terminal.text.splitlines() if one["id"] in line)
    assert len(line) <= 70 and "…" in line and "ready" in line


# --- load and stop ----------------------------------------------------------------------------------------------------

def test_load_waits_and_tells_each_phase(daemon: Daemon) -> None:
    done = vllm_server(daemon, "load", "org/slow", *sim(start_s=1), "--idle-timeout", "60")
    assert done.code == 0 and "ready" in done.out
    assert len(done.err.splitlines()) > 1 and all(line.startswith("org/slow: ") for line in done.err.splitlines())
    [one] = daemon.instances()
    assert one["status"] == "ready" and one["timeout"] == 60


def test_load_shows_a_bar_on_a_terminal(daemon: Daemon) -> None:
    with OnTerminal(daemon, "load", "org/slow", *sim(start_s=8)) as terminal:
        terminal.wait_for("org/slow: loading weights")
        terminal.wait_for("%")
        terminal.type("\x03")
        assert terminal.wait() == Exit.INTERRUPTED
    assert "━" in terminal.text
    with OnTerminal(daemon, "load", "org/quick") as terminal:
        assert terminal.wait() == 0
    assert "ready" in terminal.text


def test_load_tells_how_long_it_takes_as_a_rule(daemon: Daemon) -> None:
    daemon.remove(daemon.create("org/known", sim={"start_s": 1})["id"])
    with OnTerminal(daemon, "load", "org/known", *sim(start_s=1), columns=120) as terminal:
        assert terminal.wait() == 0
    assert re.search(r"\d+ s of about \d+ s", terminal.text)


def test_load_can_be_told_not_to_wait(daemon: Daemon) -> None:
    done = vllm_server(daemon, "load", "org/slow", "--no-wait", "--json", *sim(start_s=60))
    assert done.code == 0 and done.json["status"] == "starting" and done.err == ""
    waited = vllm_server(daemon, "load", "org/slow", "--timeout", "0.1", *sim(start_s=60))
    assert waited.code == Exit.TIMED_OUT and "it goes on" in waited.err


def test_a_model_that_does_not_load_is_told_with_its_cause(daemon: Daemon) -> None:
    done = vllm_server(daemon, "load", "org/bad", *sim(fail="length_too_large"))
    assert done.code == Exit.LOAD_FAILED and done.out == ""
    assert "max_model_len" in done.err and "vllm-server logs" in done.err
    again = vllm_server(daemon, "load", "org/bad", "--json", *sim(fail="length_too_large"))
    assert again.code == Exit.LOAD_FAILED and again.error["code"] == "max_model_len_too_large"
    assert "max_model_len" in vllm_server(daemon, "ps").out


def test_a_load_that_is_stopped_meanwhile_ends(daemon: Daemon) -> None:
    with OnTerminal(daemon, "load", "org/slow", *sim(start_s=60)) as terminal:
        terminal.wait_for("org/slow: ")
        daemon.remove()
        assert terminal.wait() == Exit.LOAD_FAILED
    assert "was stopped before it was ready" in " ".join(terminal.text.split())


def test_flags_replace_and_new_go_along(daemon: Daemon) -> None:
    assert vllm_server(daemon, "load", "org/tiny", "-p", "max_model_len=4096").code == 0
    assert daemon.instances()[0]["params"] == {"max_model_len": 4096}
    other = vllm_server(daemon, "load", "org/tiny", "-p", "max_model_len=2048")
    assert other.code == Exit.FAILED and "replace" in other.err
    assert vllm_server(daemon, "load", "org/tiny", "-p", "max_model_len=2048", "--replace").code == 0
    wait_until(lambda: len(daemon.instances()) == 1)
    assert vllm_server(daemon, "load", "org/tiny", "--new").code == 0
    assert len(daemon.instances()) == 2
    two = vllm_server(daemon, "logs", "org/tiny")
    assert two.code == Exit.FAILED and "has 2 instances" in two.err
    assert vllm_server(daemon, "stop", "org/tiny", "--json").json[1]["status"] == "stopped"
    assert daemon.instances() == []


def test_stop_takes_ids_their_beginnings_and_all(daemon: Daemon) -> None:
    first, second, third = (daemon.create(f"org/{name}") for name in ("a", "b", "c"))
    done = vllm_server(daemon, "stop", first["id"], second["id"][:6])
    assert done.code == 0 and done.out.count("stopped") == 2
    assert [one["id"] for one in daemon.instances()] == [third["id"]]
    missing = vllm_server(daemon, "stop", "nobody")
    assert missing.code == Exit.NOT_FOUND and third["id"] in missing.err
    assert vllm_server(daemon, "stop").code == Exit.USAGE
    assert vllm_server(daemon, "stop", "--all", "--no-wait", "--force").code == 0
    wait_until(lambda: daemon.instances() == [])


def test_stop_lets_requests_finish_unless_it_is_forced(daemon: Daemon, demo: dict[str, Any]) -> None:
    body = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 60, "stream": True}
    with daemon.open("POST", "/v1/chat/completions", body) as stream:
        stream.readline()
        assert vllm_server(daemon, "stop", "demo").code == 0
        assert b"[DONE]" in stream.read()


# --- logs and chat ----------------------------------------------------------------------------------------------------

def test_logs_end_with_the_last_lines_or_follow(daemon: Daemon, demo: dict[str, Any]) -> None:
    done = vllm_server(daemon, "logs", "demo", "-n", "5")
    assert done.code == 0 and len(done.out.splitlines()) == 5
    as_json = vllm_server(daemon, "logs", "demo", "-n", "5", "--json")
    lines = [json.loads(line) for line in as_json.out.splitlines()]     # a line may have come in between
    assert len(lines) == 5 and set(lines) & set(done.out.splitlines())
    with OnTerminal(daemon, "logs", "-f", "demo") as terminal:
        terminal.wait_for("Application startup complete")
        daemon.post("/v1/chat/completions", {"model": "demo", "messages": [], "max_tokens": 1})
        terminal.wait_for("POST /v1/chat/completions")
        terminal.type("\x03")
        assert terminal.wait() == Exit.INTERRUPTED


def test_a_reader_that_has_seen_enough_is_no_error(daemon: Daemon, demo: dict[str, Any]) -> None:
    command = "python -W error -m vllm_server_client logs -f demo | head -n 1; echo ${PIPESTATUS[0]}"
    for _ in range(40):     # more than a pipe's buffer holds is not there: the follower learns it at its next line
        daemon.get(f"/proxy/{demo['id']}/v1/models")
    with subprocess.Popen(["bash", "-c", command.replace("python", _python())], env=environment(daemon), text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_until(lambda: process.poll() is not None or not daemon.get(f"/proxy/{demo['id']}/v1/models").body)
        out, err = process.communicate(timeout=HANG_S)
    assert out.splitlines()[-1] == "0" and err == ""


def _python() -> str:
    import sys
    return sys.executable


def test_chat_answers_a_question_from_the_line_or_a_pipe(daemon: Daemon, demo: dict[str, Any]) -> None:
    done = vllm_server(daemon, "chat", "demo", "Hello", "you", "-m", "5", "-t", "0", "--stats")
    assert done.code == 0 and done.out.startswith("simulated") and done.out.endswith("\n")
    assert "5 tokens" in done.err
    assert vllm_server(daemon, "chat", "demo", "-m", "5", stdin="Hello").out == done.out
    whole = vllm_server(daemon, "chat", "demo", "Hello", "-m", "5", "--json").json
    assert whole["usage"]["completion_tokens"] == 5
    nothing = vllm_server(daemon, "chat", "demo")
    assert nothing.code == Exit.USAGE and "there is no question" in nothing.err


def test_chat_is_a_talk_on_a_terminal(daemon: Daemon, demo: dict[str, Any]) -> None:
    with OnTerminal(daemon, "chat", "demo", "-m", "30000", "-s", "Be brief") as terminal:
        terminal.wait_for(">>> ")
        terminal.type("Hello\n")
        terminal.wait_for("simulated")
        terminal.type("\x03")               # ends the answer, not the talk
        terminal.wait_for("(ended)")
        wait_until(lambda: daemon.gauge(demo) == 0)
        terminal.type("/clear\n")
        terminal.wait_for(">>> ")
        terminal.type("\x04")
        assert terminal.wait() == 0


def test_chat_shows_how_far_a_model_is_that_loads(daemon: Daemon) -> None:
    daemon.create("org/slow", sim={"start_s": 2}, wait=False)
    done = vllm_server(daemon, "chat", "org/slow", "Hello", "-m", "5")
    assert done.code == 0 and "simulated" in done.out and done.err.startswith("org/slow: ")


# --- errors -----------------------------------------------------------------------------------------------------------

def test_no_server_is_told_with_its_address() -> None:
    done = vllm_server(None, "ps", "--url", "http://127.0.0.1:1")
    assert done.code == Exit.UNREACHABLE and "http://127.0.0.1:1" in done.err and done.out == ""
    as_json = vllm_server(None, "ps", "--url", "http://127.0.0.1:1", "--json")
    assert as_json.error["code"] == "unreachable" and as_json.out == ""


@pytest.mark.parametrize("words", [["ps", "--url", "nonsense"], ["nonsense"], ["load"], ["logs", "-n", "-1", "x"],
                                   ["load", "m", "-p", "nonsense"], ["chat", "m", "--json"], ["completion", "csh"]])
def test_a_wrong_command_line_is_told(words: list[str]) -> None:
    done = vllm_server(None, *words)
    assert done.code == Exit.USAGE and done.err and done.out == ""


def test_a_wrong_command_line_is_told_as_json_too() -> None:
    done = vllm_server(None, "load", "--json")
    assert done.code == Exit.USAGE and done.out == ""
    assert done.error["code"] == "usage" and "MODEL" in done.error["message"]
    assert vllm_server(None, "completion", "bash", "--json").json["shell"] == "bash"


def test_unknown_models_and_instances_have_a_code_of_their_own(daemon: Daemon) -> None:
    assert vllm_server(daemon, "chat", "nobody", "Hello").code == Exit.NOT_FOUND
    assert vllm_server(daemon, "logs", "nobody").code == Exit.NOT_FOUND


def test_keys_come_from_the_environment(tmp_path: Path) -> None:
    with Daemon(tmp_path, KEYS) as daemon:
        refused = vllm_server(daemon, "ps", env={"VLLM_SERVER_API_KEY": "user-key"})
        assert refused.code == Exit.REFUSED and "VLLM_SERVER_API_KEY" in refused.err
        assert vllm_server(daemon, "models").code == Exit.REFUSED
        assert vllm_server(daemon, "models", env={"VLLM_SERVER_API_KEY": "user-key"}).code == 0
        assert vllm_server(daemon, "ps", env={"VLLM_SERVER_API_KEY": "admin-key"}).code == 0


def test_who_may_only_ask_can_chat_with_a_model_that_loads(tmp_path: Path) -> None:
    with Daemon(tmp_path, KEYS) as daemon:
        daemon.post("/instances", {"model_name": "org/slow", "params": with_knobs(None, {"start_s": 1})},
                    {"Authorization": "Bearer admin-key"})
        done = vllm_server(daemon, "chat", "org/slow", "Hello", "-m", "5", env={"VLLM_SERVER_API_KEY": "user-key"})
        assert done.code == 0 and "simulated" in done.out


# --- the server -------------------------------------------------------------------------------------------------------

def test_health_and_reload(daemon: Daemon) -> None:
    assert "SIMULATED" in vllm_server(daemon, "health").out
    assert vllm_server(daemon, "health", "--json").json["status"] == "ok"
    assert vllm_server(daemon, "reload").out == "nothing changed\n"
    (daemon.folder / ".env").write_text("REQUEST_TIMEOUT=77\n")
    assert "request_timeout_s" in vllm_server(daemon, "reload").out
    (daemon.folder / ".env").write_text("NONSENSE=77\n")
    bad = vllm_server(daemon, "reload", "--json")
    assert bad.code == Exit.FAILED and bad.error["code"] == "bad_config"
    (daemon.folder / ".env").unlink()
    vllm_server(daemon, "reload")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_for_the_shell(shell: str) -> None:
    done = vllm_server(None, "completion", shell)
    assert done.code == 0 and "_VLLM_SERVER_COMPLETE" in done.out
    assert vllm_server(None, "completion", env={"SHELL": f"/usr/bin/{shell}"}).out == done.out


@pytest.mark.parametrize(("typed", "offered"), [
    (["vllm-server", "st"], {"plain,stop", "plain,stats"}),
    (["vllm-server", "logs", "dem"], {"plain,demo"}),       # an id may begin with "de"
    (["vllm-server", "chat", "org"], {"plain,org/tiny"})])
def test_words_are_completed_with_what_the_server_knows(daemon: Daemon, demo: dict[str, Any], typed: list[str],
                                                       offered: set[str]) -> None:
    env = {"_VLLM_SERVER_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(typed), "COMP_CWORD": str(len(typed) - 1)}
    assert set(vllm_server(daemon, env=env).out.split()) == offered
    if "st" not in typed:       # without a server there is nothing to offer, and nothing is said
        gone = vllm_server(None, env={**env, "VLLM_SERVER_URL": "http://127.0.0.1:1"})
        assert (gone.out.strip(), gone.err) == ("", "")


# --- parts ------------------------------------------------------------------------------------------------------------

def test_every_exit_code_is_told_in_the_help() -> None:
    text = CliRunner().invoke(cli, ["--help"]).output
    for code in Exit:
        assert f"{code:>3}  {MEANINGS[code]}" in text
    assert exit_code(VLLMProxyError("?")) is Exit.FAILED
    assert exit_code(ServerError("late", status=504)) is Exit.TIMED_OUT
    assert exit_code(TooManyRequests("many", status=429)) is Exit.UNAVAILABLE
    assert exit_code(TimedOut("late")) is Exit.TIMED_OUT
    assert exit_code(ConnectionFailed("gone", sent=True)) is Exit.UNREACHABLE


@pytest.mark.parametrize("name", READMES)
def test_every_command_and_exit_code_stands_in_the_readme(name: str) -> None:
    table = rows(READMES[name])
    listed = set(re.findall(r"`vllm-server (\w+)`", "\n".join(re.findall(r"^\| [^|]*", READMES[name], re.MULTILINE))))
    assert listed == set(cli.commands)
    assert {word for word in table if word.isdigit()} == {str(int(code)) for code in Exit}


def test_every_command_takes_json_and_url() -> None:
    for name, command in cli.commands.items():
        options = {option for parameter in command.params for option in parameter.opts}
        assert {"--json", "--url"} <= options, name
        assert command.help, name


@pytest.mark.parametrize(("count", "text"), [
    (None, "-"), (0, "0 B"), (999, "999 B"), (512 << 20, "512 MiB"), (int(1.9 * (1 << 30)), "1.9 GiB"),
    (80 << 30, "80 GiB"), (2 << 40, "2048 GiB")])
def test_sizes(count: int | None, text: str) -> None:
    assert words.size(count) == text


@pytest.mark.parametrize(("seconds", "text"), [
    (None, "-"), (0, "0 s"), (8.4, "8 s"), (60, "1 min"), (125, "2 min 5 s"), (3600, "1 h"), (11400, "3 h 10 min"),
    (183600, "2 d 3 h"), (86405, "1 d")])
def test_spans(seconds: float | None, text: str) -> None:
    assert words.span(seconds) == text


@given(st.sets(st.integers(0, 63)))
def test_device_lists_are_short_and_whole(indexes: set[int]) -> None:
    text = words.devices(sorted(indexes))
    ranges = [part.split("-") for part in text.split(",")] if indexes else []
    assert {n for part in ranges for n in range(int(part[0]), int(part[-1]) + 1)} == indexes


def test_a_model_cannot_steer_the_terminal() -> None:
    assert words.plain("a\x1b[2Jb\x07\x9bc\n\td") == "a[2Jbc\n\td"


def test_flags_are_json_or_text() -> None:
    assert models.flags(["a=1", "--b=x y", "c=true", 'd={"e": [1]}', "f=null", "g="]) == {
        "a": 1, "b": "x y", "c": True, "d": {"e": [1]}, "f": None, "g": ""}


def instance(identity: str, model: str, *aliases: str) -> Any:
    return {"id": identity, "model_name": model, "aliases": list(aliases), "status": "ready"}


def test_a_word_means_an_id_a_name_or_the_beginning_of_an_id() -> None:
    there = [instance("abc12345", "org/a", "demo"), instance("abd12345", "org/a"), instance("fed12345", "abc")]
    assert [one["id"] for one in find.instances("abd12345", there)] == ["abd12345"]
    assert [one["id"] for one in find.instances("org/a", there)] == ["abc12345", "abd12345"]
    assert find.one_instance("demo", there)["id"] == "abc12345"
    assert find.one_instance("abc", there)["id"] == "fed12345"      # a name goes before a beginning
    assert find.one_instance("abd", there)["id"] == "abd12345"
    with pytest.raises(NotFound):
        find.instances("ab", there)
    with pytest.raises(NotFound, match="There is none"):
        find.instances("abc", [])
