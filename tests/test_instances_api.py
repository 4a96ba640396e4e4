"""POST, GET and DELETE /instances with the whole daemon and simulated engines."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.daemon import Answer, Daemon, events, with_knobs
from tests.support import wait_until


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("daemon"), {
            "VLLM_MAX_INSTANCES": "4", "DRAIN_TIMEOUT": "60", "STOP_TIMEOUT": "5",
            "VLLM_SERVER_DEV_MODE": "1"}) as daemon:
        yield daemon


@pytest.fixture
def daemon(shared: Daemon) -> Iterator[Daemon]:
    """The shared one, without instances before and after."""
    assert shared.instances() == []
    yield shared
    shared.remove()


SLOW = with_knobs(None, {"start_s": 600})


# --- creating -----------------------------------------------------------------------------------------------------

def test_create_answers_at_once_and_the_instance_becomes_ready(daemon: Daemon) -> None:
    answer = daemon.post("/instances", {"model_name": "org/m", "timeout": 60, "params": {"max-model-len": 512}})
    assert answer.status == 201
    made = answer.json
    assert answer.headers["location"] == f"/instances/{made['id']}"
    assert (made["model_name"], made["status"], made["timeout"], made["in_flight"]) == ("org/m", "starting", 60.0, 0)
    assert made["params"] == {"max_model_len": 512}
    wait_until(lambda: daemon.status_of(made["id"]) == "ready")
    ready = daemon.instance(made["id"])
    assert ready["progress"] == 1.0 and ready["phase"] == "ready" and ready["last_error"] is None
    assert ready["pid"] in daemon.engine_processes()
    assert 0 < ready["expires_in"] <= 60 and ready["simulated"] is True
    assert [one["id"] for one in daemon.instances()] == [made["id"]]


def test_the_same_again_is_the_same_instance_with_its_clock_anew(daemon: Daemon) -> None:
    body = {"model_name": "m", "timeout": 50, "params": {"max_model_len": 512}}
    first = daemon.post("/instances", body)
    again = daemon.post("/instances", body)
    other_spelling = daemon.post("/instances", body | {"params": {"max-model-len": 512}, "timeout": 70})
    assert [first.status, again.status, other_spelling.status] == [201, 200, 200]
    assert {answer.json["id"] for answer in (first, again, other_spelling)} == {first.json["id"]}
    assert other_spelling.json["timeout"] == 70.0
    assert 69 < other_spelling.json["expires_in"] <= 70
    assert daemon.post("/instances", {key: body[key] for key in ("model_name", "params")}).json["timeout"] == 70.0
    assert len(daemon.instances()) == 1


def test_the_same_model_with_other_params_is_a_conflict_that_names_the_ways_out(daemon: Daemon) -> None:
    made = daemon.create("m", params={"max_model_len": 512}, wait=False)
    answer = daemon.post("/instances", {"model_name": "m", "params": {"max_model_len": 1024, "seed": 1}})
    assert answer.status == 409
    assert (answer.error["code"], answer.error["param"]) == ("instance_exists", "params")
    for word in (made["id"], "max_model_len", "seed", '"replace": true', '"new": true'):
        assert word in answer.error["message"]
    assert [one["id"] for one in daemon.instances()] == [made["id"]]


def test_replace_drains_the_old_one_and_starts_anew(daemon: Daemon) -> None:
    old = daemon.create("m", sim={"tokens_per_s": 0.001})
    with daemon.open("POST", "/v1/completions", {"model": "m", "prompt": "x", "stream": True}) as stream:
        first = next(events(stream))
        answer = daemon.post("/instances", {"model_name": "m", "params": {"seed": 1}, "replace": True})
        assert answer.status == 201 and answer.json["id"] != old["id"]
        new = answer.json["id"]
        assert daemon.status_of(old["id"]) == "stopping"       # it drains for the one that is in flight
        wait_until(lambda: daemon.instance(new)["phase"] == "waiting_for_old_instance")
        assert b"simulated" in first
    wait_until(lambda: daemon.status_of(new) == "ready")       # the client left, so that the old one could end
    gone = daemon.get(f"/instances/{old['id']}")
    assert gone.status == 404 and "replaced" in gone.error["message"]


def test_new_is_one_more_replica(daemon: Daemon) -> None:
    first = daemon.create("m", wait=False)
    second = daemon.create("m", new=True, wait=False)
    third = daemon.create("m", params={"seed": 1}, new=True, wait=False)
    assert len({first["id"], second["id"], third["id"]}) == 3
    assert {one["model_name"] for one in daemon.instances()} == {"m"}
    listed = daemon.get("/v1/models").json["data"]
    assert [(entry["id"], len(entry["instances"])) for entry in listed] == [("m", 3)]


def test_replace_and_new_make_one_where_there_is_none(daemon: Daemon) -> None:
    assert daemon.create("a", replace=True, wait=False)["status"] == "starting"
    assert daemon.create("b", new=True, wait=False)["status"] == "starting"


def test_timeout_zero_never_expires(daemon: Daemon) -> None:
    made = daemon.create("m", timeout=0, wait=False)
    assert (made["timeout"], made["expires_in"]) == (0.0, None)


def test_more_than_the_settings_allow(daemon: Daemon) -> None:
    for number in range(4):
        daemon.create(f"m{number}", params=SLOW, wait=False)
    answer = daemon.post("/instances", {"model_name": "one-more"})
    assert answer.status == 503 and answer.error["code"] == "too_many_instances"
    assert "VLLM_MAX_INSTANCES is 4" in answer.error["message"]
    daemon.remove(daemon.instances()[0]["id"])
    assert daemon.post("/instances", {"model_name": "one-more"}).status == 201


def test_of_many_creates_at_once_one_makes_it(daemon: Daemon) -> None:
    body = {"model_name": "m", "wait": True}
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: daemon.post("/instances", body), range(12)))
    assert sorted(answer.status for answer in answers) == [200] * 11 + [201]
    assert {answer.json["status"] for answer in answers} == {"ready"}
    assert len({answer.json["pid"] for answer in answers}) == 1


def test_creates_of_many_models_at_once_get_a_port_each(daemon: Daemon) -> None:
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(daemon.create, ["a", "b", "c", "d"]))
    assert len({one["port"] for one in made}) == 4
    assert len({one["pid"] for one in made}) == 4


def test_an_alias_of_another_model_is_refused(daemon: Daemon) -> None:
    daemon.create("a", params={"served_model_name": ["short"]}, wait=False)
    answer = daemon.post("/instances", {"model_name": "b", "params": {"served_model_name": ["short"]}})
    assert answer.status == 409 and answer.error["code"] == "name_taken"
    assert daemon.post("/instances", {"model_name": "short"}).status == 409


# --- waiting ------------------------------------------------------------------------------------------------------

def test_wait_answers_when_it_is_ready(daemon: Daemon) -> None:
    answer = daemon.post("/instances", {"model_name": "m", "params": with_knobs(None, {"start_s": 0.5}), "wait": True})
    assert (answer.status, answer.json["status"]) == (201, "ready")
    assert daemon.post("/v1/completions", {"model": "m", "prompt": "x"}).status == 200


def test_wait_answers_with_the_cause_of_a_failure(daemon: Daemon) -> None:
    answer = daemon.post("/instances", {"model_name": "m", "params": {"no_such_flag": 1}, "wait": True})
    assert (answer.status, answer.error["code"]) == (400, "bad_flag")
    assert "--no-such-flag" in answer.error["message"]
    failed, = daemon.instances()
    assert failed["status"] == "failed" and failed["last_error"]["code"] == "bad_flag"
    wait_until(lambda: daemon.instance(failed["id"])["pid"] is None)
    assert daemon.engine_processes() == []
    # The next one takes its place.
    made = daemon.create("m")
    assert [one["id"] for one in daemon.instances()] == [made["id"]]
    assert daemon.get(f"/instances/{failed['id']}").status == 404


def test_wait_for_one_that_is_deleted_meanwhile(daemon: Daemon) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(daemon.post, "/instances", {"model_name": "m", "params": SLOW, "wait": True})
        wait_until(daemon.instances)
        daemon.remove()
        answer: Answer = waiting.result()
    assert answer.status == 503 and answer.error["code"] == "stopped"


def test_a_start_goes_on_when_the_one_who_waited_leaves(daemon: Daemon) -> None:
    body = b'{"model_name": "m", "params": {"additional_config": {"sim": {"start_s": 0.5}}}, "wait": true}'
    client = daemon.socket()
    client.sendall(b"POST /instances HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                   b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
    wait_until(daemon.instances)
    client.close()
    wait_until(lambda: daemon.instances()[0]["status"] == "ready")


def test_a_start_past_its_deadline_has_failed(daemon: Daemon) -> None:
    answer = daemon.post("/instances", {"model_name": "m", "params": SLOW, "start_timeout": 0.2})
    assert answer.status == 201
    wait_until(lambda: daemon.instances()[0]["last_error"] is not None)
    one, = daemon.instances()
    assert one["last_error"]["code"] == "start_timeout" and "start_timeout" in one["last_error"]["message"]


# --- deleting -----------------------------------------------------------------------------------------------------

def test_delete_drains_then_frees_everything(daemon: Daemon) -> None:
    made = daemon.create("m", sim={"tokens_per_s": 0.001, "tokens": 10})
    with daemon.open("POST", "/v1/completions", {"model": "m", "prompt": "x", "stream": True}) as stream:
        read = events(stream)
        next(read)
        answer = daemon.delete(f"/instances/{made['id']}")
        assert (answer.status, answer.json["status"]) == (202, "stopping")
        late = daemon.post("/v1/completions", {"model": "m", "prompt": "x"})
        assert late.status == 503 and late.error["code"] == "stopping"
        daemon.turn_knobs(made, tokens_per_s=0)
        assert list(read)[-1] == b"data: [DONE]\n\n"           # the one in flight was finished
    wait_until(lambda: daemon.status_of(made["id"]) == "gone")
    assert daemon.engine_processes() == [] and daemon.records() == []
    gone = daemon.get(f"/instances/{made['id']}")
    assert (gone.error["code"], gone.error["param"]) == ("instance_not_found", "instance_id")
    assert gone.error["message"] == f"instance {made['id']} was stopped: deleted"


def test_force_cuts_what_is_in_flight(daemon: Daemon) -> None:
    made = daemon.create("m", sim={"first_token_s": 3600})
    with ThreadPoolExecutor(1) as pool:
        plain = pool.submit(daemon.post, "/v1/completions", {"model": "m", "prompt": "x"})
        wait_until(lambda: daemon.instance(made["id"])["in_flight"] == 1)
        answer = daemon.delete(f"/instances/{made['id']}?force=1&wait=1")
        assert (answer.status, answer.json["status"]) == (200, "stopped")
        cut: Answer = plain.result()
    assert cut.status == 503 and cut.error["code"] == "engine_stopped"
    assert made["id"] in cut.error["message"]
    assert daemon.engine_processes() == [] and daemon.instances() == []


def test_force_after_a_delete_that_drains_hurries_it(daemon: Daemon) -> None:
    made = daemon.create("m", sim={"tokens_per_s": 0.001})
    with daemon.open("POST", "/v1/completions", {"model": "m", "prompt": "x", "stream": True}) as stream:
        next(events(stream))
        assert daemon.delete(f"/instances/{made['id']}").status == 202
        assert daemon.delete(f"/instances/{made['id']}?force=true&wait=true").status == 200
    assert daemon.status_of(made["id"]) == "gone"


def test_delete_while_it_loads(daemon: Daemon) -> None:
    made = daemon.create("m", params=SLOW, wait=False)
    wait_until(daemon.engine_processes)
    assert daemon.delete(f"/instances/{made['id']}?wait=1").json["status"] == "stopped"
    assert daemon.engine_processes() == []


def test_a_failed_one_is_forgotten_at_once(daemon: Daemon) -> None:
    daemon.post("/instances", {"model_name": "m", "params": {"no_such_flag": 1}, "wait": True})
    failed, = daemon.instances()
    answer = daemon.delete(f"/instances/{failed['id']}")
    assert (answer.status, answer.json["status"]) == (200, "stopped")
    assert daemon.instances() == []


@pytest.mark.parametrize("unknown", ["ffffffff", "x" * 3000, "%20", "..", "%E4%BD%A0", "a%0ab"])
def test_unknown_ids(daemon: Daemon, unknown: str) -> None:
    for answer in (daemon.get(f"/instances/{unknown}"), daemon.delete(f"/instances/{unknown}"),
                   daemon.get(f"/instances/{unknown}/logs")):
        assert (answer.status, answer.error["code"]) == (404, "instance_not_found")
        assert "GET /instances lists them" in answer.error["message"] and len(answer.error["message"]) < 200


# --- logs ---------------------------------------------------------------------------------------------------------

def test_logs_tail(daemon: Daemon) -> None:
    made = daemon.create("m")
    whole = daemon.get(f"/instances/{made['id']}/logs")
    assert whole.headers["content-type"].startswith("text/plain")
    assert b"Application startup complete" in whole.body
    lines = daemon.get(f"/instances/{made['id']}/logs").body.split(b"\n")
    assert len(lines) > 10 and lines[-1] == b""
    assert daemon.get(f"/instances/{made['id']}/logs?tail=2").body == b"\n".join(lines[-3:])
    assert daemon.get(f"/instances/{made['id']}/logs?tail=0").body == b""


def test_logs_follow_to_the_end_of_the_instance(daemon: Daemon) -> None:
    made = daemon.create("m", sim={"start_s": 0.5}, wait=False)
    with daemon.open("GET", f"/instances/{made['id']}/logs?follow=1&tail=1000") as log:
        seen = b""
        while b"Application startup complete" not in seen:      # it comes while it happens
            seen += log.read1(65536)
        wait_until(lambda: daemon.status_of(made["id"]) == "ready")
        daemon.delete(f"/instances/{made['id']}?wait=1")
        seen += log.read()
    assert b"Shutting down" in seen


def test_the_log_of_a_failed_one_can_be_read(daemon: Daemon) -> None:
    daemon.post("/instances", {"model_name": "m", "params": {"no_such_flag": 1}, "wait": True})
    failed, = daemon.instances()
    assert b"unrecognized arguments" in daemon.get(f"/instances/{failed['id']}/logs?follow=1").body


def test_a_follower_that_leaves_frees_its_thread(daemon: Daemon, shared: Daemon) -> None:
    made = daemon.create("m")
    threads = Path(f"/proc/{shared.worker_pid}/task")
    with daemon.open("GET", f"/instances/{made['id']}/logs?follow=1") as log:
        assert log.read1(10)
    # The same connection serves on after a HEAD, whose body nobody reads.
    with shared.socket() as client:
        for _ in range(2):
            client.sendall(f"HEAD /instances/{made['id']}/logs?follow=1 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert b" 200 OK" in client.recv(65536)
        client.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
                       b'Content-Length: 28\r\nConnection: close\r\n\r\n{"model": "m", "prompt":"x"}')
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
    assert len(list(threads.iterdir())) < 100


# --- other routes of management -----------------------------------------------------------------------------------

def test_gpus_show_who_holds_them(daemon: Daemon) -> None:
    made = daemon.create("m")
    listed = daemon.get("/gpus").json
    assert listed["object"] == "list" and listed["data"]
    assert any(made["id"] in device["instances"] for device in listed["data"])


def test_health_counts(daemon: Daemon) -> None:
    daemon.create("a")
    daemon.create("b", params=SLOW, wait=False)
    wait_until(lambda: daemon.get("/health").json["vllm_processes"] == 2)
    health = daemon.get("/health").json
    assert (health["status"], health["instances"], health["ready"], health["simulated"]) == ("ok", 2, 1, True)


def test_nothing_one_instance_does_delays_another(daemon: Daemon) -> None:
    """One hangs in every way; the other answers, and management too."""
    hung = daemon.create("hung", sim={"hang": True})
    daemon.create("fine")
    done = threading.Event()

    def ask() -> None:
        daemon.post("/v1/completions", {"model": "hung", "prompt": "x"})
        done.set()

    asking = threading.Thread(target=ask)
    asking.start()
    wait_until(lambda: daemon.instance(hung["id"])["in_flight"] == 1)
    for _ in range(5):
        assert daemon.post("/v1/completions", {"model": "fine", "prompt": "x"}).status == 200
    assert not done.is_set()
    daemon.remove(hung["id"])
    asking.join()
