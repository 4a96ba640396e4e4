"""The SDK and its demos against the daemon with the simulated engine, in both forms."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.daemon import CHECKOUT, HANG_S, Daemon
from tests.sdk import CLIENTS
from tests.support import wait_until
from vllm_server_client import (
    AuthenticationFailed,
    BadAnswer,
    Conflict,
    NotFound,
    ServerError,
    StreamBroken,
)

pytestmark = pytest.mark.whole

HELLO = [{"role": "user", "content": "Hello"}]
KEYS = {"API_KEYS": "user-key", "ADMIN_API_KEYS": "admin-key"}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("sdk"), KEYS) as daemon, CLIENTS["sync"](url(daemon), "admin-key") as admin:
        admin.create_instance("org/tiny", {"served_model_name": "demo"}, idle_timeout=0, wait=True)
        yield daemon
        for one in admin.instances():
            admin.stop_instance(one["id"], force=True, wait=True)


def url(daemon: Daemon) -> str:
    return f"http://127.0.0.1:{daemon.port}"


@pytest.fixture(params=CLIENTS)
def sdk(daemon: Daemon, request: pytest.FixtureRequest) -> Iterator[Any]:
    with CLIENTS[request.param](url(daemon), "admin-key") as client:
        yield client


# --- inference --------------------------------------------------------------------------------------------------------

def test_a_chat_is_answered_whole_and_in_pieces(sdk: Any) -> None:
    response = sdk.chat_completion(model="demo", messages=HELLO, max_tokens=8, temperature=0)
    text = response["choices"][0]["message"]["content"]
    assert "simulated" in text and response["usage"]["completion_tokens"] == 8
    pieces = list(sdk.chat_completion_stream(model="demo", messages=HELLO, max_tokens=8, temperature=0))
    assert len(pieces) > 3 and "".join(pieces) == text
    chunks = list(sdk.chat_completion_chunks("demo", HELLO, max_tokens=8, stream_options={"include_usage": True}))
    assert chunks[-1]["usage"]["completion_tokens"] == 8
    assert "length" in {choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]}


def test_a_completion_is_answered_whole_and_in_pieces(sdk: Any) -> None:
    text = sdk.completion("demo", "Hello", max_tokens=8)["choices"][0]["text"]
    assert "".join(sdk.completion_stream("demo", "Hello", max_tokens=8)) == text != ""


def test_embeddings_and_any_other_route(sdk: Any) -> None:
    one = sdk.create_instance("org/bert", {"runner": "pooling"}, wait=True)
    answer = sdk.embeddings("org/bert", ["one", "two"])
    assert [each["index"] for each in answer["data"]] == [0, 1] and len(answer["data"][0]["embedding"]) > 1
    ranked = sdk.request("POST", "/rerank", {"model": "org/bert", "query": "a", "documents": ["b", "c"]})
    assert len(ranked["results"]) == 2
    sdk.stop_instance(one["id"], force=True, wait=True)


def test_leaving_a_stream_ends_the_generation(sdk: Any, daemon: Daemon) -> None:
    [one] = [each for each in sdk.instances() if each["model_name"] == "org/tiny"]
    with closing(sdk.chat_completion_stream("demo", HELLO, max_tokens=30_000)) as stream:
        assert next(stream)
        wait_until(lambda: daemon.gauge(one) == 1)
    wait_until(lambda: daemon.gauge(one) == 0)


def test_an_engine_that_dies_in_the_middle_breaks_the_stream(sdk: Any) -> None:
    one = sdk.create_instance("org/mortal", {"additional_config": {"sim": {"die_after_chunks": 3}}}, wait=True)
    pieces = []
    with pytest.raises((ServerError, StreamBroken)):
        for piece in sdk.chat_completion_stream("org/mortal", HELLO, max_tokens=50):
            pieces.append(piece)
    assert pieces
    sdk.stop_instance(one["id"], force=True, wait=True)


# --- management -------------------------------------------------------------------------------------------------------

def test_an_instance_from_start_to_end(sdk: Any) -> None:
    one = sdk.create_instance("org/other", idle_timeout=60)
    assert one["status"] in ("starting", "ready") and one["timeout"] == 60
    assert sdk.create_instance("org/other", wait=True)["id"] == one["id"]
    assert one["id"] in {each["id"] for each in sdk.instances()}
    assert sdk.instance(one["id"])["status"] == "ready"
    assert sdk.model("org/other")["instances"] == [{"id": one["id"], "status": "ready"}]
    assert {"demo", "org/tiny", "org/other"} == {each["id"] for each in sdk.models()}
    with pytest.raises(Conflict) as caught:
        sdk.create_instance("org/other", {"max_model_len": 128})
    assert caught.value.code == "instance_exists"
    whole = sdk.logs(one["id"], tail=1000)
    assert "Application startup complete" in whole and len(sdk.logs(one["id"], tail=2).splitlines()) == 2
    with closing(sdk.follow_logs(one["id"], tail=1000)) as lines:
        assert next(line for line in lines if "Application startup complete" in line)
    assert sdk.stop_instance(one["id"], wait=True)["status"] == "stopped"
    with pytest.raises(NotFound):
        sdk.instance(one["id"])


def test_a_failed_start_says_why(sdk: Any) -> None:
    with pytest.raises(ServerError, match="max_model_len") as caught:
        sdk.create_instance("org/bad", {"additional_config": {"sim": {"fail": "length_too_large"}}}, wait=True)
    assert (caught.value.status, caught.value.code) == (400, "max_model_len_too_large")
    [failed] = [each for each in sdk.instances() if each["model_name"] == "org/bad"]
    assert failed["last_error"]["code"] == "max_model_len_too_large"
    sdk.stop_instance(failed["id"])


def test_the_server_tells_about_itself(sdk: Any) -> None:
    assert sdk.health()["status"] == "ok" and sdk.health()["simulated"]
    assert sdk.version()["version"]
    assert sdk.gpus()["data"][0]["memory"]["total"] > 0
    assert sdk.reload()["changed"] == []


@pytest.mark.parametrize("kind", CLIENTS.values(), ids=CLIENTS)
def test_keys_open_what_they_open(daemon: Daemon, kind: Any) -> None:
    with kind(url(daemon), "user-key") as user:
        assert user.models()
        with pytest.raises(AuthenticationFailed, match="admin key"):
            user.instances()
    with kind(url(daemon), "") as nobody:
        assert nobody.health()["status"] == "ok"
        with pytest.raises(AuthenticationFailed):
            nobody.chat_completion("demo", HELLO)


def test_the_engines_own_errors_pass(sdk: Any) -> None:
    with pytest.raises(ServerError) as caught:
        sdk.chat_completion("demo", HELLO, n=-1)
    assert caught.value.status == 400 and "n must be at least 1" in str(caught.value)
    with pytest.raises(NotFound) as missing:
        sdk.chat_completion("nobody", HELLO)
    assert missing.value.code == "model_not_found" and "demo" in str(missing.value)
    with pytest.raises(BadAnswer):      # text, where JSON is meant
        sdk.request("GET", f"/instances/{sdk.instances()[0]['id']}/logs")


# --- demos, and `from client import ...` ------------------------------------------------------------------------------

def run(daemon: Daemon, *argv: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "VLLM_SERVER_URL": url(daemon), "VLLM_SERVER_API_KEY": "user-key", **environ}
    return subprocess.run([sys.executable, *argv], cwd=daemon.folder, env=env, text=True, capture_output=True,
                          timeout=HANG_S)


@pytest.mark.parametrize("name", ["demo_sync", "demo_async", "demo_openai_sdk"])
@pytest.mark.parametrize("folder", ["examples", "client"])
def test_the_demos_run_where_they_are_looked_for(daemon: Daemon, folder: str, name: str) -> None:
    done = run(daemon, CHECKOUT / folder / f"{name}.py", "demo")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and done.stdout.count("simulated") >= 2
    assert "models:  demo" in done.stdout and "stream: " in done.stdout


@pytest.mark.parametrize("name", ["demo_sync", "demo_async", "demo_openai_sdk"])
def test_a_demo_that_cannot_work_says_so_in_one_line(daemon: Daemon, name: str) -> None:
    done = run(daemon, CHECKOUT / "examples" / f"{name}.py", "demo", VLLM_SERVER_API_KEY="wrong")
    assert done.returncode == 1 and done.stderr.startswith(f"{name}: ") and "Traceback" not in done.stderr


def test_the_lines_of_the_proxys_document_work_in_a_checkout(daemon: Daemon) -> None:
    program = f"""
from client import VLLMProxyClient
client = VLLMProxyClient(base_url="{url(daemon)}")
response = client.chat_completion(model="demo", messages=[{{"role": "user", "content": "Hello!"}}])
print(response['choices'][0]['message']['content'])
for text in client.chat_completion_stream(model="demo", messages=[{{"role": "user", "content": "讲个笑话"}}]):
    print(text, end="")
import vllm_server_client
assert vllm_server_client.VLLMProxyClient is VLLMProxyClient
"""
    done = run(daemon, "-c", program, PYTHONPATH=str(CHECKOUT))
    assert done.returncode == 0 and done.stdout.count("simulated") >= 2, done.stderr


def test_it_is_installed_without_the_checkout(daemon: Daemon, tmp_path: Path) -> None:
    """Built from a copy, as pip leaves its build folders in the source."""
    shutil.copytree(CHECKOUT / "client", tmp_path / "client")
    done = run(daemon, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index",
               "--no-build-isolation", "--target", tmp_path / "target", tmp_path / "client")
    assert done.returncode == 0, done.stderr
    program = "import vllm_server_client as v; print(v.__file__, v.VLLMProxyClient().models()[0]['id'])"
    done = run(daemon, "-c", program, PYTHONPATH=str(tmp_path / "target"))
    assert done.stdout.split() == [str(tmp_path / "target" / "vllm_server_client" / "__init__.py"), "demo"], done.stderr
    assert (tmp_path / "target" / "vllm_server_client" / "py.typed").exists()
    done = run(daemon, tmp_path / "target" / "bin" / "vllm-server", "models", PYTHONPATH=str(tmp_path / "target"))
    assert done.returncode == 0 and "demo" in done.stdout, done.stderr
