"""Looks at the daemon every few seconds and writes down what it sees (web/figures.py), and tells it (web/events.py).

The engines' own figures stand on their /metrics, which cost them 10 to 30 ms each time.  So an engine is asked only if
something may have happened to it since it was asked last: requests are in it, or one has ended since then.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from instances.instance import Instance, InstanceView, State
from router import Router
from routing.policies import Reading
from routing.remote import Origin
from routing.scrape import Totals, gauges, totals
from web.events import Feed
from web.figures import NO_TOTALS, NOTHING, Figures, Ring, Sample, rates, shown, together

SAME_S = 0.05           # two moments of the wall clock that are one
ASK_S = 2.0             # for all engines' pages together


class _Asked(NamedTuple):
    """What an engine said last."""

    at: float                   # monotonic
    last_used_at: float         # of the instance, then: unchanged while nothing came to it
    idle: bool                  # nothing was in it
    totals: Totals
    cache_usage: float | None


class Sampler:
    """`tick(now)` on a loop of its own: it blocks while engines answer, ASK_S and a little at most."""

    def __init__(self, router: Router, ring: Ring, feed: Feed, *, wall: Callable[[], float] = time.time) -> None:
        self._router = router
        self._ring = ring
        self._feed = feed
        self._wall = wall
        self._began_at = wall()
        self._asked: dict[str, _Asked] = {}
        self._answers: Counter[tuple[str, str]] = Counter()     # by model and backend
        self._ticked_at: float | None = None

    def tick(self, now: float) -> None:
        views = self._router.manager.snapshot()
        ready = {view.id: view for view in views if view.state is State.READY and view.port}
        pages = self._router.checker.ask_all(
            {id_: Origin.local(view.port or 0) for id_, view in ready.items() if self._may_differ(view)},
            "/metrics", ASK_S)
        before_s, self._ticked_at = self._ticked_at, now
        seconds = now - before_s if before_s is not None else 0.0
        answers, before = self._count_answers(views), self._answers
        self._answers = answers
        answered = {key: number - before[key] for key, number in answers.items() if number > before[key]}
        if before_s is None or seconds <= 0:
            answered, seconds = {}, self._ring.every_s      # of what was before, nobody knows when
        by_backend: Counter[str] = Counter()
        for (_, backend), number in answered.items():
            by_backend[backend] += number
        found = {}
        for view in views:
            body = pages[view.id].body if view.id in pages and pages[view.id].status == 200 else None
            found[view.id] = self._figures(view, body, now, by_backend[view.id] / seconds)
        self._asked = {id_: one for id_, one in self._asked.items() if id_ in ready}
        sample = self._sample(views, found, answered, seconds)
        self._ring.add(sample)
        self._feed.publish("sample", {
            "total": shown(sample.total), "instances": {id_: shown(one) for id_, one in sample.instances.items()},
            "models": {name: shown(one) for name, one in sample.models.items()}, "names": dict(sample.names)},
            keep=False)

    def _may_differ(self, view: InstanceView) -> bool:
        asked = self._asked.get(view.id)
        return asked is None or not asked.idle or view.in_flight > 0 or view.last_used_at > asked.last_used_at + SAME_S

    def _count_answers(self, views: list[InstanceView]) -> Counter[tuple[str, str]]:
        servers = {one.name for one in self._router.fleet.views()}
        counted: Counter[tuple[str, str]] = Counter()
        for (model, backend, _), number in self._router.observed.seen({*(one.id for one in views), *servers}
                                                                      ).answers.items():
            counted[model, backend] += number
        return counted

    def _figures(self, view: InstanceView, body: bytes | None, now: float, requests_per_s: float) -> Figures:
        if view.state is not State.READY:
            return NOTHING._replace(in_flight=view.in_flight)
        before = self._asked.get(view.id)
        if body is None or (told := totals(body)) is None or (load := gauges(body)) is None:
            if before is not None and not self._may_differ(view):       # it was not asked: nothing happened
                return NOTHING._replace(cache_usage=before.cache_usage)
            return Figures(None, None, requests_per_s, None, view.in_flight, 0.0, None)
        idle = view.in_flight == 0 and load.running == 0 and load.waiting == 0
        self._asked[view.id] = _Asked(now, view.last_used_at, idle, told, load.cache_usage)
        self._router.balancer.note_reading(view.id, Reading(now, load.running, load.waiting,
                                                            cache_usage=load.cache_usage))
        since, seconds = told, self._ring.every_s       # what an engine counted before this daemon, nobody knows when
        if before is not None:
            # One that idled in between was not asked: what it counts now came since the sample before.
            since, seconds = before.totals, seconds if before.idle else max(now - before.at, 0.1)
        elif view.created_at >= self._began_at:
            since = NO_TOTALS
        tokens, prompts, ttft_s = rates(since, told, seconds)
        return Figures(tokens, prompts, requests_per_s, ttft_s, view.in_flight, load.waiting, load.cache_usage)

    def _sample(self, views: list[InstanceView], found: Mapping[str, Figures],
                answered: Mapping[tuple[str, str], int], seconds: float) -> Sample:
        queues = self._router.manager.queues()
        names = {view.id: view.names[0] for view in views}
        by_model: dict[str, list[Figures]] = {}
        for view in views:
            by_model.setdefault(names[view.id], []).append(found[view.id])
        models = {name: together((one, max(one.requests_per_s, 1e-9)) for one in parts)
                  for name, parts in by_model.items()}
        # Requests count for the name that they asked for; an alias is the model it stands for.
        called = {name: names[view.id] for view in views for name in view.names}
        asked_for: Counter[str] = Counter()
        for (model, _), number in answered.items():
            asked_for[called.get(model, model)] += number
        for name in {*models, *asked_for, *queues}:
            if not name:
                continue
            one = models.get(name, NOTHING)
            models[name] = one._replace(requests_per_s=asked_for[name] / seconds,
                                        waiting=one.waiting + queues.get(name, 0))
        total = together((one, max(one.requests_per_s, 1e-9)) for one in found.values())
        total = total._replace(requests_per_s=sum(answered.values()) / seconds,
                               waiting=total.waiting + sum(queues.values()))
        return Sample(self._wall(), total, dict(found), {name: one for name, one in models.items() if one != NOTHING},
                      names)


class Lookout:
    """Tells of instances what has changed: each new state as it comes, the rest once a second."""

    def __init__(self, router: Router, feed: Feed, to_json: Callable[[InstanceView], dict[str, Any]]) -> None:
        self._router = router
        self._feed = feed
        self._to_json = to_json
        self._shown: dict[str, tuple[object, ...]] = {}
        self._phases: dict[str, tuple[str, str]] = {}
        self._used: dict[str, float] = {}       # when each was last used, wall clock

    def changed(self, instance: Instance, old: State | None) -> None:
        """The registry's listener: under its lock."""
        self._feed.publish("state", {
            "instance": instance.id, "model": instance.names[0], "from": old and str(old),
            "to": str(instance.state), "why": instance.why})

    def tick(self, now: float) -> None:
        views = {view.id: view for view in self._router.manager.snapshot()}
        for view in views.values():
            seen = (view.state, view.phase, None if view.progress is None else round(view.progress, 2), view.in_flight,
                    view.names, view.devices, view.pid, view.port, view.restarts, view.memory_planned_bytes,
                    view.memory_measured_bytes, view.last_error, self._last_used(view))
            self._phase(view)
            if self._shown.get(view.id) != seen:
                self._shown[view.id] = seen
                self._feed.publish("instance", {"data": self._to_json(view)}, keep=False)
        for gone in self._shown.keys() - views.keys():
            del self._shown[gone]
            self._phases.pop(gone, None)
            self._used.pop(gone, None)
            self._feed.publish("gone", {"instance": gone}, keep=False)

    def _last_used(self, view: InstanceView) -> float:
        """The same as long as nothing came: it is reckoned from two clocks each time, which differ by a hair."""
        before = self._used.get(view.id)
        if before is None or abs(view.last_used_at - before) > SAME_S:
            self._used[view.id] = before = view.last_used_at
        return before

    def _phase(self, view: InstanceView) -> None:
        """A step of a load, remembered like a state."""
        phase = (str(view.state), view.phase)
        if view.state in (State.STARTING, State.WAKING) and view.phase and self._phases.get(view.id) != phase:
            self._feed.publish("phase", {"instance": view.id, "model": view.names[0], "phase": view.phase,
                                         "progress": view.progress})
        self._phases[view.id] = phase
