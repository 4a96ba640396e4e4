"""Strikes, step by step, under load, and looks after each step at what must hold.  What came of it: `Report`."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from tests.chaos import invariants
from tests.chaos.faults import FAULTS, SKIPPED
from tests.chaos.invariants import Broken
from tests.chaos.load import GOOD, NEVER, REFUSED, Asked, Load
from tests.chaos.schedule import Step
from tests.chaos.world import World

LOOK_S = 0.2


@dataclass
class Struck:
    """One step, and what came of it.  Times are monotonic; `until`: when all had come to rest."""

    step: Step
    began: float
    until: float = 0.0
    what: list[str] = field(default_factory=list)
    in_flight: int = 0
    lost: list[Asked] = field(default_factory=list)
    recovered_s: float | None = None
    agreed_s: float | None = None

    @property
    def codes(self) -> set[str]:
        return set().union(*(FAULTS[one.kind].codes for one in self.step.faults))


class Runner:
    """`say` gets a line for each thing that happens, with its time since the start."""

    def __init__(self, world: World, load: Load, say: Callable[[str], None]) -> None:
        self._world, self._load = world, load
        self._began = time.monotonic()
        self._say = lambda text: say(f"[{time.monotonic() - self._began:7.2f} s] {text}")
        self._read = 0          # of the load's requests
        self._log_read = 0      # bytes of the daemon's log
        self.done: list[Struck] = []
        self.broken: list[str] = []
        self.unexplained = 0

    def run(self, steps: Iterable[Step], seconds: float, *, go_on: bool = False) -> None:
        """As many steps as begin within so many seconds; none after an invariant broke, unless `go_on`."""
        deadline = time.monotonic() + seconds
        for step in steps:
            if time.monotonic() >= deadline or (self.broken and not go_on):
                return
            self.strike(step)

    def strike(self, step: Step) -> None:
        self._pause(step.calm_s)
        struck, broken_before = Struck(step, began=time.monotonic()), len(self.broken)
        self.done.append(struck)
        self._say(f"step {step.number}: {step}")
        try:
            self._strike(struck)
        except AssertionError as error:     # Broken, or what a fault expected
            self.broken.append(f"step {step.number} ({step}): {error}")
        struck.until = time.monotonic()
        self._judge(struck)
        self._judge_log(struck)
        for text in self.broken[broken_before:]:
            self._say(f"BROKEN: {text}")
        turned_away = sum(one.outcome == REFUSED for one in struck.lost)
        self._say(f"    recovered {_seconds(struck.recovered_s)}, registry right {_seconds(struck.agreed_s)}, "
                  f"{struck.in_flight} in flight, {len(struck.lost) - turned_away} lost, {turned_away} refused "
                  f"{dict(Counter(str(one.outcome) for one in struck.lost)) or ''}")

    def _strike(self, struck: Struck) -> None:
        world, step = self._world, struck.step
        world.hit.clear()
        world.refusals.clear()
        struck.in_flight = len(self._load.in_flight())
        counts_from = time.monotonic()
        with contextlib.ExitStack() as acting:
            for number, plan in enumerate(step.faults):
                if number:
                    self._pause(step.between_s)
                what = acting.enter_context(FAULTS[plan.kind].struck(world, plan))
                struck.what.append(what)
                self._say(f"    {plan.kind}: {what}")
            self._pause(max(plan.hold_s for plan in step.faults))
        over = time.monotonic()
        if not all(FAULTS[plan.kind].from_strike for plan in step.faults):
            counts_from = over
        for text in world.refusals:
            self._say(f"    it did not start: {text}")
        world.ensure_running()
        with ThreadPoolExecutor(1) as pool:
            agreed = pool.submit(self._agrees)
            invariants.settles(self._does_not_serve, "it does not serve again")
            struck.recovered_s = time.monotonic() - counts_from
            struck.agreed_s = agreed.result() - over
        with self._load.paused():
            invariants.at_rest(world, self._load)

    def _agrees(self) -> float:
        """When the registry was right."""
        invariants.settles(lambda: invariants.disagreement(self._world), "the registry is wrong")
        return time.monotonic()

    def _does_not_serve(self) -> str | None:
        """None once each model that was hit has answered, and one at least."""
        for model in sorted(self._world.hit) or ["alpha"]:
            if (problem := self._question(model)) is not None:
                return problem
        self._world.hit.clear()
        return None

    def _question(self, model: str) -> str | None:
        try:
            answer = self._world.daemon.post("/v1/chat/completions", {
                "model": model, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1})
        except (OSError, ValueError) as error:
            return repr(error)
        return None if answer.status == 200 else f"{model}: {answer.status} {answer.body[:300]!r}"

    def _pause(self, seconds: float) -> None:
        """Time passes, and what holds at any time is looked at."""
        until = time.monotonic() + seconds
        while (left_s := until - time.monotonic()) > 0:
            time.sleep(min(left_s, LOOK_S))
            invariants.whole_files(self._world)
            invariants.double_start(self._world)

    # --- judgement ------------------------------------------------------------------------------------------------

    def _judge(self, struck: Struck) -> None:
        """Every request that has ended since: answered, or told why by a code that this step explains."""
        while self._read < len(self._load.asked) and self._load.asked[self._read].outcome is not None:
            asked = self._load.asked[self._read]
            self._read += 1
            if not asked.lost:
                continue
            struck.lost.append(asked)
            assert asked.ended_at is not None
            before = len(self.broken)
            if asked.outcome in NEVER:
                self.broken.append(f"step {struck.step.number}: {asked}")
            elif asked.ended_at < struck.began:
                self.broken.append(f"before step {struck.step.number}, while nothing was wrong: {asked}")
            elif asked.outcome not in struck.codes:
                self.broken.append(f"step {struck.step.number} ({struck.step}) does not explain: {asked}")
            self.unexplained += len(self.broken) - before

    def _judge_log(self, struck: Struck) -> None:
        path = self._world.daemon.log_path
        with open(path, "rb") as file:
            file.seek(self._log_read)
            text = file.read().decode(errors="replace")
            self._log_read = file.tell()
        if (at := text.find("Traceback")) >= 0:
            self.broken.append(f"step {struck.step.number} ({struck.step}): the daemon logged\n"
                               f"{text[max(0, at - 300):at + 2500]}")

    # --- what came of it ------------------------------------------------------------------------------------------

    def report(self) -> str:
        asked = [one for one in self._load.asked if one.outcome is not None]
        lines = [f"{'fault':<24} {'struck':>6} {'alone':>5} {'in flight':>9} {'lost':>5} {'refused':>7} "
                 f"{'recovered: median':>18} {'max':>7} {'registry right: max':>20}"]
        by_kind: dict[str, list[Struck]] = defaultdict(list)
        for struck in self.done:
            for plan, what in zip(struck.step.faults, struck.what, strict=False):
                if what != SKIPPED:
                    by_kind[plan.kind].append(struck)
        for kind in FAULTS:
            found = by_kind[kind]
            alone = [one for one in found if len(one.step.faults) == 1]     # of two nobody knows which one it took
            times = [one.recovered_s for one in alone if one.recovered_s is not None]
            lost = [asked for one in found for asked in one.lost]
            agreed = [one.agreed_s for one in found if one.agreed_s is not None]
            lines.append(
                f"{kind:<24} {len(found):>6} {len(alone):>5} "
                f"{sum(one.in_flight for one in found):>9} {sum(asked.outcome != REFUSED for asked in lost):>5} "
                f"{sum(asked.outcome == REFUSED for asked in lost):>7} "
                f"{_seconds(statistics.median(times) if times else None):>18} {_seconds(max(times, default=None)):>7} "
                f"{_seconds(max(agreed, default=None)):>20}")
        errors = [one for one in asked if one.lost]
        good = sum(one.outcome == GOOD for one in asked)
        lines += ["", f"faults     {sum(map(len, by_kind.values()))} in {len(self.done)} steps",
                  f"requests   {len(asked)}: {good} answered, {len(asked) - good - len(errors)} left by their clients, "
                  f"{sum(one.outcome == REFUSED for one in errors)} refused while no daemon ran, "
                  f"{sum(one.outcome != REFUSED for one in errors)} lost",
                  f"errors     {dict(Counter(str(one.outcome) for one in errors).most_common())}; all explained but "
                  f"{self.unexplained}",
                  f"invariants {len(self.broken)} broken"]
        return "\n".join(lines)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


__all__ = ["Broken", "Runner", "Struck"]
