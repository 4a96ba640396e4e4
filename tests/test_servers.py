"""The daemon with servers on other machines: where requests go, where they go instead, and what is seen of it."""

from __future__ import annotations

import contextlib
import http.client
import json
import ssl
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.daemon import Answer, Daemon
from tests.stub_server import StubServer
from tests.support import wait_until
from tests.test_tls import certificate

pytestmark = pytest.mark.whole

__all__ = ["certificate"]     # a fixture

ASK = {"model": "m", "prompt": "x"}


def servers_toml(servers: Sequence[StubServer], *, capacity: int = 8, interval_s: float = 0.5, timeout_s: float = 60,
                 retries: int = 3, more: str = "") -> str:
    entries = "".join(f'  {{ url = "{one.url}", max_concurrent_requests = {capacity}{more} }},\n' for one in servers)
    return (f"[servers]\nservers = [\n{entries}]\n[config]\nhealth_check_interval = {interval_s}\n"
            f"request_timeout = {timeout_s}\nmax_retries = {retries}\n")


@contextlib.contextmanager
def daemon_with(folder: Path, text: str, **env: str) -> Iterator[Daemon]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "servers.toml").write_text(text)
    with Daemon(folder, env) as daemon:
        yield daemon


@pytest.fixture
def servers() -> Iterator[list[StubServer]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(StubServer(name)) for name in ("a", "b", "c")]


def listed(daemon: Daemon) -> dict[str, Any]:
    return {entry["id"]: entry for entry in daemon.get("/v1/models").json["data"]}


def wait_for_models(daemon: Daemon, *names: str) -> None:
    wait_until(lambda: all(listed(daemon).get(name, {}).get("status") == "ready" for name in names))


def wait_for_servers(daemon: Daemon, servers: Sequence[StubServer], model: str = "m") -> None:
    """Until each of them is known to serve."""
    wait_until(lambda: {one["url"] for one in listed(daemon).get(model, {"servers": []})["servers"]
                        if one["status"] == "ready"} >= {one.url for one in servers})


def ask(daemon: Daemon, times: int = 1, **headers: str) -> Counter[str]:
    """Who answered."""
    found: Counter[str] = Counter()
    for _ in range(times):
        answer = daemon.post("/v1/completions", ASK, headers)
        assert answer.status == 200, answer
        found[answer.json["server"]] += 1
    return found


# --- where requests go ------------------------------------------------------------------------------------------------

def test_servers_share_the_requests_for_a_model(tmp_path: Path, servers: list[StubServer]) -> None:
    with daemon_with(tmp_path, servers_toml(servers)) as daemon:
        wait_for_servers(daemon, servers)
        found = ask(daemon, 60)
        assert set(found) == {"a", "b", "c"} and min(found.values()) > 5
        assert daemon.get("/v1/models/m").json["status"] == "ready"
        answer = daemon.post("/v1/completions", {"model": "nobody's", "prompt": "x"})
        assert answer.status == 404 and "m" in answer.error["message"]


def test_each_model_goes_where_it_is(tmp_path: Path) -> None:
    with StubServer("a", ("m", "n")) as first, StubServer("b", ("o",)) as second, \
            daemon_with(tmp_path, servers_toml([first, second])) as daemon:
        wait_for_models(daemon, "m", "n", "o")
        for model, expected in (("m", "a"), ("n", "a"), ("o", "b")):
            assert daemon.post("/v1/chat/completions", {"model": model}).json["server"] == expected


def test_what_another_machine_gets_and_does_not_get(tmp_path: Path) -> None:
    with StubServer("a") as server, daemon_with(
            tmp_path, servers_toml([server], more=', api_key = "theirs", headers = { X-Team = "blue" }'),
            API_KEYS="ours") as daemon:
        wait_until(lambda: listed_with_key(daemon))
        answer = daemon.post("/v1/completions", ASK, {
            "Authorization": "Bearer ours", "X-Api-Key": "ours", "X-Team": "red", "X-Other": "kept",
            "X-Request-Id": "my-1"})
        assert answer.status == 200 and answer.headers["x-request-id"] == "my-1"
        sent = server.headers[-1]
        assert (sent["Authorization"], sent["X-Team"], sent["X-Other"]) == ("Bearer theirs", "blue", "kept")
        assert sent["X-Request-Id"] == "my-1" and sent["Via"].startswith("1.1 vllm-server-")
        assert sent["Host"] == f"127.0.0.1:{server.port}" and "ours" not in json.dumps(sent)


def listed_with_key(daemon: Daemon) -> bool:
    answer = daemon.get("/v1/models", {"Authorization": "Bearer ours"})
    return any(entry["id"] == "m" for entry in answer.json["data"])


def test_a_server_takes_the_requests_while_the_model_loads_here(tmp_path: Path) -> None:
    with StubServer("a", ("org/m",)) as server, daemon_with(tmp_path, servers_toml([server])) as daemon:
        wait_for_models(daemon, "org/m")
        made = daemon.create("org/m", sim={"start_s": 3, "tokens_per_s": 20}, params={"max_num_seqs": 1}, wait=False)
        body = {"model": "org/m", "prompt": "x", "max_tokens": 40}
        assert daemon.post("/v1/completions", body).json.get("server") == "a"
        assert daemon.status_of(made["id"]) == "starting"
        wait_until(lambda: daemon.status_of(made["id"]) == "ready")
        wait_until(lambda: "server" not in daemon.post("/v1/completions", body | {"max_tokens": 1}).json)
        wait_until(lambda: {one["id"]: one["capacity"] for one in daemon.get("/load-stats").json["servers"]}
                           .get(made["id"]) == 1)
        with daemon.open("POST", "/v1/completions", body | {"stream": True, "max_tokens": 400}):
            wait_until(lambda: daemon.instance(made["id"])["in_flight"] == 1)
            assert daemon.post("/v1/completions", body).json.get("server") == "a"       # nobody here has room


def test_a_session_stays_with_its_server(tmp_path: Path, servers: list[StubServer]) -> None:
    with daemon_with(tmp_path, servers_toml(servers), ROUTING_POLICY="session") as daemon:
        wait_for_servers(daemon, servers)
        homes = {name: ask(daemon, 5, **{"X-Session-Id": name}) for name in "pqrstuvw"}
        assert all(len(home) == 1 for home in homes.values())
        assert len({next(iter(home)) for home in homes.values()}) > 1


def test_prompts_that_begin_alike_go_to_one_server(tmp_path: Path, servers: list[StubServer]) -> None:
    with daemon_with(tmp_path, servers_toml(servers), ROUTING_POLICY="prefix") as daemon:
        wait_for_servers(daemon, servers)

        def home(start: str, end: str) -> str:
            messages = [{"role": "system", "content": start * 300}, {"role": "user", "content": end}]
            return str(daemon.post("/v1/chat/completions", {"model": "m", "messages": messages}).json["server"])

        homes = {start: {home(start, end) for end in ("1", "2", "3", "x" * 100_000)} for start in "abcdefgh"}
        assert all(len(found) <= 2 for found in homes.values())     # the large body may have a home of its own
        assert all(len({home(start, str(n)) for n in range(5)}) == 1 for start in homes)
        assert len(set.union(*homes.values())) > 1


def test_a_stored_response_is_asked_for_where_it_was_made(tmp_path: Path, servers: list[StubServer]) -> None:
    made = b'{"id": "resp_1", "object": "response"}'
    with daemon_with(tmp_path, servers_toml(servers)) as daemon:
        wait_for_servers(daemon, servers)
        for one in servers:
            one.bodies["/v1/responses"] = made
            one.statuses["/v1/responses/resp_2"] = 404
        servers[2].statuses["/v1/responses/resp_2"] = 200
        assert daemon.post("/v1/responses", {"model": "m", "input": "x"}).status == 200
        [maker] = [one for one in servers if one.asked["/v1/responses"]]
        for _ in range(5):
            assert daemon.get("/v1/responses/resp_1").json["server"] == maker.name
            follow = {"model": "m", "input": "y", "previous_response_id": "resp_1"}
            assert daemon.post("/v1/responses", follow).status == 200
        assert maker.asked["/v1/responses"] == 6
        assert daemon.get("/v1/responses/resp_2").json["server"] == "c"      # nobody remembers: all are asked


# --- where they go instead --------------------------------------------------------------------------------------------

def fails(server: StubServer, how: str) -> None:
    if how == "refuse":
        server.stop()
    elif how == "reset":
        server.resets = True
    else:
        server.statuses["/v1/completions"] = int(how)


@pytest.mark.parametrize("how", ["refuse", "reset", "500", "502", "503", "504", "429"])
def test_a_request_goes_elsewhere_before_the_client_has_a_byte(tmp_path: Path, servers: list[StubServer],
                                                              how: str) -> None:
    with daemon_with(tmp_path, servers_toml(servers, interval_s=20)) as daemon:
        wait_for_servers(daemon, servers)
        fails(servers[0], how)
        found = ask(daemon, 30)
        assert set(found) == {"b", "c"}
        assert how in ("refuse", "429", "503") or 1 <= servers[0].asked["/v1/completions"] < 10     # its circuit opened


def test_all_fail_alike_and_the_client_sees_what_they_say(tmp_path: Path, servers: list[StubServer]) -> None:
    with daemon_with(tmp_path, servers_toml(servers)) as daemon:
        wait_for_servers(daemon, servers)
        for one in servers:
            one.statuses["/v1/completions"] = 500
        answer = daemon.post("/v1/completions", ASK)
        assert answer.status == 500 and "fails" in answer.json["error"]["message"]
        assert sum(one.asked["/v1/completions"] for one in servers) == 2        # the second opinion was the same
        for one in servers:
            one.statuses["/v1/completions"] = 502
        answer = daemon.post("/v1/completions", ASK)
        assert answer.status == 502 and "fails" in answer.json["error"]["message"]
        assert sum(one.asked["/v1/completions"] for one in servers) == 5        # each of the three


def test_no_more_than_max_retries(tmp_path: Path, servers: list[StubServer]) -> None:
    with daemon_with(tmp_path, servers_toml(servers, retries=1)) as daemon:
        wait_for_servers(daemon, servers)
        for one in servers:
            one.statuses["/v1/completions"] = 502
        assert daemon.post("/v1/completions", ASK).status == 502
        assert sum(one.asked["/v1/completions"] for one in servers) == 2


def test_a_server_that_hangs_costs_one_time_limit_and_what_it_has_goes_elsewhere(tmp_path: Path,
                                                                                servers: list[StubServer]) -> None:
    with daemon_with(tmp_path, servers_toml(servers[:2], interval_s=1)) as daemon:
        wait_for_servers(daemon, servers[:2])
        servers[0].hangs["*"] = True
        assert ask(daemon, 10) == {"b": 10}
        assert servers[0].asked["/v1/completions"] <= 2         # then it was known to hang


def test_what_is_asked_for_too_often_is_left_alone_as_long_as_it_says(tmp_path: Path,
                                                                     servers: list[StubServer]) -> None:
    with daemon_with(tmp_path, servers_toml(servers[:2])) as daemon:
        wait_for_servers(daemon, servers[:2])
        for one in servers[:2]:
            one.statuses["/v1/completions"], one.extra["Retry-After"] = 429, "50"
        assert daemon.post("/v1/completions", ASK).status == 429        # the last one's own answer
        answer = daemon.post("/v1/completions", ASK)
        assert (answer.status, answer.error["code"]) == (429, "backends_busy")
        assert 1 <= int(answer.headers["retry-after"]) <= 50
        assert [one.asked["/v1/completions"] for one in servers[:2]] == [1, 1]


def test_all_are_down(tmp_path: Path, servers: list[StubServer]) -> None:
    with daemon_with(tmp_path, servers_toml(servers[:1])) as daemon:
        wait_for_servers(daemon, servers[:1])
        servers[0].stop()
        wait_until(lambda: listed(daemon)["m"]["status"] == "down")
        answer = daemon.post("/v1/completions", ASK)
        assert (answer.status, answer.error["code"]) == (503, "no_server_up") and "retry-after" in answer.headers
        servers[0].start()
        wait_until(lambda: listed(daemon)["m"]["status"] == "ready")
        assert ask(daemon) == {"a": 1}


def test_an_answer_that_has_begun_is_not_begun_again(tmp_path: Path, servers: list[StubServer]) -> None:
    with daemon_with(tmp_path, servers_toml(servers)) as daemon:
        wait_for_servers(daemon, servers)
        for one in servers:
            one.cut_after = 5
        with pytest.raises(http.client.IncompleteRead):
            daemon.post("/v1/completions", ASK)
        assert sum(one.asked["/v1/completions"] for one in servers) == 1


def test_a_server_that_dies_between_head_and_body_has_not_answered(tmp_path: Path, servers: list[StubServer]) -> None:
    """vLLM writes one after the other: the client has got nothing yet, and another server answers it."""
    with daemon_with(tmp_path, servers_toml(servers)) as daemon:
        wait_for_servers(daemon, servers)
        for one in servers[1:]:
            one.cut_after = 0
        assert set(ask(daemon, 20)) == {"a"}
        assert all(one.asked["/v1/completions"] for one in servers)


def test_redirects_are_passed_on_and_not_followed(tmp_path: Path, servers: list[StubServer]) -> None:
    with daemon_with(tmp_path, servers_toml(servers[:1])) as daemon:
        wait_for_servers(daemon, servers[:1])
        servers[0].statuses["/v1/completions"], servers[0].extra["Location"] = 307, servers[1].url
        answer = daemon.post("/v1/completions", ASK)
        assert answer.status == 307 and not servers[1].asked["/"]


# --- the file ---------------------------------------------------------------------------------------------------------

def test_an_unreachable_server_at_the_start_is_no_exit(tmp_path: Path, servers: list[StubServer]) -> None:
    gone = StubServer("gone")
    gone.server_close()
    with daemon_with(tmp_path, servers_toml([gone, servers[0]])) as daemon:
        wait_for_servers(daemon, servers[:1])
        assert ask(daemon, 5) == {"a": 5}
        wait_until(lambda: "unknown -> down" in daemon.log)


def test_a_bad_file_at_the_start_is_named_with_its_line(tmp_path: Path, servers: list[StubServer]) -> None:
    text = servers_toml(servers[:1], capacity=0)
    (tmp_path / "servers.toml").write_text(text)
    daemon = Daemon(tmp_path)
    try:
        with pytest.raises(AssertionError, match=r"servers\.toml:3: max_concurrent_requests = 0: expected"):
            daemon.start()
    finally:
        daemon._end_everything()


def test_the_file_is_read_again_when_it_changes_and_a_bad_one_changes_nothing(tmp_path: Path,
                                                                             servers: list[StubServer]) -> None:
    with daemon_with(tmp_path, servers_toml(servers[:1])) as daemon:
        wait_for_servers(daemon, servers[:1])
        (tmp_path / "servers.toml").write_text(servers_toml(servers[1:]))
        wait_for_servers(daemon, servers[1:])
        assert set(ask(daemon, 30)) == {"b", "c"}
        (tmp_path / "servers.toml").write_text("[servers]\nservers = [\n{ url = 'gpu:1' } ]\n")
        wait_until(lambda: "servers.toml:3" in daemon.log)
        assert "servers.toml:3" in daemon.get("/health").json["config"]["error"]
        assert set(ask(daemon, 30)) == {"b", "c"}
        answer = daemon.post("/admin/reload")
        assert answer.status == 400 and "servers.toml:3" in answer.error["message"]
        (tmp_path / "servers.toml").unlink()
        wait_until(lambda: "is gone" in daemon.log)
        assert set(ask(daemon, 30)) == {"b", "c"}


def test_a_server_that_is_taken_off_the_list_finishes_what_it_has(tmp_path: Path, servers: list[StubServer]) -> None:
    with daemon_with(tmp_path, servers_toml(servers[:1])) as daemon:
        wait_for_servers(daemon, servers[:1])
        servers[0].hangs["/v1/completions"] = True
        connection = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=120)
        try:
            connection.request("POST", "/v1/completions", json.dumps(ASK), {"Content-Type": "application/json"})
            wait_until(lambda: servers[0].asked["/v1/completions"])
            (tmp_path / "servers.toml").write_text(servers_toml(servers[1:2]))
            wait_for_servers(daemon, servers[1:2])
            assert ask(daemon, 5) == {"b": 5}
            servers[0].answers_after_hang = True
            servers[0].released.set()
            answer = connection.getresponse()
            assert (answer.status, json.loads(answer.read())["server"]) == (200, "a")
        finally:
            connection.close()


# --- another vllm-server ----------------------------------------------------------------------------------------------

def test_another_vllm_server_offers_what_it_has_and_a_loop_is_found(tmp_path: Path) -> None:
    with StubServer("a") as engine, Daemon(tmp_path / "first") as first, Daemon(tmp_path / "second") as second:
        for daemon, others in ((first, [second.port]), (second, [first.port, engine.port])):
            entries = "".join(f'{{ url = "http://127.0.0.1:{port}", max_concurrent_requests = 8 }},' for port in others)
            (daemon.folder / "servers.toml").write_text(
                f"[servers]\nservers = [{entries}]\n[config]\nhealth_check_interval = 0.5\n")
        wait_for_models(first, "m")
        assert len(listed(first)["m"]["via"]) == 2 and ask(first, 5) == {"a": 5}
        made = first.create("org/m")
        wait_for_models(second, "org/m")
        answer = second.post("/v1/completions", {"model": "org/m", "prompt": "x"})
        assert answer.status == 200 and "simulated" in answer.body.decode()
        first.remove(made["id"])
        wait_until(lambda: "org/m" not in listed(second) and "org/m" not in listed(first))      # no echo is left
        via = second.post("/v1/completions", {"model": "m", "prompt": "x"},
                          {"Via": f"1.1 {listed(second)['m']['via'][0]}"})
        assert (via.status, via.error["code"]) == (508, "loop_detected")


def test_a_model_that_another_vllm_server_would_have_to_load_is_loaded_there(tmp_path: Path) -> None:
    with Daemon(tmp_path / "second") as second:
        (second.folder / "config.yaml").write_text(
            json.dumps({"models": {"cold": {"model_path": "org/cold"}, "bad": {
                "model_path": "org/bad", "params": {"additional_config": {"sim": {"fail": "no_weights"}}}}}}))
        wait_until(lambda: second.get("/admin/models/bad").status == 200)
        with daemon_with(tmp_path / "first", "[servers]\nservers = [{ url = \"http://127.0.0.1:"
                         f"{second.port}\", max_concurrent_requests = 8 }}]\n") as first:
            wait_until(lambda: listed(first).get("cold", {}).get("status") == "unloaded")
            assert second.instances() == []
            answer = first.post("/v1/completions", ASK | {"model": "cold"})
            assert answer.status == 200 and "simulated" in answer.body.decode()
            assert first.instances() == [] and [one["status"] for one in second.instances()] == ["ready"]
            failed = first.post("/v1/completions", ASK | {"model": "bad"})
            assert (failed.status, failed.error["code"]) == (404, "no_weights")     # its cause, as it was told there
            second.remove()


def every_answer_has_an_id(answers: Sequence[Answer]) -> None:
    assert all(answer.headers["x-request-id"] for answer in answers)
    assert len({answer.headers["x-request-id"] for answer in answers}) == len(answers)


def test_every_answer_has_a_request_id_and_the_log_tells_it(tmp_path: Path, servers: list[StubServer]) -> None:
    with daemon_with(tmp_path, servers_toml(servers[:2], interval_s=20)) as daemon:
        wait_for_servers(daemon, servers[:2])
        every_answer_has_an_id([daemon.get("/health"), daemon.get("/nothing"), daemon.post("/v1/completions", b"{"),
                                daemon.post("/v1/completions", ASK), daemon.post("/v1/completions", {"model": "no"})])
        assert b"X-Request-Id: " in daemon.raw(b"BROKEN\r\n\r\n")
        servers[0].stop()
        for number in range(20):
            answer = daemon.post("/v1/completions", ASK, {"X-Request-Id": f"mine-{number}"})
            assert answer.headers["x-request-id"] == f"mine-{number}"
        assert "[mine-" in daemon.log and "goes elsewhere" in daemon.log
        odd = daemon.post("/v1/completions", ASK, {"X-Request-Id": "two words"})
        assert odd.headers["x-request-id"] not in ("", "two words")


def test_a_server_that_has_lost_the_model_meanwhile(tmp_path: Path, servers: list[StubServer]) -> None:
    with daemon_with(tmp_path, servers_toml(servers[:2], interval_s=5)) as daemon:
        wait_for_servers(daemon, servers[:2])
        servers[0].statuses["/v1/completions"], servers[0].entries = 404, [{"id": "other"}]
        assert ask(daemon, 10) == {"b": 10}
        wait_until(lambda: "other" in listed(daemon))       # it was asked again
        servers[1].statuses["/v1/completions"] = 404
        answer = daemon.post("/v1/completions", ASK)
        assert answer.status == 404 and "fails" in answer.json["error"]["message"]      # its own words


def test_a_server_behind_https_serves_through_the_daemon(tmp_path: Path, certificate: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    stream = b"data: {}\n\n" * 3
    with StubServer("a", tls=context) as server, \
            daemon_with(tmp_path, servers_toml([server], more=f', tls = {{ ca = "{certificate}" }}')) as daemon:
        wait_for_servers(daemon, [server])
        assert ask(daemon, 5) == {"a": 5}
        server.bodies["/v1/completions"], server.streams = stream, True
        with daemon.open("POST", "/v1/completions", ASK | {"stream": True}) as response:
            assert response.read() == stream        # carried by a thread: a relay cannot take it
        assert daemon.get("/load-stats").json["servers"][0]["in_flight"] == 0


@pytest.mark.parametrize("relays", ["0", "1"])
def test_a_stream_that_falls_silent_is_cut(tmp_path: Path, relays: str) -> None:
    with Daemon(tmp_path / "d", {"STREAM_IDLE_TIMEOUT": "1", "RELAYS": relays}) as daemon:
        made = daemon.create("org/m", sim={"tokens_per_s": 0.01})
        with daemon.open("POST", "/v1/completions", {"model": "org/m", "prompt": "x", "stream": True}) as response:
            received = b""
            with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
                while piece := response.read1(65536):
                    received += piece
                raise AssertionError(f"a good end: {received!r}")
        assert received.startswith(b"data: ") and b"[DONE]" not in received
        wait_until(lambda: daemon.instance(made["id"])["in_flight"] == 0)
