"""One daemon with real instances for all tests, as each start takes half a minute; the tests run in a fixed order.

What only asks comes first, what kills and stops comes later, so that few instances must be started anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from .real_daemon import Model, RealDaemon, find_engine, make_bert, make_llama

ORDER = ("test_loading", "test_cold", "test_sdks", "test_client", "test_page", "test_replicas", "test_crash",
         "test_chaos", "test_idle", "test_stop", "test_failures", "test_five_models")
GUARD_S = 1500      # for one test and what it needs
COMMENTS_SOON = {"routing.commented.AFTER_S": 1.0, "routing.commented.EVERY_S": 0.5}     # however fast a start is

_figures: list[str] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: ORDER.index(item.path.stem))
    for item in items:
        item.add_marker(pytest.mark.timeout(GUARD_S))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line("")
    for figure in _figures:
        terminalreporter.write_line(figure)


@pytest.fixture
def note() -> Callable[[str], None]:
    """Takes a measured figure, for the end of the report."""
    return _figures.append


@dataclass(frozen=True)
class Models:
    tiny: Model         # the first llama
    third: Model        # another one
    bert: Model


@pytest.fixture(scope="session")
def engine() -> str:
    return find_engine()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder: Path = tmp_path_factory.mktemp("models")
    return Models(make_llama(folder / "tiny-llama", "tiny"), make_llama(folder / "third-llama", "third"),
                  make_bert(folder / "tiny-bert", "bert"))


@pytest.fixture(scope="session")
def shared_daemon(engine: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealDaemon]:
    with RealDaemon(tmp_path_factory.mktemp("daemon"), engine, patch=COMMENTS_SOON) as running:
        yield running


@pytest.fixture
def daemon(shared_daemon: RealDaemon) -> RealDaemon:
    """The shared one, running."""
    return shared_daemon.start() if shared_daemon.exited() else shared_daemon
