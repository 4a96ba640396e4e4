"""web/exposition.py and routing/observed.py: pages put together, and what is counted."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from routing.observed import MAX_MODELS, OTHER, RECENT, RECENT_FAILED, About, Observed
from simulation.metrics import Metrics
from web.exposition import merged


def samples(page: str) -> set[tuple[str, tuple[tuple[str, str], ...], float]]:
    return {(one.name, tuple(sorted(one.labels.items())), one.value)
            for family in text_string_to_metric_families(page) for one in family.samples}


ONE = """# HELP x_total How many.
# TYPE x_total counter
x_total{a="b"} 1.0
# HELP y What.
# TYPE y gauge
y 2
"""


def test_each_family_stands_together_with_the_labels_of_its_page() -> None:
    page = merged([({}, ONE), ({"instance": "i1", "model": "m"}, ONE)])
    assert page.count("# TYPE x_total counter") == 1 and page.count("# HELP y ") == 1
    assert page.splitlines().index('x_total{instance="i1",model="m",a="b"} 1.0') < page.splitlines().index("y 2")
    assert samples(page) == {
        ("x_total", (("a", "b"),), 1.0), ("x_total", (("a", "b"), ("instance", "i1"), ("model", "m")), 1.0),
        ("y", (), 2.0), ("y", (("instance", "i1"), ("model", "m")), 2.0)}


def test_an_engines_own_label_of_that_name_is_kept_under_another() -> None:
    page = merged([({"instance": "i1", "model": "m"}, 'z{model="own",path="a,model=\\"x\\"",instance="e"} 1\n')])
    assert samples(page) == {("z", (("exported_instance", "e"), ("exported_model", "own"), ("instance", "i1"),
                                    ("model", "m"), ("path", 'a,model="x"')), 1.0)}


def test_what_a_simulated_engine_says_can_be_merged() -> None:
    text = Metrics('odd "name"\\').render(running=1, waiting=2, max_num_seqs=8, sleep_level=0)
    page = merged([({}, ONE), *(({"instance": name, "model": "m\n"}, text) for name in ("i1", "i2"))])
    assert len(samples(page)) == len(samples(ONE)) + 2 * len(samples(text))


def test_lines_that_are_no_samples_are_left_out() -> None:
    broken = "garbage here\n{} 1\nok 1\n<html>\nx{unclosed 3\n"
    page = merged([({"instance": "i"}, broken), ({}, "ok 2 1700000000000\n")])
    assert page == 'ok{instance="i"} 1\nok 2 1700000000000\n'


@given(st.lists(st.text(max_size=60), max_size=8), st.text(max_size=20))
def test_any_page_can_be_merged_with_a_good_one(lines: list[str], model: str) -> None:
    page = merged([({}, ONE), ({"instance": "i", "model": model}, "\n".join(lines))])
    assert samples(ONE) <= samples("\n".join(line for line in page.splitlines() if not line.startswith("# ")
                                             and "instance=" not in line) + "\n")


# --- counting ---------------------------------------------------------------------------------------------------------

def about(model: str = "m", backend: str = "b", begun: float = 0.0) -> About:
    made = About(begun)
    made.model, made.backend = model, backend
    return made


def test_answers_are_counted_by_model_backend_and_status() -> None:
    observed = Observed()
    for status, backend in ((200, "b"), (200, "b"), (503, "")):
        observed.answered(about(backend=backend), status, now=0.3)
    seen = observed.seen(())
    assert seen.answers == {("m", "b", "200"): 2, ("m", "", "503"): 1}
    assert sum(seen.first_byte["m"].counts) == 2        # the daemon's own answer has no first byte of a backend
    assert seen.first_byte["m"].total == [0.6]


def test_an_end_counts_once() -> None:
    observed = Observed()
    ended = observed.end_of(about(begun=1.0), lambda: 3.5)
    ended()
    ended()
    assert observed.seen(()).whole["m"].total == [2.5]


def test_models_and_backends_cannot_grow_without_bound() -> None:
    observed = Observed()
    for number in range(MAX_MODELS + 50):
        observed.ended(about(model=f"m{number}"), now=1.0)
    assert len(observed.seen(()).whole) == MAX_MODELS + 1 and sum(observed.seen(()).whole[OTHER].counts) == 50
    for number in range(25_000):
        observed.answered(about(backend=f"gone {number}"), 200, now=1.0)
    observed.answered(about(backend="here"), 200, now=1.0)
    assert set(observed.seen({"here"}).answers) == {("m", "here", "200")} or \
        set(observed.seen({"here"}).answers) == {(OTHER, "here", "200")}


def test_the_last_requests_are_kept_and_a_flood_washes_no_failure_away() -> None:
    observed = Observed()
    observed.answered(about(backend=""), 503, now=0.3)
    for number in range(RECENT + 5):
        observed.answered(about(model=str(number)), 200, now=0.1)
    assert [one.model for one in observed.recent()] == [str(number) for number in range(5, RECENT + 5)]
    (failed,) = observed.recent(failed=True)
    assert (failed.status, failed.first_byte_s, failed.seconds) == (503, 0.3, 0.3)
    for _ in range(RECENT_FAILED + 5):
        observed.answered(about(), 500, now=0.1)
    assert len(observed.recent(failed=True)) == RECENT_FAILED


def test_one_that_broke_after_its_head_is_among_the_failed() -> None:
    observed = Observed()
    one = about()
    ended = observed.end_of(one, lambda: 4.0, lambda: "engine_died")
    observed.answered(one, 200, now=1.0)
    assert one.seconds is None and observed.recent(failed=True) == []
    ended()
    assert observed.recent(failed=True) == [one] and (one.code, one.seconds) == ("engine_died", 4.0)
