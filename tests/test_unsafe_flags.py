"""What a request may not name: files of this machine, and code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from errors import Forbidden
from instances import unsafe_flags
from instances.flags import check_params
from instances.unsafe_flags import UNSAFE_FLAGS
from tests.daemon import Daemon


def check(params: dict[str, Any], configured: dict[str, Any] | None = None) -> None:
    unsafe_flags.check(check_params(params, param="params"), configured or {}, param="params")


@pytest.mark.parametrize("name", UNSAFE_FLAGS)
def test_each_flag_of_the_list_is_refused_with_its_reason(name: str) -> None:
    with pytest.raises(Forbidden) as refused:
        check({name: True if name.startswith("trust_") else "/etc/passwd"})
    assert UNSAFE_FLAGS[name] in refused.value.message and "ALLOW_UNSAFE_PARAMS" in refused.value.message
    assert (refused.value.code, refused.value.param) == ("unsafe_param", f"params.{name}")


@pytest.mark.parametrize("params", [
    {"chat-template": "{{ x }}"},
    {"tool-parser-plug": "/tmp/evil.py"},                                   # argparse takes it for the whole name
    {"kv_transfer_config.kv_connector_module_path": "evil"},
    {"kv_transfer_config": {"kv_connector_module_path": "evil"}},
    {"middleware": ["evil.Middleware"]},
    {"speculative_config": {"method": "custom_class", "model": "x"}},
    {"speculative_config": {"model": "evil.Proposer"}},
    {"sc": {"model": "evil.Proposer"}},
    {"speculative_config.model": "evil.Proposer"},
    {"speculative_config": "{\"model\": \"evil.Proposer\"}"},
    {"spec-model": "evil.Proposer"},
    {"spec_method": "custom_class"},
    {"structured_outputs_config.reasoning_parser_plugin": "/tmp/evil.py"},
    {"trust-remote-code": True},
    {"no_trust_remote_code": False},
])
def test_other_spellings_are_refused_too(params: dict[str, Any]) -> None:
    with pytest.raises(Forbidden):
        check(params)


@pytest.mark.parametrize("params", [
    {}, {"max_model_len": 2048, "dtype": "auto", "hf_overrides": {"x": 1}},
    {"speculative_config": {"model": "org/draft", "num_speculative_tokens": 3}},
    {"speculative_config": {"method": "ngram"}}, {"spec_model": "org/draft-1.5"}, {"spec_model": "./draft"},
    {"tool_call_parser": "hermes", "enable_auto_tool_choice": True, "chat_template_content_format": "openai"},
    {"trust_remote_code": False}, {"chat_template": None}, {"tokenizer": "org/name", "load_format": "dummy"},
])
def test_what_names_no_file_and_no_code_is_free(params: dict[str, Any]) -> None:
    check(params)


def test_what_the_configuration_says_anyway_may_be_said_again() -> None:
    configured = {"trust_remote_code": True, "chat_template": "/srv/chat.jinja"}
    check({"trust_remote_code": True, "chat-template": "/srv/chat.jinja"}, configured)
    with pytest.raises(Forbidden):
        check({"chat_template": "/srv/other.jinja"}, configured)


@pytest.mark.whole
def test_the_daemon_refuses_them_unless_told_otherwise(tmp_path: Path) -> None:
    wanted = {"model_name": "org/name", "params": {"middleware": "evil.M"}}
    middleware = "params.middleware"
    with Daemon(tmp_path / "strict") as daemon:
        answer = daemon.post("/instances", wanted)
        assert (answer.status, answer.error["code"], answer.error["param"]) == (403, "unsafe_param", middleware)
        assert daemon.get("/instances").json["data"] == []
    with Daemon(tmp_path / "free", {"ALLOW_UNSAFE_PARAMS": "true"}) as daemon:
        assert daemon.post("/instances", wanted).status == 201
