"""Hung, dead, or only busy: scripted answers to the questions, and a clock that the test moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from instances import probe
from instances.probe import Answer
from instances.watchdog import Verdict, Watchdog

OK = Answer(200)
REFUSED = Answer(0)


@dataclass
class Server:
    """Answers by path; None is silence."""

    answers: dict[str, Answer | None | Callable[[], Answer | None]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    open: int = 0
    tokens: float = 0.0

    def answer(self, path: str) -> Answer | None:
        if path == "/metrics" and path not in self.answers:
            return Answer(200, b'vllm:generation_tokens_total{a="b"} %f\n' % self.tokens)
        found = self.answers.get(path, OK)
        return found() if callable(found) else found


class Watched:
    def __init__(self, server: Server) -> None:
        self.server = server
        self.now = 0.0
        self.last_success = 0.0
        self.dog = Watchdog(9000, "chat", 0.0)

    def look(self, seconds: float = 0.0, times: int = 1) -> Verdict | None:
        for _ in range(times):
            self.now += seconds
            found = self.dog.look(self.now, last_success=self.last_success, interval_s=30.0, timeout_s=60.0)
            if found is not None:
                return found
        return None


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()

    class Question:
        sent = True

        def __init__(self, port: int, method: str, path: str, body: object = None) -> None:
            assert port == 9000
            server.asked.append(path)
            server.open += 1
            self._path, self._closed = path, False

        def poll(self) -> Answer | None:
            assert not self._closed
            return server.answer(self._path)

        def close(self) -> None:
            server.open -= not self._closed
            self._closed = True

    monkeypatch.setattr(probe, "Probe", Question)
    return server


@pytest.fixture
def watched(server: Server) -> Watched:
    return Watched(server)


def test_nothing_is_asked_before_the_interval_is_over(watched: Watched) -> None:
    watched.look(29.9)
    assert watched.server.asked == []


def test_health_then_tokens_then_a_real_request(watched: Watched) -> None:
    assert watched.look(30.0) is None
    assert watched.look(times=10) is None
    assert watched.server.asked == ["/health", "/metrics", "/v1/completions"]
    assert watched.server.open == 0
    watched.look(29.0, times=1)
    assert len(watched.server.asked) == 3
    watched.look(1.0)
    assert watched.server.asked[3:] == ["/health"]


def test_an_interval_of_zero_never_asks(watched: Watched) -> None:
    for _ in range(10):
        watched.now += 1e6
        assert watched.dog.look(watched.now, last_success=0.0, interval_s=0.0, timeout_s=60.0) is None
    assert watched.server.asked == []


def test_requests_that_are_answered_are_proof_enough(watched: Watched) -> None:
    for _ in range(100):
        watched.last_success = watched.now
        watched.look(20.0)
    assert watched.server.asked == []


def test_silence_is_a_hang_after_the_timeout(watched: Watched) -> None:
    watched.server.answers["/v1/completions"] = None
    watched.look(30.0)
    assert watched.look(times=3) is None
    assert watched.look(59.9) is None
    assert watched.look(0.2, times=2) is Verdict.HANGS
    assert watched.server.asked[-1] == "/metrics" and watched.server.open == 0


def test_tokens_that_are_made_meanwhile_tell_busy_from_hung(watched: Watched) -> None:
    """A long queue: the question waits its turn, and others are served."""
    watched.server.answers["/v1/completions"] = None
    for _ in range(20):
        watched.server.tokens += 100
        assert watched.look(20.0) is None
    watched.look(30.0, times=3)
    assert watched.look(61.0, times=4) is Verdict.HANGS       # none any more


def test_a_request_that_ends_well_meanwhile_tells_it_too(watched: Watched) -> None:
    watched.server.answers["/v1/completions"] = None
    watched.look(30.0)
    watched.look(times=3)
    watched.last_success = watched.now + 1.0
    assert watched.look(61.0, times=2) is None


@pytest.mark.parametrize("metrics", [None, Answer(0), Answer(500)])
def test_without_metrics_silence_is_a_hang(watched: Watched, metrics: Answer | None) -> None:
    watched.server.answers |= {"/v1/completions": None, "/metrics": metrics}
    watched.look(30.0)
    assert watched.look(6.0, times=20) is Verdict.HANGS


def test_health_that_is_not_answered_is_a_hang(watched: Watched) -> None:
    watched.server.answers["/health"] = None
    watched.look(30.0)
    assert watched.look(59.0) is None
    assert watched.look(2.0) is Verdict.SILENT


def test_a_server_that_says_so_is_dead(watched: Watched) -> None:
    watched.server.answers["/health"] = Answer(503)
    watched.look(30.0)
    assert watched.look() is Verdict.DEAD


def test_a_server_that_takes_no_connections_is_asked_again_at_once(watched: Watched) -> None:
    watched.server.answers["/health"] = REFUSED
    watched.look(30.0)
    assert watched.look(0.25, times=10) is Verdict.CLOSED
    assert watched.server.asked == ["/health"] * 3


def test_one_refusal_is_none(watched: Watched) -> None:
    replies = iter([REFUSED, REFUSED, OK, REFUSED, REFUSED, OK])
    watched.server.answers["/health"] = lambda: next(replies, OK)
    watched.look(30.0)
    assert watched.look(0.25, times=12) is None
    assert watched.look(30.0, times=12) is None


def test_each_runner_is_asked_what_it_can(watched: Watched) -> None:
    watched.server.answers |= {"/v1/completions": Answer(404), "/v1/embeddings": Answer(400)}
    watched.look(30.0)
    watched.look(times=10)
    assert watched.server.asked[2:] == ["/v1/completions", "/v1/embeddings", "/classify"]
    watched.look(30.0)
    watched.look(times=10)
    assert watched.server.asked[5:] == ["/health", "/metrics", "/classify"]       # and not the others again


def test_a_runner_that_can_none_of_it_is_asked_for_health_only(watched: Watched) -> None:
    watched.server.answers |= dict.fromkeys(probe.INFERENCE, Answer(404))
    watched.look(30.0)
    watched.look(times=20)
    asked = len(watched.server.asked)
    watched.look(30.0)
    watched.look(times=5)
    assert watched.server.asked[asked:] == ["/health"]


def test_for_its_health_alone_no_other_question_stays_open(watched: Watched) -> None:
    watched.server.answers["/v1/completions"] = None
    watched.look(30.0, times=1)
    watched.look(times=3)
    assert watched.server.open == 1
    watched.dog.ask_health_alone()
    assert watched.server.open == 0
    asked = len(watched.server.asked)
    assert watched.look(30.0, times=10) is None
    watched.dog.ask_health_alone()      # as often as one likes: what is open stays so
    assert set(watched.server.asked[asked:]) == {"/health"}
    watched.server.answers["/health"] = None
    assert watched.look(30.0, times=4) is Verdict.SILENT


@pytest.mark.parametrize("answer", [Answer(500), Answer(401), REFUSED])
def test_an_error_is_an_answer(watched: Watched, answer: Answer) -> None:
    watched.server.answers["/v1/completions"] = answer
    watched.look(30.0)
    assert watched.look(times=10) is None


def test_a_closed_one_asks_nothing_more(watched: Watched) -> None:
    watched.server.answers["/health"] = None
    watched.look(30.0)
    watched.dog.close()
    watched.dog.close()
    assert watched.server.open == 0


def test_what_could_not_be_asked_says_nothing_of_the_engine(
        watched: Watched, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon may have no descriptor left for hours; the engine is well."""
    server.answers["/health"] = None
    monkeypatch.setattr(probe.Probe, "sent", False)
    assert watched.look(31.0) is None
    assert watched.look(3600.0, times=5) is None
    monkeypatch.setattr(probe.Probe, "sent", True)
    assert watched.look(59.0) is None
    assert watched.look(2.0) is Verdict.SILENT      # its time began when it was asked
