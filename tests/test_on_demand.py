"""Models of config.yaml: requests load them, operators load and unload them, sleep and wake, reloads replace them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.daemon import Answer, Daemon, with_knobs
from tests.support import wait_until

pytestmark = pytest.mark.whole

MESSAGES = [{"role": "user", "content": "hello there"}]
FAST = {"app.EVERY_S": 0.02}


def entry(sim: Mapping[str, object] | None = None, **fields: Any) -> dict[str, Any]:
    params = with_knobs(fields.pop("params", None), sim)
    return {**fields, **({"params": params} if params else {})}


def configure(daemon: Daemon, models: Mapping[str, Any], **sections: Any) -> None:
    """JSON is YAML."""
    daemon.folder.mkdir(exist_ok=True)
    fresh = daemon.folder / "fresh"
    fresh.write_text(json.dumps({"models": models, **sections}))
    fresh.replace(daemon.folder / "config.yaml")


def running(folder: Path, models: Mapping[str, Any], env: Mapping[str, str] | None = None) -> Daemon:
    daemon = Daemon(folder, {"DRAIN_TIMEOUT": "0.2", **(env or {})}, patch=FAST)
    configure(daemon, models)
    return daemon


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with running(tmp_path_factory.mktemp("daemon"), {
            "org/one": entry(aliases=["uno", "eins"]),
            "two": entry(model_path="org/two-model", sleep=1, priority=7, env={"SIMULATOR_TOKENS": "3"}),
            "slow": entry({"start_s": 600}, model_path="org/slow"),
            "bad": entry({"fail": "no_weights"}, model_path="org/bad")}) as daemon:
        yield daemon


@pytest.fixture(autouse=True)
def nothing_loaded(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "daemon" in request.fixturenames:
        request.getfixturevalue("daemon").remove()


def chat(daemon: Daemon, model: str, **fields: object) -> Answer:
    return daemon.post("/v1/chat/completions", {"model": model, "messages": MESSAGES, **fields})


def model(daemon: Daemon, name: str) -> dict[str, Any]:
    found: dict[str, Any] = daemon.get(f"/admin/models/{name}").json
    return found


def statuses(daemon: Daemon) -> dict[str, str]:
    return {one["id"]: one["status"] for one in daemon.get("/v1/models").json["data"]}


# --- requests -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["org/one", "uno"])
def test_a_request_loads_its_model_and_is_served(daemon: Daemon, name: str) -> None:
    answer = chat(daemon, name)
    assert answer.status == 200, answer
    assert answer.json["model"] == "org/one"
    [one] = daemon.instances()
    assert (one["model_name"], one["configured_as"]) == ("org/one", "org/one")
    assert set(one["aliases"]) >= {"uno", "eins"}


def test_a_hundred_requests_cause_one_load(daemon: Daemon) -> None:
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda number: chat(daemon, ("org/one", "uno", "eins")[number % 3]), range(100)))
    assert {answer.status for answer in answers} == {200}
    assert len(daemon.instances()) == 1


def test_what_an_entry_says_reaches_its_engine(daemon: Daemon) -> None:
    answer = chat(daemon, "two")
    assert (answer.status, answer.json["usage"]["completion_tokens"]) == (200, 3)
    [one] = daemon.instances()
    assert (one["model_name"], one["sleep"], one["priority"], one["env"]) == (
        "org/two-model", 1, 7, ["SIMULATOR_TOKENS"])


def test_a_load_that_fails_is_told_to_all_who_wait_and_to_who_comes_next(daemon: Daemon) -> None:
    with ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(lambda _: chat(daemon, "bad"), range(5)))
    assert {(answer.status, answer.error["code"]) for answer in answers} == {(404, "no_weights")}
    before = [one["id"] for one in daemon.instances()]
    assert chat(daemon, "bad").error["code"] == "no_weights"
    assert [one["id"] for one in daemon.instances()] == before
    assert statuses(daemon)["bad"] == "failed"


def test_a_name_that_nobody_knows(daemon: Daemon) -> None:
    error = chat(daemon, "org/none").error
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "org/one" in error["message"] and "two" in error["message"]
    assert daemon.instances() == []


def test_a_client_that_leaves_gives_up_its_load(daemon: Daemon) -> None:
    with daemon.socket() as client:
        body = json.dumps({"model": "slow", "messages": MESSAGES}).encode()
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                       b"Content-Length: %d\r\n\r\n" % len(body) + body)
        wait_until(lambda: statuses(daemon)["slow"] == "starting")
    wait_until(lambda: statuses(daemon)["slow"] == "unloaded")


def test_a_full_queue_says_when_to_come_again(tmp_path: Path) -> None:
    with running(tmp_path, {"slow": entry({"start_s": 600}, model_path="org/slow")}, {"MAX_QUEUE": "2"}) as daemon, \
            ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(chat, daemon, "slow") for _ in range(3)]
        wait_until(lambda: any(one.done() for one in waiting))
        [refused] = [one.result() for one in waiting if one.done()]
        assert (refused.status, refused.error["code"]) == (503, "queue_full")
        assert int(refused.headers["retry-after"]) > 0
        configure(daemon, {})
        told = [one.result() for one in waiting if one.result() is not refused]
        assert {answer.error["code"] for answer in told} <= {"stopping", "model_not_found"}


def test_who_waits_keeps_nobody_out(tmp_path: Path) -> None:
    """More requests wait for one model than there are threads; another model answers meanwhile."""
    models = {"slow": entry({"start_s": 600}, model_path="org/slow"), "fast": entry(model_path="org/fast")}
    with running(tmp_path, models, {"APP_THREADS": "17"}) as daemon, ThreadPoolExecutor(30) as pool:
        assert chat(daemon, "fast").status == 200
        waiting = [pool.submit(chat, daemon, "slow") for _ in range(30)]
        wait_until(lambda: statuses(daemon)["slow"] == "starting")
        assert [chat(daemon, "fast").status for _ in range(5)] == [200] * 5
        assert not any(one.done() for one in waiting)
        configure(daemon, {})
        assert {one.result().error["code"] for one in waiting} <= {"stopping", "model_not_found"}


def test_comments_while_a_configured_model_loads(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, patch={"routing.commented.AFTER_S": 0.2, "routing.commented.EVERY_S": 0.1})
    configure(daemon, {"m": entry({"start_s": 1.5}, model_path="org/m")})
    with daemon:
        answer = chat(daemon, "m", stream=True)
    assert answer.status == 200
    assert answer.body.startswith(b": loading m ") and answer.body.endswith(b"data: [DONE]\n\n")


# --- AUTO_LOAD ------------------------------------------------------------------------------------------------------

def test_auto_load_off(tmp_path: Path) -> None:
    with running(tmp_path, {"m": entry(model_path="org/m")}, {"AUTO_LOAD": "off"}) as daemon:
        error = chat(daemon, "m").error
        assert error["code"] == "model_not_found" and "POST /admin/models/m/load" in error["message"]
        assert statuses(daemon) == {}
        assert daemon.post("/admin/models/m/load", {"wait": True}).status == 200
        assert chat(daemon, "m").status == 200


def test_auto_load_any(tmp_path: Path) -> None:
    with running(tmp_path, {}, {"AUTO_LOAD": "any"}) as daemon:
        assert chat(daemon, "org/whatever").status == 200
        [one] = daemon.instances()
        assert one["model_name"] == "org/whatever"
        assert chat(daemon, "--port").error["code"] == "model_not_found"


# --- operators ------------------------------------------------------------------------------------------------------

def test_the_models_and_what_becomes_of_one(daemon: Daemon) -> None:
    assert statuses(daemon) == dict.fromkeys(("bad", "eins", "org/one", "slow", "two", "uno"), "unloaded")
    listed = daemon.get("/admin/models").json
    assert listed["object"] == "list"
    assert [one["id"] for one in listed["data"]] == ["org/one", "two", "slow", "bad"]
    shown = daemon.get("/v1/models/org/one").json
    assert (len(shown.pop("via")), shown.pop("servers")) == (1, [])
    assert shown == {
        "id": "org/one", "object": "model", "created": daemon.get("/v1/models/uno").json["created"],
        "owned_by": "vllm-server", "root": "org/one", "status": "unloaded", "instances": []}
    found = model(daemon, "uno")
    assert (found["id"], found["aliases"], found["status"], found["instances"]) == (
        "org/one", ["uno", "eins"], "unloaded", [])
    loaded = daemon.post("/admin/models/uno/load", {"wait": True})
    assert (loaded.status, loaded.json["status"]) == (200, "ready")
    assert loaded.json == model(daemon, "org/one")
    assert statuses(daemon)["eins"] == "ready"
    assert daemon.post("/admin/models/org/one/load").status == 200
    gone = daemon.post("/admin/models/org/one/unload", {"wait": True})
    assert (gone.status, gone.json["status"], gone.json["instances"]) == (200, "unloaded", [])
    assert daemon.post("/admin/models/org/one/unload").status == 200
    assert daemon.instances() == []


def test_a_plan_does_nothing(daemon: Daemon) -> None:
    plan = daemon.get("/admin/models/uno/plan")
    assert plan.status == 200, plan
    assert (plan.json["object"], plan.json["model"], plan.json["fits"]) == ("plan", "org/one", True)
    assert (plan.json["sleep"], plan.json["stop"]) == ([], [])
    assert plan.json["because"]
    assert daemon.instances() == []
    assert daemon.get("/admin/models/nothing/plan").error["code"] == "model_not_found"


def test_a_plan_tells_who_would_go(tmp_path: Path) -> None:
    with running(tmp_path, {name: entry(model_path=f"org/{name}", memory_mb=64) for name in ("a", "b")},
                 {"HOST_MEMORY_BUDGET_MB": "100", "RESERVED_MEMORY_MB": "0"}) as daemon:
        assert chat(daemon, "a").status == 200
        [one] = daemon.instances()
        wait_until(lambda: daemon.get("/admin/models/b/plan").json["fits"])     # it stays for a moment
        plan = daemon.get("/admin/models/b/plan").json
        assert (plan["fits"], plan["stop"], plan["source"]) == (True, [{"id": one["id"], "model": "a"}], "memory_mb")
        assert plan["bytes_per_gpu"] == 64 << 20
        assert chat(daemon, "b").status == 200
        [other] = daemon.instances()
        assert other["model_name"] == "org/b" and "a" in other["because"]
        took = daemon.get("/admin/models/a/plan").json["seconds_expected"]
        assert took is not None and took > 0


def test_a_load_goes_on_without_who_asked(daemon: Daemon) -> None:
    answer = daemon.post("/admin/models/slow/load")
    assert (answer.status, answer.json["status"]) == (202, "starting")
    wait_until(lambda: model(daemon, "slow")["instances"][0]["phase"] not in (None, "starting"))
    assert daemon.post("/admin/models/slow/unload", {"force": True, "wait": True}).json["status"] == "unloaded"


def test_a_load_that_fails_is_told_to_who_waits_for_it(daemon: Daemon) -> None:
    answer = daemon.post("/admin/models/bad/load", {"wait": True})
    assert (answer.status, answer.error["code"], answer.error["param"]) == (404, "no_weights", "model")


@pytest.mark.parametrize(("method", "path", "body", "status", "code"), [
    ("GET", "/admin/models/nothing", None, 404, "model_not_found"),
    ("POST", "/admin/models/nothing/load", {}, 404, "model_not_found"),
    ("POST", "/admin/models/org/nothing/unload", {}, 404, "model_not_found"),
    ("POST", "/admin/models/two/load", {"wiat": True}, 400, "unknown_field"),
    ("POST", "/admin/models/two/load", {"wait": 1}, 400, "bad_request"),
    ("POST", "/admin/models/two/unload", {"force": "yes"}, 400, "bad_request"),
    ("POST", "/instances/nothing/sleep", {}, 404, "instance_not_found"),
    ("POST", "/instances/nothing/wake", {}, 404, "instance_not_found"),
    ("POST", "/instances", {"model_name": "m", "sleep": 3}, 400, "bad_request"),
    ("POST", "/instances", {"model_name": "m", "stop_after": 0}, 400, "bad_request")])
def test_bad_calls(daemon: Daemon, method: str, path: str, body: object, status: int, code: str) -> None:
    answer = daemon.call(method, path, body)
    assert (answer.status, answer.error["code"]) == (status, code)
    assert daemon.instances() == []


def test_sleep_and_wake(daemon: Daemon) -> None:
    chat(daemon, "two")
    [one] = daemon.instances()
    asleep = daemon.post(f"/instances/{one['id']}/sleep", {"wait": True})
    assert (asleep.status, asleep.json["status"], asleep.json["asleep"]) == (200, "sleeping", 1), asleep
    assert statuses(daemon)["two"] == "sleeping"
    assert daemon.post(f"/instances/{one['id']}/sleep").status == 200
    awake = daemon.post(f"/instances/{one['id']}/wake", {"wait": True})
    assert (awake.status, awake.json["status"], awake.json["asleep"]) == (200, "ready", None)
    assert daemon.post(f"/instances/{one['id']}/sleep", {"level": 2, "wait": True}).json["asleep"] == 2
    assert chat(daemon, "two").status == 200        # which wakes it
    daemon.post(f"/instances/{one['id']}/sleep", {"wait": True})
    assert daemon.post(f"/proxy/{one['id']}/v1/chat/completions", {"model": "two", "messages": MESSAGES}).status == 200
    assert [found["pid"] for found in daemon.instances()] == [one["pid"]]
    for level in (0, 3, True, "1"):
        assert daemon.post(f"/instances/{one['id']}/sleep", {"level": level}).error["param"] == "level"


def test_who_was_not_made_to_sleep(daemon: Daemon) -> None:
    made = daemon.create("org/m")
    answer = daemon.post(f"/instances/{made['id']}/sleep")
    assert (answer.status, answer.error["code"]) == (409, "not_sleepable")
    made = daemon.create("org/n", sleep=2, stop_after=50)
    assert (made["sleep"], made["stop_after"]) == (2, 50)
    assert daemon.post(f"/instances/{made['id']}/sleep", {"wait": True}).json["asleep"] == 2


def test_preload_in_order_of_priority(tmp_path: Path) -> None:
    with running(tmp_path, {"late": entry(model_path="org/late", preload=True, priority=1),
                            "first": entry(model_path="org/first", preload=True, priority=2),
                            "never": entry(model_path="org/never")}) as daemon:
        wait_until(lambda: statuses(daemon) == {"first": "ready", "late": "ready", "never": "unloaded"})
        assert [one["model_name"] for one in daemon.instances()] == ["org/first", "org/late"]


# --- reload ---------------------------------------------------------------------------------------------------------

def test_a_reload_touches_only_what_changed(tmp_path: Path) -> None:
    models = {name: entry(model_path=f"org/{name}") for name in ("a", "b", "c", "d", "e")}
    with running(tmp_path, models) as daemon:
        for name in models:
            assert chat(daemon, name).status == 200
        pids = {one["aliases"][0]: one["pid"] for one in daemon.instances()}
        configure(daemon, models | {"c": entry(model_path="org/c", params={"max_model_len": 256})})
        wait_until(lambda: "models changed: c" in daemon.log)
        assert chat(daemon, "c").status == 200
        after = {one["aliases"][0]: one for one in daemon.instances() if one["status"] == "ready"}
        assert {name for name in models if after[name]["pid"] != pids[name]} == {"c"}
        assert after["c"]["flags"]["max_model_len"] == 256
        del models["e"]
        configure(daemon, models)
        wait_until(lambda: "e" not in statuses(daemon))
        assert chat(daemon, "e").error["code"] == "model_not_found"
        configure(daemon, models | {"f": entry(model_path="org/f")})
        wait_until(lambda: statuses(daemon).get("f") == "unloaded")
        assert chat(daemon, "f").status == 200


def test_requests_do_not_notice_a_reload(tmp_path: Path) -> None:
    """One of three changes under load, back and forth: no request fails."""
    def models(length: int) -> dict[str, Any]:
        return {"a": entry(model_path="org/a"), "b": entry(model_path="org/b", params={"max_model_len": length}),
                "c": entry(model_path="org/c")}

    with running(tmp_path, models(512), {"DRAIN_TIMEOUT": "60"}) as daemon, ThreadPoolExecutor(6) as pool:
        over = False

        def ask(number: int) -> list[Answer]:
            answers = []
            while not over:
                answers.append(chat(daemon, "abc"[number % 3], max_tokens=4))
            return answers

        asking = [pool.submit(ask, number) for number in range(6)]
        for length in (256, 512, 128):
            configure(daemon, models(length))
            wait_until(lambda length=length: any(       # type: ignore[misc]
                one["flags"].get("max_model_len") == length and one["status"] == "ready" for one in daemon.instances()))
        over = True
        answers = [answer for one in asking for answer in one.result()]
    assert {answer.status for answer in answers} == {200}, [one for one in answers if one.status != 200][:3]
