"""What the daemon shows of itself: /metrics, /load-stats, /prometheus/targets; documented, and as deploy/ uses it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from router import Router
from scripts import setup_engine
from tests.daemon import CHECKOUT, Daemon, events
from tests.instance_world import World
from tests.stub_server import StubServer
from tests.support import wait_until
from tests.test_servers import servers_toml, wait_for_models
from web.metrics import DaemonCollector

pytestmark = pytest.mark.whole

DOCUMENT = (CHECKOUT / "docs" / "METRICS.md").read_text()
DEPLOY = CHECKOUT / "deploy"


@pytest.fixture(scope="module")
def server() -> Iterator[StubServer]:
    with StubServer("a", ("m",)) as running:
        running.running = 3
        yield running


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, server: StubServer) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("metrics")
    (folder / "servers.toml").write_text(servers_toml([server]))
    with Daemon(folder) as running:
        wait_for_models(running, "m")
        yield running
        running.remove()


@pytest.fixture(scope="module")
def instance(daemon: Daemon) -> dict[str, Any]:
    return daemon.create("org/local", params={"max_num_seqs": 8, "served_model_name": ["here", "org/local"]})


def page(daemon: Daemon, path: str = "/metrics") -> str:
    answer = daemon.get(path)
    assert answer.status == 200 and answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return answer.body.decode()


def values(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """By name and labels; the page must parse."""
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            key = one.name, frozenset(one.labels.items())
            assert key not in found, key
            found[key] = one.value
    return found


def value(daemon: Daemon, name: str, **labels: str) -> float | None:
    return values(page(daemon)).get((name, frozenset(labels.items())))


# --- /metrics ---------------------------------------------------------------------------------------------------------

def documented() -> dict[str, tuple[str, tuple[str, ...]]]:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|([^|]*)\|", DOCUMENT, re.MULTILINE)
    return {name: (kind, tuple(filter(None, (label.strip() for label in labels.split(",")))))
            for name, kind, labels in rows}


def test_every_series_is_documented_with_its_type_and_labels_and_no_other(daemon: Daemon,
                                                                         instance: dict[str, Any]) -> None:
    body = {"prompt": "x", "max_tokens": 2}
    assert daemon.post("/v1/completions", body | {"model": "here"}).status == 200
    assert daemon.post("/v1/completions", body | {"model": "m"}).status == 200
    text = page(daemon)
    types = dict(re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE))
    assert types == {name: kind for name, (kind, _) in documented().items()}
    for (name, labels), _ in values(text).items():
        family = next(known for known in (name, re.sub(r"_(bucket|sum|count)$", "", name)) if known in documented())
        assert {label for label, _ in labels} - {"le"} == set(documented()[family][1]), name


def test_every_documented_series_has_its_labels_before_anything_has_happened(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of series without samples too, which the page does not show."""
    manager = World(tmp_path, monkeypatch).manager
    router = Router(manager)
    try:
        found = {one.name: (one.type, tuple(one._labelnames))  # type: ignore[attr-defined]
                 for one in DaemonCollector(manager, router, {"version": "1", "simulated": False}).collect()
                 if one.type != "info"}
    finally:
        router.close()
    known = {name.removesuffix("_total"): about for name, about in documented().items()
             if name.startswith("vllm_server_") and name != "vllm_server_info"}
    assert found == known


def test_requests_are_counted_where_they_went(daemon: Daemon, instance: dict[str, Any], server: StubServer) -> None:
    name = f"127.0.0.1:{server.port}"

    def counted(model: str, backend: str, status: int) -> float:
        return value(daemon, "vllm_server_requests_total", model=model, backend=backend, status=str(status)) or 0

    before = counted("m", name, 200), counted("here", instance["id"], 200), counted("", "", 404)
    assert daemon.post("/v1/completions", {"model": "m", "prompt": "x"}).status == 200
    assert daemon.post("/v1/completions", {"model": "here", "prompt": "x", "max_tokens": 2}).status == 200
    assert daemon.post("/v1/completions", {"model": "anything a client may say", "prompt": "x"}).status == 404
    after = counted("m", name, 200), counted("here", instance["id"], 200), counted("", "", 404)
    assert [now - then for now, then in zip(after, before, strict=True)] == [1, 1, 1]
    assert "anything" not in page(daemon)


def test_a_stream_counts_when_it_begins_and_its_time_when_it_ends(daemon: Daemon, instance: dict[str, Any]) -> None:
    def of(series: str) -> float:
        return value(daemon, f"vllm_server_{series}_count", model="here") or 0

    first, whole = of("time_to_first_byte_seconds"), of("request_seconds")
    body = {"model": "here", "prompt": "x", "max_tokens": 1000, "stream": True}
    with daemon.open("POST", "/v1/completions", body) as response:
        next(events(response))
        wait_until(lambda: of("time_to_first_byte_seconds") == first + 1)   # counted right after it was sent
        assert value(daemon, "vllm_server_requests_in_flight", backend=instance["id"]) == 1
        assert value(daemon, "vllm_server_backend_running", backend=instance["id"], kind="instance") == 1
        assert of("request_seconds") == whole
    wait_until(lambda: of("request_seconds") == whole + 1)
    assert value(daemon, "vllm_server_requests_in_flight", backend=instance["id"]) == 0


def test_engines_pages_are_merged(daemon: Daemon, instance: dict[str, Any]) -> None:
    found = values(page(daemon, "/metrics?instances=true"))
    labels = {"instance": instance["id"], "model": "here", "engine": "0", "model_name": "here"}
    assert ("vllm:num_requests_running", frozenset(labels.items())) in found
    assert any(name == "vllm_server_instances" for name, _ in found)
    assert not any(name.startswith("vllm:") for name, _ in values(page(daemon)))


def test_loads_and_their_time_are_counted(daemon: Daemon, instance: dict[str, Any]) -> None:
    assert (value(daemon, "vllm_server_load_seconds_count") or 0) >= 1
    assert (value(daemon, "vllm_server_load_seconds_sum") or 0) > 0
    assert value(daemon, "vllm_server_instances", status="ready") == 1


def test_a_retry_is_counted_with_its_reason(daemon: Daemon, server: StubServer) -> None:
    with StubServer("b", ("m",)) as other:
        text = (daemon.folder / "servers.toml").read_text()
        (daemon.folder / "servers.toml").write_text(servers_toml([server, other]))
        wait_until(lambda: len(daemon.get("/v1/models/m").json["servers"]) == 2)
        other.statuses["/v1/completions"] = 502
        try:
            wait_until(lambda: daemon.post("/v1/completions", {"model": "m", "prompt": "x"}).status == 200
                               and value(daemon, "vllm_server_retries_total", reason="502"))
            failures = value(daemon, "vllm_server_server_failures_total", backend=f"127.0.0.1:{other.port}")
            assert failures is not None and failures >= 1
        finally:
            (daemon.folder / "servers.toml").write_text(text)
            wait_until(lambda: len(daemon.get("/v1/models/m").json["servers"]) == 1)


# --- /load-stats ------------------------------------------------------------------------------------------------------

def test_load_stats_tell_of_each_backend_and_all_together(daemon: Daemon, instance: dict[str, Any],
                                                          server: StubServer) -> None:
    wait_until(lambda: {one["id"]: (one["running"], one["capacity"])
                        for one in daemon.get("/load-stats").json["servers"]}
                       == {instance["id"]: (0, 8), f"127.0.0.1:{server.port}": (3, 8)})
    found = daemon.get("/load-stats").json
    here, there = sorted(found["servers"], key=lambda one: str(one["kind"]))
    unknown = dict.fromkeys(("prompt_tokens_per_s", "requests_per_s", "tokens_per_s", "ttft_s"))
    assert there | {"why": "", "last_updated": "", "models": []} == unknown | {
        "id": f"127.0.0.1:{server.port}", "kind": "server", "url": server.url, "health": "up", "status": True,
        "why": "",
        "running": 3, "waiting": 0, "in_flight": 0, "capacity": 8, "weight": 1.0, "utilization": 0.375,
        "utilization_percent": 37.5, "current_load": 3, "max_capacity": 8, "available_capacity": 5, "cache_usage": 0.5,
        "circuit": "closed", "models": [], "last_updated": "", "tokens_per_s": None, "prompt_tokens_per_s": None,
        "requests_per_s": None, "ttft_s": None}
    assert there["models"] == ["m"] and there["last_updated"]
    assert (here["id"], here["kind"], here["health"], here["capacity"]) == (instance["id"], "instance", "ready", 8)
    assert found["summary"] == {"total_servers": 2, "healthy_servers": 2, "total_running": 3, "total_waiting": 0,
                                "total_active_load": 3, "total_capacity": 16, "overall_utilization_percent": 18.8}
    assert found["policy"] == "load"


# --- Prometheus and Grafana -------------------------------------------------------------------------------------------

def test_targets_are_those_that_can_be_scraped(daemon: Daemon, instance: dict[str, Any], server: StubServer) -> None:
    found = {one["labels"]["kind"]: one for one in daemon.get("/prometheus/targets").json}
    assert found["daemon"] == {"targets": [f"127.0.0.1:{daemon.port}"], "labels": {
        "__metrics_path__": "/metrics", "kind": "daemon", "instance": f"127.0.0.1:{daemon.port}"}}
    assert found["server"] == {"targets": [f"127.0.0.1:{server.port}"], "labels": {
        "__metrics_path__": "/metrics", "__scheme__": "http", "kind": "server",
        "instance": f"127.0.0.1:{server.port}"}}
    labels = found["instance"]["labels"]
    assert labels["instance"] == instance["id"] and labels["model"] == "here"
    assert values(page_of(daemon, labels["__metrics_path__"]))


def page_of(daemon: Daemon, path: str) -> str:
    return daemon.get(path).body.decode()


def named_series(text: str) -> set[str]:
    return set(re.findall(r"\bvllm_server_\w+", text))


@pytest.mark.parametrize("name", ["grafana-dashboard.json", "prometheus-alerts.yml"])
def test_what_deploy_shows_and_watches_exists(name: str) -> None:
    known = {f"{series}{suffix}" for series, (kind, _) in documented().items()
             for suffix in {"histogram": ("_bucket", "_sum", "_count"), "summary": ("_sum", "_count")}.get(kind, ("",))}
    assert named_series((DEPLOY / name).read_text()) <= known


def test_the_dashboard_is_one() -> None:
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"]) > 10
    assert all(target["expr"].count("(") == target["expr"].count(")") for panel in dashboard["panels"]
               for target in panel["targets"])


def test_prometheus_reads_its_files(tmp_path: Path) -> None:
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    assert [job["job_name"] for job in config["scrape_configs"]] == ["vllm-server", "vllm"]
    assert all((DEPLOY / name).exists() for name in config["rule_files"])
    rules = yaml.safe_load((DEPLOY / "prometheus-alerts.yml").read_text())
    assert all({"alert", "expr", "annotations"} <= set(rule) for group in rules["groups"] for rule in group["rules"])


FETCHED = setup_engine.cache_folder(os.environ) / "promtool" / "promtool"
PROMTOOL = shutil.which("promtool") or (str(FETCHED) if FETCHED.exists() else None)
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="no promtool (scripts/get_promtool.sh fetches it): "
                                    "prometheus_client's parser alone has read the page")


def promtool(*arguments: str | Path, given: str = "") -> tuple[int, str]:
    """Its exit code, and what it says."""
    done = subprocess.run([str(PROMTOOL), *arguments], input=given, text=True, capture_output=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("path", ["/metrics", "/metrics?instances=true"])
def test_the_page_parses(daemon: Daemon, instance: dict[str, Any], path: str) -> None:
    assert values(page(daemon, path))


@needs_promtool
def test_promtool_accepts_the_pages(daemon: Daemon, instance: dict[str, Any]) -> None:
    assert promtool("check", "metrics", given=page(daemon)) == (0, "")
    code, said = promtool("check", "metrics", given=page(daemon, "/metrics?instances=true"))
    assert code in (0, 3) and "vllm_server_" not in said, said      # 3: matters of taste, in the engines' names
    assert promtool("check", "metrics", given="vllm_server_x{ 1\n")[0] == 1     # it does look


@needs_promtool
def test_promtool_accepts_the_configuration_the_alerts_and_every_panel(tmp_path: Path) -> None:
    for what, name in (("config", "prometheus.yml"), ("rules", "prometheus-alerts.yml")):
        code, said = promtool("check", what, DEPLOY / name)
        assert code == 0 and "SUCCESS" in said, said
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    rules = [{"record": f"panel:{number}", "expr": expr.replace("$__rate_interval", "1m")}
             for number, expr in enumerate(panels)]
    path = tmp_path / "panels.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    code, said = promtool("check", "rules", path)
    assert code == 0 and f"{len(panels)} rules found" in said, said
