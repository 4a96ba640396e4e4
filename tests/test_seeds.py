"""The documents of the three systems that this one unites, followed command by command against the daemon with the
simulated engine.  tests/data/seeds/ holds their headings, code blocks and tables as printed.

What differs from the print is the port, an instance's id, and what ELSEWHERE lists with its reason.
"""

from __future__ import annotations

import ast
import json
import os
import re
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import config
from configuration.servers import parse_servers
from tests.checkout import Checkout
from tests.command import OnTerminal, vllm_server
from tests.daemon import CHECKOUT, Daemon
from tests.seed_book import FOLDER, Book
from tests.simulator_harness import Simulator
from tests.support import can_bind_plainly, claim_ports, wait_until
from tests.test_docs import routes

pytestmark = pytest.mark.whole

ELSEWHERE = {
    "pip install -r requirements.txt": "a test installs nothing; what the file lists is what this test runs with",
    "git clone": "the checkout is what one has after it",
    "cd vllm_proxy": "the scripts run in a copy of the checkout",
    "./scripts/install.sh": "needs the network; scripts/stranger.sh runs it (tests/slow/test_stranger.py)",
    "pip install mvllm": "the command is vllm-server, of `pip install ./client` (tests/test_client_sdk.py installs it)",
    "pip install -e .": "the same",
    "docker build": "no docker in a test; tests/test_deploy.py lints the Dockerfile and runs its command on its files",
    "docker run": "the same; the image listens on 5000, so -p 8888:5000, and it reads /app/servers.toml as printed",
    "docker-compose": "the same; docker-compose.yml is read by Docker Compose itself there",
}

PARTS = {       # a file of theirs -> where its work is done here
    "instance_manager/manager.py": "instance_manager.py", "api/router.py": "router.py",
    "configs/app_config.py": "config.py", "env.example": ".env.example", "app.py": "app.py",
    "proxy/__init__.py": "app.py", "proxy/main.py": "app.py", "proxy/config.py": "config.py",
    "proxy/gpu_monitor.py": "gpu.py", "proxy/model_manager.py": "instance_manager.py",
    "proxy/proxy_server.py": "router.py", "client/__init__.py": "client/__init__.py",
    "client/client.py": "client/vllm_server_client/client.py", "client/demo_sync.py": "client/demo_sync.py",
    "client/demo_async.py": "client/demo_async.py", "client/demo_openai_sdk.py": "client/demo_openai_sdk.py",
    "client/requirements.txt": "client/requirements.txt", "docs/ARCHITECTURE.md": "docs/ARCHITECTURE.md",
    "docs/DEPLOYMENT.md": "docs/DEPLOYMENT.md", "docs/API.md": "docs/API.md",
    "requirements.txt": "requirements.txt", "Dockerfile": "Dockerfile",
    "docker-compose.yml": "docker-compose.yml",
    **{f"scripts/{name}.sh": f"scripts/{name}.sh" for name in ("install", "start", "stop", "restart", "status")}}
MADE = {        # what appears when it is used
    "configs/config.yaml": "install.sh makes it", "configs/vllm_config.json": "VLLM_CONFIG names it",
    "logs/": "start.sh makes it", "models/": "HF_HOME names it"}


def elsewhere(book: Book, start: str, language: str = "bash") -> str:
    assert any(start.startswith(known) for known in ELSEWHERE), start
    return book.take(start, language)


def tree(text: str) -> set[str]:
    """The files of a drawn folder, by their paths."""
    found, folder = set(), ""
    for line in text.splitlines():
        drawn = re.match(r"^((?:│   |    )*)(?:[├└]── )([\w./-]+)", line)
        if drawn and not drawn[1]:
            folder = drawn[2] if drawn[2].endswith("/") else ""
            found.add(drawn[2])
        elif drawn:
            found.add(folder + drawn[2])
        elif plain := re.match(r"^/?(\w[\w./]+\.\w+) ", line):
            found.add(plain[1])
    folders = {path.partition("/")[0] + "/" for path in found if not path.endswith("/") and "/" in path}
    return {path for path in found if path not in folders}


def assert_has_parts(text: str) -> None:
    listed = tree(text)
    assert listed <= PARTS.keys() | MADE.keys(), listed - PARTS.keys() - MADE.keys()
    missing = {path for path in listed & PARTS.keys() if not (CHECKOUT / PARTS[path]).exists()}
    assert missing == set()


def assert_serves_routes(book: Book) -> None:
    ours = {(method, re.sub(r"<\w+>", "<>", path)) for method, path in
            (route.split(" ", 1) for route in routes())}
    assert book.routes() and book.routes() <= ours, book.routes() - ours


def assert_settings(book: Book, differing: dict[str, str]) -> None:
    """Every variable of the tables is a setting, with the printed default but for `differing`."""
    for name, default in book.table().items():
        [setting] = [one for one in config.SETTINGS if name == one.name or name in one.older]
        assert setting.default == differing.get(name, default), name


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(CHECKOUT)}


# --- vllm-server ------------------------------------------------------------------------------------------------------

def assert_installed(requirements: str) -> None:
    for line in (CHECKOUT / requirements).read_text().splitlines():
        if line := line.partition("#")[0].strip():
            needed = Requirement(line)
            assert needed.specifier.contains(version(needed.name)), needed


def test_vllm_server(tmp_path: Path, env: dict[str, str]) -> None:
    book = Book("1-vllm-server.md", env)
    elsewhere(book, "pip install -r requirements.txt")
    assert_installed("requirements.txt")
    assert book.take("python app.py") == "python app.py"
    with Daemon(tmp_path) as daemon:
        book.values["localhost:5000"] = f"localhost:{daemon.port}"
        instance = json.loads(book.run("curl -X POST http://localhost:5000/instances"))
        assert (instance["model_name"], instance["timeout"]) == ("facebook/opt-125m", 600)
        answer = ast.literal_eval(book.python("import requests"))
        assert answer["choices"][0]["message"]["content"].startswith("simulated")
        assert [one["id"] for one in json.loads(book.run("curl http://localhost:5000/instances"))["data"]] == [
            instance["id"]]
        book.values["<instance_id>"] = instance["id"]
        book.run("curl -X DELETE http://localhost:5000/instances/<instance_id>")
        wait_until(lambda: daemon.instances() == [])
        health = json.loads(book.run("curl http://localhost:5000/health"))
        assert (health["status"], health["instances"], health["vllm_processes"]) == ("ok", 0, 0)
    book.end()
    assert_serves_routes(book)


def test_vllm_server_v2(tmp_path: Path, env: dict[str, str]) -> None:
    book = Book("2-vllm-server-v2.zh.md", env)
    assert_has_parts(book.take("/instance_manager/manager.py", ""))
    assert_settings(book, {})
    printed = book.table() | {"VLLM_CONFIG": "configs/vllm_config.json"}
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "vllm_config.json").write_text('{"max_model_len": 4096}')
    (tmp_path / ".env").write_text("".join(f"{name}={value}\n" for name, value in printed.items()))
    elsewhere(book, "pip install -r requirements.txt")
    assert book.take("python app.py") == "python app.py"
    with Daemon(tmp_path) as daemon:
        book.values["localhost:5000"] = f"localhost:{daemon.port}"
        instance = json.loads(book.run("curl -X POST http://localhost:5000/instances"))
        assert instance["model_name"] == "NousResearch/Meta-Llama-3-8B-Instruct"
        assert (instance["flags"]["dtype"], instance["flags"]["max_model_len"]) == ("float16", 4096)
        assert len(json.loads(book.run("curl http://localhost:5000/instances"))["data"]) == 1
        book.values["{instance_id}"] = instance["id"]
        assert json.loads(book.run("curl http://localhost:5000/instances/{instance_id}"))["id"] == instance["id"]
        wait_until(lambda: daemon.status_of(instance["id"]) == "ready")
        answer = json.loads(book.run("curl -X POST http://localhost:5000/proxy/{instance_id}/v1/completions"))
        assert answer["usage"]["completion_tokens"] == 100
        daemon.remove()
    book.end()
    assert_serves_routes(book)


# --- mvllm ------------------------------------------------------------------------------------------------------------

@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[list[Simulator]]:
    """Three servers with the document's model."""
    made = []
    for number in range(3):
        folder = tmp_path / f"server-{number}"
        folder.mkdir()
        made.append(Simulator(folder, "--served-model-name", "llama3.1:8b"))
    yield made
    for one in made:
        one.end()


def follow_runs(book: Book, home: Path, base_port: int) -> None:
    settings = {"HOME": str(home), "STATE_DIR": str(home / "state"), "VLLM_BASE_PORT": str(base_port + 1),
                "VLLM_COMMAND": f"{sys.executable} {CHECKOUT / 'simulator.py'}", "APP_HOST": "127.0.0.1",
                "VLLM_DEFAULT_TRUST_REMOTE_CODE": "false", "APP_PORT": "0"}
    assert book.take("mvllm run") == "mvllm run"
    with OnTerminal(None, "run", **settings) as terminal:
        terminal.wait_for("q Quit")
        terminal.type("q")
        assert terminal.wait() == 0
    words = book.take("mvllm run --console").split()[1:]
    with OnTerminal(None, *words, **settings) as terminal:
        terminal.wait_for("listens on")
        terminal.type("\x03")
        assert terminal.wait() == 0
    words = book.take("mvllm run --port 8888").replace("8888", str(base_port)).split()[1:]
    with OnTerminal(None, *words, "--console", **settings) as terminal:
        url = f"localhost:{base_port}"
        wait_until(lambda: vllm_server(None, "health", "--url", f"http://{url}").code == 0)
        book.values["localhost:8888"] = url
        answer = json.loads(book.run("curl -X POST http://localhost:8888/v1/chat/completions"))
        assert answer["model"] == "llama3.1:8b" and answer["choices"]
        assert json.loads(book.run("curl http://localhost:8888/health"))["status"] == "ok"
        stats = json.loads(book.run("curl http://localhost:8888/load-stats"))
        assert sorted(one["capacity"] for one in stats["servers"]) == [3, 4, 5]
        assert all(one["status"] for one in stats["servers"])
        terminal.type("\x03")
        assert terminal.wait() == 0


@pytest.mark.parametrize("name", ["5-mvllm.md", "3-mvllm.zh.md"])
def test_mvllm(tmp_path: Path, env: dict[str, str], fleet: list[Simulator], name: str,
               monkeypatch: pytest.MonkeyPatch) -> None:
    book, home = Book(name, env), tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    installs = ["git clone", "pip install -e ."] if name == "5-mvllm.md" else ["pip install mvllm"]
    for start in installs:
        elsewhere(book, start)
    book.take("mvllm run")
    if name == "3-mvllm.zh.md":
        for start in ("git clone", "pip install -e ."):
            elsewhere(book, start)
        book.take("mvllm run")      # both are run below, where servers.toml is there
    (home / "servers.example.toml").write_bytes((CHECKOUT / "servers.example.toml").read_bytes())
    book.run("cp servers.example.toml servers.toml", home)
    printed = book.take("[servers]", "toml")
    read = parse_servers(printed, home / "servers.toml", {})
    assert [(one.url, one.max_concurrent_requests) for one in read.servers] == [
        ("http://gpu-server-1:8081", 3), ("http://gpu-server-2:8088", 5), ("http://gpu-server-3:8089", 4)]
    assert (read.health_check_interval_s, read.request_timeout_s, read.max_retries) == (10, 120, 3)
    for server, one in zip(read.servers, fleet, strict=True):
        printed = printed.replace(server.url, one.ready().url)
    (home / "servers.toml").write_text(printed)

    claim, base_port = claim_ports()
    with claim:
        follow_runs(book, home, base_port)
    elsewhere(book, "docker build")
    assert "/app/servers.toml" in elsewhere(book, "docker run")
    service = yaml.safe_load(book.take("version:", "yaml"))["services"]["mvllm"]
    assert service == {"build": ".", "ports": ["8888:8888"], "volumes": ["./servers.toml:/app/servers.toml"]}
    book.end()
    assert_serves_routes(book)


# --- vLLM Dynamic Proxy -----------------------------------------------------------------------------------------------

def test_dynamic_proxy(tmp_path: Path, env: dict[str, str]) -> None:
    book = Book("4-vllm-dynamic-proxy.zh.md", env)
    claim, port = claim_ports()
    with claim, Checkout(tmp_path, {"APP_PORT": "null", "PROXY_PORT": str(port), "IDLE_TIMEOUT": "300"}) as checkout:
        book.values |= {"localhost:8080": f"localhost:{port}"}

        def script(start: str) -> tuple[str, list[str]]:
            words = book.take(start).split()
            assert words[0].startswith("./scripts/") and (checkout.path / words[0]).exists()
            return Path(words[0]).stem, words[1:]

        for start in ("git clone", "cd vllm_proxy", "./scripts/install.sh"):
            elsewhere(book, start)
        models = book.take("models:", "yaml")
        (checkout.path / "configs").mkdir()
        (checkout.path / "configs" / "config.yaml").write_text(
            models.replace("max_model_len: 4096", "max_model_len: 4096\n    memory_mb: 512"))   # for small machines

        name, words = script("./scripts/start.sh")
        with checkout.popen(name, *words, cwd=checkout.path) as foreground:
            wait_until(lambda: not can_bind_plainly(port))
            assert checkout.script("stop").code == 0 and foreground.wait() == 0
            foreground.communicate()
        for start in ("./scripts/start.sh -d", "./scripts/start.sh -c configs/config.yaml"):
            name, words = script(start)
            started = checkout.script(name, *words, cwd=checkout.path)
            assert started.code == 0, started.err       # the second one finds that it runs
        assert f":{port}" in started.out

        [model] = json.loads(book.run("curl http://localhost:8080/v1/models"))["data"]
        assert model["id"] == "llama2-7b-chat"
        answer = json.loads(book.run("curl http://localhost:8080/v1/chat/completions"))
        assert answer["choices"][0]["message"]["content"].startswith("simulated")
        assert book.python("from client import VLLMProxyClient", checkout.path).count("simulated") == 2
        for demo in sorted((checkout.path / "client").glob("demo_*.py")):
            done = checkout.python(demo, "llama2-7b-chat", url=f"http://localhost:{port}")
            assert done.code == 0 and "simulated" in done.out, done.err

        for start, code in (("./scripts/status.sh", 0), ("./scripts/status.sh -v", 0), ("./scripts/stop.sh", 0),
                            ("./scripts/stop.sh -f", 0), ("./scripts/restart.sh", 0)):
            name, words = script(start)
            assert checkout.script(name, *words, cwd=checkout.path).code == code, start
        assert checkout.script("status").code == 0
    for start in ("docker-compose build", "docker-compose up -d", "docker-compose logs -f", "docker-compose down"):
        elsewhere(book, start)
    assert_has_parts(book.take("vllm_proxy/", ""))
    assert_config_sections(book, tmp_path)
    book.end()
    assert_serves_routes(book)
    assert_settings(book, {"PROXY_PORT": "5000", "IDLE_TIMEOUT": "600", "GPU_ID": "null"})  # ours, where the two differ


def assert_config_sections(book: Book, folder: Path) -> None:
    """The three printed sections as one file."""
    sections = [book.take(start, "yaml") for start in ("gpu:", "proxy:", "models:")]
    path = folder / "sections.yaml"
    path.write_text("".join(sections))
    read = config.load_settings({}, config_file=path, cwd=folder)
    assert (read.gpu_ids, read.reserved_memory_bytes >> 20, read.memory_utilization) == ((0,), 2048, 0.9)
    assert (read.host, read.port, read.default_timeout_s) == ("0.0.0.0", 8080, 300)
    assert list(read.catalog.models) == ["model-id"]


def test_every_document_is_followed() -> None:
    source = Path(__file__).read_text()
    assert all(f'"{path.name}"' in source for path in FOLDER.glob("*.md")) and len(list(FOLDER.glob("*.md"))) == 5
