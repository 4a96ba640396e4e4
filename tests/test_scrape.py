"""routing/scrape.py: the few numbers and names that are wanted of a server's pages."""

from __future__ import annotations

import json

import pytest

from routing.scrape import MAX_MODELS, Gauges, Offered, Totals, gauges, offered, totals
from simulation.metrics import Metrics

PAGE = b"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 4.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 40.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.5
"""


def test_the_numbers_of_all_engines_are_added_and_the_fullest_cache_counts() -> None:
    assert gauges(PAGE) == Gauges(5, 4, 0.5)


def test_the_cache_has_an_older_name_too() -> None:
    assert gauges(PAGE.replace(b"kv_cache", b"gpu_cache")) == Gauges(5, 4, 0.5)
    assert gauges(b"vllm:num_requests_running 1\n") == Gauges(1, 0, None)


def test_the_simulated_engine_says_the_same_as_a_real_one() -> None:
    page = Metrics("x").render(running=2, waiting=7, max_num_seqs=8, sleep_level=0)
    assert gauges(page.encode()) == Gauges(2, 7, 0.25)


def test_what_was_counted_since_the_start_is_added_up() -> None:
    simulated = Metrics("x")
    simulated.prompt_tokens = 3
    simulated.token(5, since=0.0)
    told = totals(simulated.render(running=0, waiting=0, max_num_seqs=8, sleep_level=0).encode())
    assert told is not None and told[:3] == (5, 3, 1) and told.first_tokens_s > 0
    two = b'vllm:generation_tokens_total{engine="0"} 5\nvllm:generation_tokens_total{engine="1"} 7\n'
    assert totals(two) == Totals(12, 0, 0, 0)
    assert totals(b"<html>") is None and totals(b"vllm:generation_tokens_total lots\n") is None


@pytest.mark.parametrize("page", [b"", b"<html>", b"vllm:num_requests_running lots\n", b"\xff\x00", b"other_total 3\n"])
def test_what_is_no_such_page_says_nothing(page: bytes) -> None:
    assert gauges(page) is None


def test_absurd_numbers_are_left_out() -> None:
    assert gauges(b"vllm:num_requests_running 1\nvllm:num_requests_waiting NaN\nvllm:num_requests_waiting -3\n") \
        == Gauges(1, 0, None)


def listing(*entries: object) -> bytes:
    return json.dumps({"object": "list", "data": entries}).encode()


def test_what_vllm_lists_is_served_at_once() -> None:
    assert offered(listing({"id": "a"}, {"id": "adapter", "parent": "a"}), "me") \
        == {"a": Offered(True), "adapter": Offered(True)}


def test_what_another_vllm_server_would_load_counts_as_cold() -> None:
    found = offered(listing({"id": "a", "status": "ready", "via": ["s1"]}, {"id": "b", "status": "unloaded"},
                            {"id": "c", "status": "starting"}, {"id": "d", "status": "failed"}), "me")
    assert found == {"a": Offered(True, ("s1",)), "b": Offered(False), "c": Offered(False)}


def test_what_comes_from_us_is_not_taken_for_its_own() -> None:
    found = offered(listing({"id": "a", "status": "ready", "via": ["s1", "me"]}, {"id": "b", "via": ["s1"]}), "me")
    assert found == {"b": Offered(True, ("s1",))}


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"data": 3}', b'{"data": [3]}', b'{"data": [{}]}', b"\xff"])
def test_what_is_no_list_of_models_says_nothing(body: bytes) -> None:
    assert offered(body, "me") is None


def test_names_and_lists_are_bounded() -> None:
    found = offered(listing({"id": "x" * 2000}, {"id": ""}, {"id": 3}, {"id": "a", "via": "s"}), "me")
    assert found == {"a": Offered(True)}
    many = offered(listing(*({"id": str(n)} for n in range(MAX_MODELS + 5))), "me")
    assert many is not None and len(many) == MAX_MODELS
