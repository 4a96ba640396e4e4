"""Each kind of fault by itself, and the pairs that once broke something, so that nobody needs luck to find a break."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.chaos.faults import FAULTS, SKIPPED
from tests.chaos.load import Load
from tests.chaos.runner import Runner
from tests.chaos.schedule import Plan, Step
from tests.chaos.shim import Shim
from tests.chaos.world import MODELS, World
from tests.gpu_box import needs_compiler

pytestmark = [needs_compiler, pytest.mark.timeout(900)]

CLIENTS = 4
PAIRS = (("no_process", "kill_worker"), ("full_disk", "kill_worker"), ("full_disk", "kill_daemon"),
         ("no_process", "hup_storm"), ("no_process", "kill_relay"), ("few_descriptors", "kill_core"))
COUNTED = {"slow_disk": "slowed", "full_log_disk": "refused_writes", "no_process": "refused_processes"}


class Arena:
    """One world for many tests; after one that broke it, the next gets another."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        self._stack = ExitStack()
        self._runner: Runner | None = None
        self.shim: Shim

    def runner(self) -> Runner:
        if self._runner is None:
            self._count += 1
            world = self._stack.enter_context(World(self._folder / str(self._count)))
            load = Load(lambda: world.url, MODELS, CLIENTS, 1)
            self._stack.enter_context(load.running())
            self._runner, self.shim = Runner(world, load, print), world.shim
        return self._runner

    def close(self, error: BaseException | None) -> None:
        """Raises what is wrong at the end, if nothing was before."""
        stack, self._stack, self._runner = self._stack, ExitStack(), None
        stack.__exit__(None if error is None else type(error), error, None)


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    found = Arena(tmp_path_factory.mktemp("chaos"))
    yield found
    found.close(None)


@pytest.mark.parametrize("kinds", [*((kind,) for kind in FAULTS), *PAIRS], ids=" ".join)
def test_what_must_hold_holds(arena: Arena, kinds: tuple[str, ...]) -> None:
    runner = arena.runner()
    plans = tuple(Plan(kind, 7, FAULTS[kind].shape.hold_s[1]) for kind in kinds)
    counts = {kind: arena.shim.get(COUNTED[kind]) for kind in kinds if kind in COUNTED}
    runner.strike(Step(0, 0.5, plans))
    try:
        assert runner.broken == []
    except AssertionError as error:
        arena.close(error)
        raise
    assert SKIPPED not in runner.done[-1].what
    assert all(arena.shim.get(COUNTED[kind]) > count for kind, count in counts.items()), "nobody met the fault"
