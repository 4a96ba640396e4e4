"""Several servers under load: shares by capacity, failures that no client sees, a list that is edited meanwhile."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests import failover
from tests.fleet_world import FleetWorld, Load, OpenLoop, closed_loop, until, world

STREAMS = 60
CAPACITIES = {"a": 1, "b": 2, "c": 4, "d": 8}


def test_streams_are_shared_by_capacity(tmp_path: Path) -> None:
    with world(tmp_path, CAPACITIES, sim={"tokens_per_s": 50}, interval_s=10) as made:
        asyncio.run(closed_loop(made.url, STREAMS, 5, tokens=20))       # every place is taken
        load = asyncio.run(closed_loop(made.url, STREAMS, 20, tokens=20))
    assert not load.problems, load.problems[:3]
    shares, total = load.shares(), sum(CAPACITIES.values())
    assert all(abs(shares[name] / len(load.asked) / (capacity / total) - 1) < 0.1
               for name, capacity in CAPACITIES.items()), shares


def test_servers_that_fail_harm_no_request(tmp_path: Path) -> None:
    harms, load = failover.run(tmp_path, rate=100)
    assert [one.way for one in harms] == ["killed", "hung", "500"] and len(load.asked) > 500
    assert not load.problems, load.problems[:5]
    for one in harms:
        assert one.worst_s < failover.TIMEOUT_S, one        # a server that hangs costs at most one time limit
        assert one.back_s < 2 * failover.INTERVAL_S + 1.0, one      # and a second for the machine to be slow in


async def edits(made: FleetWorld) -> Load:
    def listed(names: str) -> None:
        made.write(list(names))

    async with OpenLoop(made.url, 50) as loop:
        for names in ("ab", "abcd", "cd", "d", "abcd"):
            await asyncio.to_thread(listed, names)
            await until(lambda names=names: set(made.load()) == set(names))
            await until(lambda names=names: set(made.health().values()) == {"up"})
            await asyncio.sleep(0.5)
        for broken in ("[servers", made.text("ab").replace("http://", ""), made.text("aa"),
                       made.text("ab").replace("= 8", "= 0"), "servers = 3"):
            made.write_text(broken)
            await until(lambda: made.daemon.get("/health").json["config"]["error"])
            assert set(made.load()) == set("abcd")
            made.write(list("abcd"))
            await until(lambda: not made.daemon.get("/health").json["config"]["error"])
    return loop.load


def test_the_list_can_be_edited_under_load(tmp_path: Path) -> None:
    with world(tmp_path, dict.fromkeys("abcd", 8), sim={"tokens_per_s": 200}) as made:
        load = asyncio.run(edits(made))
    assert len(load.asked) > 200 and set(load.shares()) == set("abcd")
    assert not load.problems, load.problems[:5]
