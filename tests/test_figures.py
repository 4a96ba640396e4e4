"""web/figures.py and web/sampler.py: what is remembered of the last hour, and whom it costs something."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

from instances.instance import InstanceView, State
from routing.observed import Observed
from routing.questions import Answer
from routing.remote import Fleet
from routing.scrape import Totals
from tests.test_app import VIEW
from tests.test_exposition import about
from web.events import Feed
from web.figures import NOTHING, Figures, Ring, Sample, rates, together
from web.sampler import Lookout, Sampler

READY = replace(VIEW, in_flight=0, created_at=2000.0, last_used_at=2000.0)


def page(tokens: float, *, firsts: float = 0, firsts_s: float = 0.0, waiting: float = 0) -> bytes:
    return (f'vllm:num_requests_running{{engine="0"}} 0\nvllm:num_requests_waiting{{engine="0"}} {waiting}\n'
            f'vllm:kv_cache_usage_perc{{engine="0"}} 0.25\nvllm:prompt_tokens_total{{engine="0"}} 0.0\n'
            f'vllm:generation_tokens_total{{engine="0"}} {tokens}\n'
            f'vllm:time_to_first_token_seconds_count{{engine="0"}} {firsts}\n'
            f'vllm:time_to_first_token_seconds_sum{{engine="0"}} {firsts_s}\n').encode()


class World:
    """A router with one instance, whose engine's page a test writes."""

    def __init__(self, *views: InstanceView) -> None:
        self.views = list(views)
        self.pages: dict[str, bytes] = {}
        self.asked: list[list[str]] = []
        self.waiting: dict[str, int] = {}
        self.observed = Observed()
        self.ring, self.feed = Ring(), Feed()
        router = SimpleNamespace(
            manager=SimpleNamespace(snapshot=lambda: self.views, queues=lambda: self.waiting),
            checker=SimpleNamespace(ask_all=self._ask), fleet=Fleet(), observed=self.observed,
            balancer=SimpleNamespace(note_reading=lambda *_: None))
        self.sampler = Sampler(cast(Any, router), self.ring, self.feed, wall=lambda: 1000.0)
        self.lookout = Lookout(cast(Any, router), self.feed, lambda view: {"id": view.id})

    def _ask(self, origins: dict[str, object], path: str, limit_s: float) -> dict[str, Answer]:
        self.asked.append(sorted(origins))
        return {id_: Answer(200, self.pages[id_]) for id_ in origins if id_ in self.pages}

    def sample(self, now: float) -> Sample:
        self.sampler.tick(now)
        return self.ring.since()[-1]


# --- values -----------------------------------------------------------------------------------------------------------

def test_rates_are_what_came_between_two_readings() -> None:
    assert rates(Totals(100, 10, 1, 0.5), Totals(200, 30, 3, 1.5), 5) == (20.0, 4.0, 0.5)
    assert rates(Totals(100, 10, 1, 0.5), Totals(100, 10, 1, 0.5), 5) == (0.0, 0.0, None)


def test_an_engine_that_began_anew_counts_from_nothing() -> None:
    assert rates(Totals(1000, 10, 9, 9.0), Totals(50, 5, 1, 0.25), 5) == (10.0, 1.0, 0.25)


def test_together_adds_up_and_weighs_the_times() -> None:
    parts = [(Figures(10, 1, 3, 0.1, 2, 1, 0.5), 3.0), (Figures(None, None, 1, 0.5, 1, 0, 0.9), 1.0), (NOTHING, 0.0)]
    whole = together(parts)
    assert whole._replace(ttft_s=None) == Figures(10, 1, 4, None, 3, 1, 0.9)
    assert abs((whole.ttft_s or 0) - 0.2) < 1e-9


def test_the_ring_is_bounded_and_tells_what_is_later() -> None:
    ring = Ring(every_s=1, kept_s=10)
    for number in range(25):
        ring.add(Sample(number, Figures(number), {"i": Figures(number)}, {"m": Figures(number)}, {"i": "m"}))
    assert [one.at for one in ring.since()] == list(range(15, 25))
    assert ring.history(22)["at"] == [23, 24] and ring.history(22)["instances"]["i"]["tokens_per_s"] == [23, 24]
    assert ring.latest("i").tokens_per_s == 24 and ring.latest("unknown") == NOTHING


def test_columns_are_as_long_as_the_times_and_empty_where_nothing_was() -> None:
    ring = Ring()
    ring.add(Sample(1, NOTHING, {}, {}, {}))
    ring.add(Sample(2, NOTHING, {"i": Figures(5, ttft_s=0.1)}, {"m": Figures(5)}, {"i": "m"}))
    told = ring.history()
    assert told["instances"]["i"]["tokens_per_s"] == [None, 5] and told["instances"]["i"]["model"] == "m"
    assert told["models"]["m"]["tokens_per_s"] == [0.0, 5] and told["total"]["ttft_s"] == [None, None]


# --- sampling ---------------------------------------------------------------------------------------------------------

def test_an_engine_is_asked_only_if_something_may_have_happened_to_it() -> None:
    world = World(READY)
    world.pages[READY.id] = page(0)
    world.sample(5.0)                                                   # it is new
    world.sample(10.0)                                                  # it idles
    assert world.asked == [[READY.id], []]
    world.views = [replace(READY, in_flight=1)]
    world.pages[READY.id] = page(50, firsts=1, firsts_s=0.2)
    assert world.sample(15.0).instances[READY.id][:4] == (10.0, 0.0, 0.0, 0.2)
    world.views = [replace(READY, last_used_at=2014.0)]                 # its request has ended
    world.pages[READY.id] = page(75, firsts=1, firsts_s=0.2)
    assert world.sample(20.0).instances[READY.id].tokens_per_s == 5.0
    idle = world.sample(25.0)
    assert world.asked[2:] == [[READY.id], [READY.id], []]
    assert idle.instances[READY.id] == NOTHING._replace(cache_usage=0.25)
    world.views = [replace(READY, last_used_at=2029.0)]                 # one came and went after an hour of nothing
    world.pages[READY.id] = page(175)
    assert world.sample(30.0).instances[READY.id].tokens_per_s == 20.0


def test_what_an_engine_counted_before_this_daemon_is_not_a_burst() -> None:
    adopted, new = replace(READY, created_at=10.0), replace(READY, id="new", created_at=1001.0)
    world = World(adopted, new)
    world.pages = {adopted.id: page(1e9), new.id: page(50)}
    found = world.sample(5.0).instances
    assert found[adopted.id].tokens_per_s == 0.0 and found["new"].tokens_per_s == 10.0


def test_an_engine_that_does_not_answer_leaves_a_gap() -> None:
    world = World(replace(READY, in_flight=2))
    sample = world.sample(5.0)
    assert sample.instances[READY.id] == Figures(None, None, 0.0, None, 2, 0.0, None)
    assert sample.total.in_flight == 2


def test_requests_count_for_the_name_that_an_alias_stands_for_and_queues_too() -> None:
    world = World(replace(READY, names=("org/m", "alias")), replace(READY, id="x", names=("y",), state=State.STARTING))
    world.sample(5.0)
    world.waiting = {"y": 3, "cold": 1}
    for model in ("alias", "org/m", "elsewhere"):
        world.observed.answered(about(model=model, backend=READY.id if model != "elsewhere" else "server"), 200, 1.0)
    sample = world.sample(10.0)
    assert sample.models["org/m"].requests_per_s == 0.4 and sample.models["elsewhere"].requests_per_s == 0.2
    assert sample.instances[READY.id].requests_per_s == 0.4 and sample.total.requests_per_s == 0.6
    assert sample.models["y"].waiting == 3 and sample.models["cold"].waiting == 1 and sample.total.waiting == 4


# --- what changes -----------------------------------------------------------------------------------------------------

def test_what_does_not_change_is_not_told_again() -> None:
    world = World(replace(VIEW, state=State.STARTING, phase="loading_weights", progress=0.5))
    told: list[tuple[str, dict[str, Any]]] = []
    world.feed.publish = lambda kind, data, keep=True: told.append((kind, data))   # type: ignore[method-assign]
    world.lookout.tick(1.0)
    world.views = [replace(world.views[0], last_used_at=world.views[0].last_used_at + 0.001)]   # two clocks differ
    world.lookout.tick(2.0)
    assert [kind for kind, _ in told] == ["phase", "instance"]
    world.views = [replace(world.views[0], progress=0.6)]
    world.lookout.tick(3.0)
    world.views = []
    world.lookout.tick(4.0)
    world.lookout.tick(5.0)
    assert [kind for kind, _ in told[2:]] == ["instance", "gone"]
