"""Who gets which devices and who makes room: examples first, then the rules over random small worlds."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import NoRoom
from gpu import Device, DeviceProcess
from instances import eviction
from instances.eviction import Option, options
from instances.footprint import Footprint
from instances.ledger import Limits, Resident, rooms
from instances.placement import Need, Plan, devices_needed, plan

GIB = 1 << 30
NOTHING_RESERVED = Limits(sleep_host_bytes=64 * GIB)


def card(index: int, used_gib: float = 0, total_gib: float = 80, **fields: Any) -> Device:
    total, used = int(total_gib * GIB), int(used_gib * GIB)
    return replace(Device(index, f"GPU-{index}", "H200", "cuda", total, used, total - used), **fields)


def host(used_gib: float, total_gib: float = 64) -> Device:
    total, used = int(total_gib * GIB), int(used_gib * GIB)
    return Device(0, "", "CPU host memory", "host", total, used, total - used)


def holder(name: str, gib: float, *devices: int, **fields: Any) -> Resident:
    """An idle one that is ready and can only be stopped."""
    return Resident(**{"id": name, "model": name, "bytes_on": {device: int(gib * GIB) for device in devices or (0,)},
                       "idle_s": 60.0, "reload_s": 30.0, **fields})


def sleepy(name: str, gib: float, *devices: int, left_gib: float = 1, **fields: Any) -> Resident:
    awake = holder(name, gib, *devices)
    return replace(awake, can_sleep=1, wake_s=2.0, host_bytes=sum(awake.bytes_on.values()),
                   asleep_on={device: int(left_gib * GIB) for device in awake.bytes_on}, **fields)


def need(gib: float, **fields: Any) -> Need:
    return Need("new", Footprint(int(gib * GIB)), **fields)


def refusal(*arguments: Any) -> NoRoom:
    with pytest.raises(NoRoom) as caught:
        plan(*arguments)
    return caught.value


# --- where there is room ----------------------------------------------------------------------------------------------

def test_the_tightest_fit_leaves_the_large_hole_whole() -> None:
    found = plan(need(20), [card(0), card(1, 50), card(2, 70)], [], NOTHING_RESERVED)
    assert (found.devices, found.visible, found.bytes_per_device) == ((1,), "GPU-1", 20 * GIB)
    assert (found.sleep, found.stop, found.after) == ((), (), ())


def test_two_models_share_a_gpu() -> None:
    first = holder("first", 30, 0, busy=True)
    assert plan(need(40), [card(0, 30), card(1, 75)], [first], NOTHING_RESERVED).devices == (0,)


def test_a_gpu_where_another_one_starts_is_taken_only_if_there_is_no_other() -> None:
    cards, limits = [card(0, 40), card(1)], replace(NOTHING_RESERVED, in_turn={0})
    assert plan(need(20), cards, [], limits).devices == (1,)
    assert plan(need(20), cards[:1], [], limits).devices == (0,)


def test_the_reserve_stays_free() -> None:
    limits = Limits(reserved_bytes=2 * GIB)
    assert plan(need(18), [card(0, 60)], [], limits).devices == (0,)
    assert "lacks 0.5 GiB" in refusal(need(18.5), [card(0, 60)], [], limits).message


def test_what_a_starting_one_was_promised_counts_before_it_is_taken() -> None:
    starting = holder("starting", 50, 0, held_on={}, busy=True)
    message = refusal(need(40), [card(0)], [starting], NOTHING_RESERVED).message
    assert "lacks 10.0 GiB (starting holds 50.0 GiB and is in use)" in message


def test_what_strangers_hold_counts_and_is_named() -> None:
    ours = holder("ours", 30, 0, busy=True, pids=[7])
    device = card(0, 45, processes=(DeviceProcess(7, 30 * GIB), DeviceProcess(8, None)))
    message = refusal(need(40), [device], [ours], NOTHING_RESERVED).message
    assert "GPU 0 lacks 5.0 GiB (ours holds 30.0 GiB and is in use, other processes hold 15.0 GiB: pid 8)" in message


def test_what_the_driver_keeps_for_itself_is_not_there() -> None:
    device = card(0, free_bytes=79 * GIB)
    assert refusal(need(79.5), [device], [], NOTHING_RESERVED).code == "not_enough_gpus"


def test_several_devices_are_of_one_kind() -> None:
    cards = [card(0, name="A100"), card(1, name="H100"), card(2, 30, name="A100"), card(3, 79, name="H100")]
    assert plan(need(40, count=2), cards, [], NOTHING_RESERVED).devices == (0, 2)
    assert plan(need(40, count=3), [*cards[:3], card(3)], [], NOTHING_RESERVED).devices == (0, 1, 2)


def test_the_tightest_set_for_a_parallel_model() -> None:
    cards = [card(0), card(1, 10), card(2, 30), card(3, 30), card(4, 60)]
    found = plan(need(40, count=2), cards, [], NOTHING_RESERVED)
    assert (found.devices, found.visible) == ((2, 3), "GPU-2,GPU-3")


def test_the_users_choice_of_devices() -> None:
    cards = [card(0), card(1), card(2, 70)]
    assert plan(need(5, ids=(2,)), cards, [], NOTHING_RESERVED).devices == (2,)
    assert "GPU 2 lacks" in refusal(need(20, ids=(2,)), cards, [], NOTHING_RESERVED).message
    assert plan(need(5), cards, [], replace(NOTHING_RESERVED, gpu_ids=(1,))).devices == (1,)
    wrong = refusal(need(5, ids=(2, 9)), cards, [], replace(NOTHING_RESERVED, gpu_ids=(0, 1)))
    assert wrong.code == "not_enough_gpus" and "GPU 2, 9" in wrong.message and "GPU_ID" in wrong.message


def test_a_gpu_that_failed_is_not_used() -> None:
    cards = [replace(card(0), error="GPU is lost"), card(1)]
    assert plan(need(5), cards, [], NOTHING_RESERVED).devices == (1,)
    lost = refusal(need(5, count=2), cards, [], NOTHING_RESERVED)
    assert lost.code == "no_gpu_memory" and "GPU 0 (GPU is lost)" in lost.message     # it may come back


def test_what_never_fits() -> None:
    large = refusal(need(79), [card(0), card(1, total_gib=40)], [], Limits(reserved_bytes=2 * GIB))
    assert large.code == "not_enough_gpus" and "needs 79.0 GiB on a GPU; GPU 0 has 80.0 GiB, of which it may have" in (
        large.message)
    assert refusal(need(1, count=3), [card(0), card(1)], [], NOTHING_RESERVED).code == "not_enough_gpus"


def test_the_product_of_the_parallel_sizes() -> None:
    assert devices_needed({}) == 1
    assert devices_needed({"tensor_parallel_size": 2, "pipeline_parallel_size": "3", "data_parallel_size": 1}) == 6


@pytest.mark.parametrize("value", ["two", None, [1], float("inf"), float("nan"), {}])
def test_a_parallel_size_that_makes_no_sense(value: Any) -> None:
    with pytest.raises(ValueError):
        devices_needed({"tensor_parallel_size": value})


def test_a_value_that_makes_no_sense_is_left_to_the_engine_to_name() -> None:
    """It gets all devices that work, and says which value it was."""
    found = plan(need(5, count=0), [card(0, 79), card(1), card(2, error="lost")], [], NOTHING_RESERVED)
    assert (found.devices, found.visible, found.bytes_per_device) == ((0, 1), "GPU-0,GPU-1", None)


# --- what the engine is told ------------------------------------------------------------------------------------------

@given(st.integers(1 << 20, 80 * GIB), st.integers(80 * GIB, 200 * GIB))
def test_the_share_passes_vllms_own_check_and_wastes_little(planned: int, total: int) -> None:
    found = plan(Need("new", Footprint(planned)), [card(0, total_gib=total / GIB)], [], NOTHING_RESERVED)
    share = found.keep["gpu_memory_utilization"]
    assert 0 < share <= 1 and (math.ceil(total * share) <= planned or share == 0.0001)
    assert planned - total * share < 2 * total / 10_000


def test_a_share_of_each_device() -> None:
    mixed = [card(0, total_gib=40), card(1, total_gib=80)]
    found = plan(Need("new", Footprint(utilization=0.5), count=2), mixed, [], NOTHING_RESERVED)
    assert found.bytes_per_device == 40 * GIB and found.keep["gpu_memory_utilization"] == 0.5
    own = Footprint(utilization=0.5, given=True, keep={"kv_cache_memory_bytes": 1})
    given = plan(Need("new", own), mixed, [], Limits())
    assert found.devices == (0, 1) and given.keep == {"kv_cache_memory_bytes": 1}


def test_a_default_share_leaves_the_reserve_alone_and_the_users_own_does_not() -> None:
    small, limits = [card(0, total_gib=16)], Limits(reserved_bytes=2 * GIB)
    found = plan(Need("new", Footprint(utilization=0.92)), small, [], limits)
    assert (found.bytes_per_device, found.keep["gpu_memory_utilization"]) == (14 * GIB, 0.875)
    asked = refusal(Need("new", Footprint(utilization=0.92, given=True)), small, [], limits)
    assert asked.code == "not_enough_gpus" and "lower gpu_memory_utilization" in asked.message


def test_an_estimate_too_high_for_the_device_is_cut_to_it_and_the_engine_finds_out() -> None:
    estimated = Footprint(20 * GIB, "estimated", least_bytes=15 * GIB, keep={"kv_cache_memory_bytes": GIB})
    limits = Limits(reserved_bytes=2 * GIB)
    cut = plan(Need("new", estimated), [card(0, total_gib=18)], [], limits)
    assert (cut.bytes_per_device, cut.keep) == (16 * GIB, {"gpu_memory_utilization": 0.8888})
    assert plan(Need("new", estimated), [card(0)], [], limits).keep == {
        "kv_cache_memory_bytes": GIB, "gpu_memory_utilization": 0.25}
    assert refusal(Need("new", estimated), [card(0, total_gib=16)], [], limits).code == "not_enough_gpus"


# --- the host as the device -------------------------------------------------------------------------------------------

def test_the_hosts_memory() -> None:
    assert plan(need(4, count=2), [host(10)], [], Limits()) == Plan(
        (0,), None, 4 * GIB, "the host's memory: room for 4.0 GiB, 54.0 GiB were free")
    unknown = plan(Need("new", Footprint()), [host(63)], [], Limits(reserved_bytes=2 * GIB))
    assert (unknown.devices, unknown.visible, unknown.bytes_per_device) == ((0,), None, None)


def test_the_hosts_budget_is_for_ours_alone() -> None:
    limits = Limits(host_budget_bytes=5 * GIB)
    first = holder("first", 2)
    assert plan(need(3), [host(30)], [first], limits).stop == ()
    assert plan(need(3.5), [host(30)], [first], limits).stop == ("first",)
    assert refusal(need(6), [host(30)], [first], limits).code == "not_enough_gpus"


# --- who makes room ---------------------------------------------------------------------------------------------------

def test_the_least_recently_used_goes() -> None:
    residents = [holder("a", 30, idle_s=50), holder("b", 30, idle_s=600), holder("c", 20, idle_s=5)]
    found = plan(need(30), [card(0, 80)], residents, NOTHING_RESERVED)
    assert found.stop == ("b",)
    assert found.because == "GPU 0: b (idle for 10 min) is stopped, which makes room for 30.0 GiB"


@pytest.mark.parametrize("protected", [{"busy": True}, {"pinned": True}, {"may_go": False}])
def test_nobody_in_use_pinned_or_just_loaded_goes(protected: dict[str, Any]) -> None:
    residents = [holder("a", 40, idle_s=0), holder("b", 40, idle_s=9000, **protected)]
    assert plan(need(30), [card(0, 80)], residents, NOTHING_RESERVED).stop == ("a",)
    assert "b holds 40.0 GiB" in refusal(need(50), [card(0, 80)], residents, NOTHING_RESERVED).message


def test_one_whose_turn_is_over_goes_though_it_is_in_use() -> None:
    used = holder("used", 60, busy=True, may_go=True, idle_s=0)
    found = plan(need(30), [card(0, 60)], [used], NOTHING_RESERVED)
    assert found.stop == ("used",) and "used (in use for long while others wait) is stopped" in found.because
    assert plan(need(20), [card(0, 60)], [replace(used, pinned=True), holder("z", 20)],
                NOTHING_RESERVED).stop == ("z",)


def test_priority_keeps_longer() -> None:
    residents = [holder("a", 40, idle_s=400, priority=3), holder("b", 40, idle_s=60)]
    assert plan(need(30), [card(0, 80)], residents, NOTHING_RESERVED).stop == ("b",)
    assert plan(need(30), [card(0, 80)], [replace(residents[0], idle_s=4000), residents[1]],
                NOTHING_RESERVED).stop == ("a",)


def test_one_that_loads_slowly_keeps_longer() -> None:
    residents = [holder("a", 40, idle_s=70, reload_s=300), holder("b", 40, reload_s=10)]
    assert plan(need(30), [card(0, 80)], residents, NOTHING_RESERVED).stop == ("b",)


def test_one_victim_rather_than_two_and_two_old_ones_rather_than_one_in_use() -> None:
    small = [holder("a", 20), holder("b", 20)]
    assert plan(need(40), [card(0, 80)], [*small, holder("c", 40)], NOTHING_RESERVED).stop == ("c",)
    old = [replace(each, idle_s=7200.0) for each in small]
    assert plan(need(40), [card(0, 80)], [*old, holder("c", 40, idle_s=2)], NOTHING_RESERVED).stop == ("a", "b")


def test_nobody_goes_while_there_is_room_elsewhere() -> None:
    residents = [holder("a", 70, 0, idle_s=90_000), holder("b", 30, 1, busy=True)]
    found = plan(need(50), [card(0, 70), card(1, 30)], residents, NOTHING_RESERVED)
    assert (found.devices, found.stop) == ((1,), ())


def test_a_parallel_model_that_goes_clears_several_devices() -> None:
    residents = [holder("wide", 60, 0, 1, 2, 3), *(holder(f"s{n}", 60, n) for n in range(4, 8))]
    cards = [card(n, 60) for n in range(8)]
    found = plan(need(50, count=4), cards, residents, NOTHING_RESERVED)
    assert (found.devices, found.stop) == ((0, 1, 2, 3), ("wide",))


# --- sleep ------------------------------------------------------------------------------------------------------------

def test_sleep_is_preferred_where_it_frees_enough() -> None:
    residents = [sleepy("a", 40)]
    found = plan(need(60), [card(0, 40)], residents, NOTHING_RESERVED)
    assert (found.sleep, found.stop) == (("a",), ()) and "a (idle for 60 s) goes to sleep" in found.because
    assert plan(need(79.5), [card(0, 40)], residents, NOTHING_RESERVED).stop == ("a",)


def test_no_sleep_where_waking_is_no_faster_or_nothing_is_freed() -> None:
    assert plan(need(60), [card(0, 40)], [replace(sleepy("a", 40), wake_s=31.0)], NOTHING_RESERVED).stop == ("a",)
    on_cpu = sleepy("a", 10, left_gib=10)
    assert plan(need(60), [host(10)], [on_cpu], NOTHING_RESERVED).stop == ("a",)


def test_a_sleeper_holds_what_it_really_holds_and_may_be_stopped_for_it() -> None:
    asleep = holder("a", 3, awake=False, host_bytes=30 * GIB, idle_s=10)
    assert plan(need(77), [card(0, 3)], [asleep], NOTHING_RESERVED).stop == ()
    found = plan(need(78), [card(0, 3)], [asleep], NOTHING_RESERVED)
    assert found.stop == ("a",) and "a (asleep, unused for 10 s) is stopped" in found.because


def test_the_hosts_ram_for_sleepers() -> None:
    asleep = holder("old", 1, 1, awake=False, host_bytes=30 * GIB, idle_s=90_000)
    victim = sleepy("victim", 40, idle_s=5)
    cards = [card(0, 40), card(1, 79)]
    enough = plan(need(60), cards, [asleep, victim], Limits(sleep_host_bytes=70 * GIB))
    assert (enough.sleep, enough.stop) == (("victim",), ())
    # the old one gives its share of the host's RAM, which is cheaper than to load the victim anew
    short = plan(need(60), cards, [asleep, victim], Limits(sleep_host_bytes=69 * GIB))
    assert (short.sleep, short.stop) == (("victim",), ("old",))
    in_use = plan(need(60), cards, [replace(asleep, pinned=True), victim], Limits(sleep_host_bytes=69 * GIB))
    assert (in_use.sleep, in_use.stop) == ((), ("victim",))


# --- what is under way ------------------------------------------------------------------------------------------------

def test_who_leaves_already_is_waited_for_and_nobody_else_sent_away() -> None:
    residents = [holder("gone", 60, leaves={}, busy=True), holder("idle", 20, idle_s=90_000)]
    found = plan(need(50), [card(0, 80)], residents, NOTHING_RESERVED)
    assert (found.stop, found.after) == ((), ("gone",))
    assert found.because == "GPU 0: room for 50.0 GiB once gone made it"
    more = plan(need(70), [card(0, 80)], residents, NOTHING_RESERVED)
    assert (more.stop, more.after) == (("idle",), ("gone",))


def test_who_falls_asleep_keeps_something() -> None:
    drowsy = holder("drowsy", 60, leaves={0: 2 * GIB}, busy=True)
    assert plan(need(78), [card(0, 60)], [drowsy], NOTHING_RESERVED).after == ("drowsy",)
    assert "drowsy" not in refusal(need(79), [card(0, 60)], [drowsy], NOTHING_RESERVED).message


def test_a_start_that_waits_does_not_count_against_itself_nor_wander_about() -> None:
    itself = holder("me", 50, 0, held_on={}, busy=True)
    cards = [card(0, 10), card(1, 20)]
    assert plan(need(50, id="me"), cards, [itself], NOTHING_RESERVED).devices == (1,)
    assert plan(need(50, id="me", prefer=(0,)), cards, [itself], NOTHING_RESERVED).devices == (0,)
    assert plan(need(75, id="me", prefer=(0,)), [card(0, 10), card(1)], [itself], NOTHING_RESERVED).devices == (1,)


def test_a_sleeper_that_wakes_needs_only_what_it_does_not_hold() -> None:
    asleep = holder("me", 3, 0, awake=False)
    other = holder("other", 40, 0)
    wake = need(40, id="me", ids=(0,))
    assert plan(wake, [card(0, 43)], [asleep, other], NOTHING_RESERVED).stop == ()
    assert plan(replace(wake, footprint=Footprint(41 * GIB)), [card(0, 43)], [asleep, other],
                NOTHING_RESERVED).stop == ("other",)


# --- the rules, over random small worlds ------------------------------------------------------------------------------

@dataclass(frozen=True)
class World:
    need: Need
    devices: Sequence[Device]
    residents: Sequence[Resident]
    limits: Limits


@st.composite
def worlds(draw: st.DrawFn, most: int = 6) -> World:
    """Up to four devices (of two kinds) that are rather full: strangers, co-tenants, sleepers, some that leave."""
    number = draw(st.integers(1, 4))
    residents = []
    for index in range(draw(st.integers(0, most))):
        where = draw(st.sets(st.integers(0, number - 1), min_size=1, max_size=2))
        size, left = draw(st.integers(1, 7)), draw(st.integers(0, 2))
        residents.append(Resident(
            f"r{index}", f"m{index}", dict.fromkeys(where, size * GIB), awake=draw(st.integers(0, 3)) > 0,
            held_on=draw(st.sampled_from([None, None, None, {}])), busy=draw(st.integers(0, 5)) == 5,
            may_go=draw(st.sampled_from([None] * 8 + [True, False])), pinned=draw(st.integers(0, 9)) == 9,
            leaves=draw(st.sampled_from([None] * 8 + [{}, dict.fromkeys(where, GIB)])),
            priority=draw(st.integers(-1, 2)), idle_s=draw(st.sampled_from([0.0, 1.0, 30.0, 600.0])),
            reload_s=draw(st.sampled_from([None, 3.0, 40.0])), wake_s=draw(st.sampled_from([None, 1.0, 50.0])),
            can_sleep=draw(st.integers(0, 1)), asleep_on=dict.fromkeys(where, left * GIB),
            host_bytes=draw(st.integers(0, 6)) * GIB))
    promised = [sum(each.bytes_on.get(index, 0) for each in residents) for index in range(number)]
    total = max(8 * GIB, *promised) + draw(st.integers(0, 2)) * GIB
    devices = []
    for index in range(number):
        shown = sum((each.bytes_on if each.held_on is None else each.held_on).get(index, 0) for each in residents)
        used = min(total, shown + draw(st.integers(0, 3)) * GIB)
        devices.append(Device(index, f"GPU-{index}", draw(st.sampled_from(["A", "A", "A", "B"])), "cuda", total, used,
                              total - used, error=draw(st.sampled_from([None] * 7 + ["lost"]))))
    return World(need(draw(st.integers(2, 12)), count=draw(st.integers(1, min(number, 3)))), devices, residents,
                 Limits(draw(st.integers(0, 1)) * GIB, sleep_host_bytes=draw(st.integers(0, 14)) * GIB))


def planned(world: World) -> Plan | None:
    try:
        return plan(world.need, world.devices, world.residents, world.limits)
    except NoRoom as refused:
        assert refused.message
        return None


def remaining(world: World, done: Sequence[Option]) -> dict[int, int]:
    """Bytes free on each working device beyond what is wanted, once `done` is and those that leave have left."""
    found = rooms(world.devices, world.residents, world.limits, "")
    wanted = world.need.footprint.bytes_per_device or 0
    return {index: room.soon_bytes - wanted + sum(each.frees(index) for each in done)
            for index, room in found.items()}


def host_left(world: World, done: Sequence[Option]) -> int:
    asleep = sum(each.host_bytes for each in world.residents if (each.leaves if each.awake else each.leaves is None))
    return world.limits.sleep_host_bytes - asleep + sum(each.host_bytes for each in done)


def done_by(world: World, found: Plan) -> list[Option]:
    every = {(option.id, option.sleeps): option for each in world.residents for option in options(each)}
    return [every[name, True] for name in found.sleep] + [every[name, False] for name in found.stop]


def suffices(world: World, done: Sequence[Option], devices: Sequence[int]) -> bool:
    left = remaining(world, done)
    return (all(left[index] >= 0 for index in devices)
            and (host_left(world, done) >= 0 or not any(each.sleeps for each in done)))


def check(world: World, found: Plan) -> None:
    """It is allowed, it is enough, and no victim of it can be spared."""
    assert len(found.devices) == world.need.count
    assert all(world.devices[index].error is None for index in found.devices)
    by_id = {each.id: each for each in world.residents}
    for name in (*found.sleep, *found.stop):
        victim = by_id[name]
        assert not victim.pinned and victim.leaves is None and (not victim.busy or victim.may_go is True)
    done = done_by(world, found)
    assert suffices(world, done, found.devices)
    for spared in done:
        assert not suffices(world, [each for each in done if each is not spared], found.devices)
    assert all(by_id[name].leaves is not None for name in found.after)
    assert bool(found.after) <= any(rooms(world.devices, world.residents, world.limits, "")[index].now_bytes
                                    < (world.need.footprint.bytes_per_device or 0) for index in found.devices)


@given(worlds())
def test_a_plan_holds_and_no_victim_of_it_can_be_spared(world: World) -> None:
    if (found := planned(world)) is not None:
        check(world, found)


@given(worlds(), st.randoms())
def test_the_same_world_in_another_order_has_the_same_plan(world: World, random: Any) -> None:
    residents, devices = list(world.residents), list(world.devices)
    random.shuffle(residents)
    random.shuffle(devices)
    assert planned(replace(world, residents=residents, devices=devices)) == planned(world)


@given(worlds())
def test_nothing_cheaper_could_be_done(world: World) -> None:
    best = brute_force(world)
    found = planned(world)
    assert (found is None) == (best is None)
    if found is not None:
        assert sum(each.cost_us for each in done_by(world, found)) == best


@given(worlds())
def test_the_way_for_many_finds_a_plan_wherever_there_is_one(world: World) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eviction, "SEARCHED_CANDIDATES", 0)
        found = planned(world)
    assert (found is None) == (brute_force(world) is None)
    if found is not None:
        check(world, found)


@given(worlds(most=18))
def test_a_plan_among_many(world: World) -> None:
    found = planned(world)
    if found is not None:
        check(world, found)
    else:
        assert not any(suffices(world, [each[-1] for each in map(options, world.residents) if each], chosen)
                       for chosen in device_sets(world))


def device_sets(world: World) -> list[tuple[int, ...]]:
    """All that are large enough."""
    wanted = (world.need.footprint.bytes_per_device or 0) + world.limits.reserved_bytes
    return list(itertools.combinations([device.index for device in world.devices if device.error is None
                                        and wanted <= device.total_bytes], world.need.count))


def brute_force(world: World) -> int | None:
    """The least cost of all sets of devices, and of all things that can be done; of one kind if that is possible."""
    sets = device_sets(world)
    pure = [each for each in sets if len({world.devices[index].name for index in each}) == 1]
    for tier in (pure, sets):
        costs = [sum(option.cost_us for option in done) for done in everything(world.residents)
                 if any(suffices(world, done, each) for each in tier)]
        if costs:
            return min(costs)
    return None


def everything(residents: Sequence[Resident]) -> Iterator[list[Option]]:
    for done in itertools.product(*([None, *options(each)] for each in residents)):
        yield [option for option in done if option is not None]


def test_the_benchmark_runs() -> None:
    program = Path(__file__).resolve().parent.parent / "benchmarks" / "planning.py"
    done = subprocess.run([sys.executable, program, "--repeat", "1"], text=True, capture_output=True, timeout=120)
    assert done.stdout.count("awake | ") == 6 and done.stdout.count("asleep | ") == 6, done.stderr
