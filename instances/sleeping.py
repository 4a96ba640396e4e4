"""How an engine is put to sleep and woken: what it is asked, in order, and what its answers mean.

A script is a generator: it yields a question and gets the answer back (None: it came too late), or yields None to be
called again a little later; it returns the problem, or None when all went well.  Nothing here waits: `Talk.poll` is
called by the keeper's tick.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import NamedTuple

from instances import probe
from instances.probe import Answer, Probe

MOVE_LIMIT_S = 300.0        # hundreds of gigabytes go to the host's RAM, or come back
ASK_LIMIT_S = 10.0


class Question(NamedTuple):
    what: str
    probe: Probe
    limit_s: float


Script = Generator[Question | None, Answer | None, str | None]


class Talk:
    """One script under way with one engine."""

    def __init__(self, script: Script, now: float) -> None:
        self._script = script
        self._question: Question | None = None
        self._asked_at = now
        self.ended = False
        self.problem: str | None = None
        self._go_on(None, now)

    def poll(self, now: float) -> bool:
        """Whether it has ended; then `problem` says how."""
        if self.ended:
            return True
        if self._question is None:
            self._go_on(None, now)
        else:
            answer = self._question.probe.poll()
            if answer is not None or now - self._asked_at >= self._question.limit_s:
                self._question.probe.close()
                self._go_on(answer, now)
        return self.ended

    def close(self) -> None:
        if self._question is not None:
            self._question.probe.close()
        self._script.close()
        self.ended = True

    def _go_on(self, answer: Answer | None, now: float) -> None:
        try:
            self._question = self._script.send(answer)
            self._asked_at = now
        except StopIteration as end:
            self._question, self.ended, self.problem = None, True, end.value


def is_asleep(port: int) -> bool:
    """Blocks for its answer."""
    return probe.says_it_sleeps(probe.wait(probe.is_sleeping(port)))


def put_to_sleep(port: int, level: int, settled: Callable[[], bool]) -> Script:
    """`settled`: whether the memory of its devices stands still again."""
    if problem := (yield from _ask("sleep", probe.sleep(port, level))):
        return problem
    if not probe.says_it_sleeps((yield Question("is_sleeping", probe.is_sleeping(port), ASK_LIMIT_S))):
        return "it does not say that it sleeps"
    while not settled():
        yield None
    return None


def wake_up(port: int, model: str, level: int, settled: Callable[[], bool], answer_limit_s: float) -> Script:
    """Awake is what has its memory back and answers a real request: a wake may leave an engine that only looks so."""
    if level < 2:
        problem = yield from _ask("wake_up", probe.wake_up(port))
    else:       # the weights were thrown away: room for them first, then the weights, then the rest
        problem = ((yield from _ask("wake_up of its weights", probe.wake_up(port, "weights")))
                   or (yield from _ask("reload_weights", probe.reload_weights(port)))
                   or (yield from _ask("wake_up of its KV cache", probe.wake_up(port, "kv_cache"))))
    if problem:
        return problem
    if probe.says_it_sleeps((yield Question("is_sleeping", probe.is_sleeping(port), ASK_LIMIT_S))):
        return "it says that it sleeps still"
    while not settled():
        yield None
    for path in probe.INFERENCE:
        asked = Question(f"a small request to {path}", probe.inference(port, model, path), answer_limit_s)
        answer = yield asked
        if answer is None or answer.status not in (400, 404):   # those: this runner has no such route
            return _problem(asked, answer)
    return None     # it has none of them (it transcribes)


def _ask(what: str, asked: Probe) -> Generator[Question | None, Answer | None, str | None]:
    """The problem with its answer."""
    question = Question(what, asked, MOVE_LIMIT_S)
    return _problem(question, (yield question))


def _problem(question: Question, answer: Answer | None) -> str | None:
    if answer is None:
        return f"{question.what} was not answered within {question.limit_s:g} s"
    if answer.status == 0:
        return f"its server broke the connection during {question.what}"
    if answer.status != 200:
        said = answer.body[:200].decode(errors="replace")
        return f"{question.what} was answered with {answer.status}{f': {said}' if said else ''}"
    return None
