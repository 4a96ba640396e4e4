"""A model's `api_key` reaches its own engine, and the daemon's keys none."""

from __future__ import annotations

from pathlib import Path

from tests.daemon import Daemon

CONFIG = """
models:
  gated: {model_path: org/gated, api_key: hf_token_of_gated}
  plain: {model_path: org/plain}
proxy:
  keys: [{name: team, key: key-of-the-team}]
"""


def test_each_engine_has_its_own_token_and_no_key(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    env = {"API_KEYS": "key-of-users", "ADMIN_API_KEYS": "key-of-admins", "VLLM_SERVER_API_KEY": "key-of-the-command"}
    with Daemon(tmp_path, env) as daemon:
        admin = {"X-Api-Key": "key-of-admins"}
        for name in ("gated", "plain"):
            loaded = daemon.call("POST", f"/admin/models/{name}/load", {"wait": True}, admin)
            assert loaded.status == 200, loaded
        pids = {one["configured_as"]: one["pid"] for one in daemon.get("/instances", admin).json["data"]}
        environments = {name: Path(f"/proc/{pid}/environ").read_bytes() for name, pid in pids.items()}
        assert b"HF_TOKEN=hf_token_of_gated" in environments["gated"].split(b"\0")
        assert b"hf_token_of_gated" not in environments["plain"]
        for pid, environment in zip(pids.values(), environments.values(), strict=True):
            assert b"key-of-" not in environment
            command = Path(f"/proc/{pid}/cmdline").read_bytes()         # which every user may read
            assert b"hf_token_of_gated" not in command and b"key-of-" not in command
        for path in ("/instances", "/admin/models", "/admin/models/gated", "/v1/models", "/metrics", "/health"):
            shown = daemon.get(path, admin).body
            assert b"hf_token_of_gated" not in shown and b"key-of-" not in shown
        assert "hf_token_of_gated" not in daemon.log and "key-of-" not in daemon.log
