"""docs/CONFIGURATION.md: every setting and every key of every file, from their definitions."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from configuration.schema import schema
from configuration.servers import CONFIG_KEYS, OTHERS, SERVER_KEYS, TLS_KEYS
from configuration.settings_table import SETTINGS, Setting
from instance_manager import FIXED
from instances import unsafe_flags
from instances.flags import RESERVED_FLAGS
from scripts.doc_words import kind_of, rows, table, told

HEADS = {"en": ("name", "default", "reload", "means"), "zh": ("名称", "默认值", "重载", "含义")}
KEYS = {"en": ("key", "type", "default", "means"), "zh": ("键", "类型", "默认值", "含义")}
WORDS = {
    "en": {"yes": "yes", "no": "restart", "older": "older name", "secret": "secret", "required": "required"},
    "zh": {"yes": "是", "no": "需重启", "older": "旧名称", "secret": "机密", "required": "必填"}}
TEXTS = {
    "en": """# Configuration

[中文](CONFIGURATION_zh.md)

This file is written by `scripts/make_docs.py` from the definitions that the daemon itself reads.

A setting is taken from the command line (`--host`, `--port`), else the environment, else `.env` in the working directory
(`--env FILE`), else `config.yaml`, else its default. `null` stands for 'not set'. A name that is unknown, or a value that is
wrong, stops the start with file and line; `python app.py --check` tells without starting anything. SIGHUP,
`POST /admin/reload`, and a change of `config.yaml` or `servers.toml` have all of it read anew; a mistake then leaves the old
values in force. What says `restart` below takes effect at the next start only.

## Settings: `.env` and the environment
""",
    "zh": """# 配置

[English](CONFIGURATION.md)

本文件由 `scripts/make_docs.py` 根据守护进程自身读取的定义生成。

一项配置依次取自命令行（`--host`、`--port`）、环境变量、工作目录中的 `.env`（`--env FILE`）、`config.yaml`，最后是默认值。
`null` 表示“未设置”。未知的名称或错误的值会使启动中止，并给出文件与行号；`python app.py --check` 不启动任何东西，只做检查。
SIGHUP、`POST /admin/reload`，以及 `config.yaml` 或 `servers.toml` 的改动都会重新读取全部配置；若有错误则保留旧值。
下表中标为“需重启”的项在下次启动时才生效。

## 配置项：`.env` 与环境变量
"""}
TITLES = {
    "en": {"config.yaml": "`config.yaml`", "models": "`models.NAME`", "gpu": "`gpu`", "proxy": "`proxy`",
           "key": "`proxy.keys[]`", "servers.toml": "`servers.toml`", "server": "`[servers] servers[]`",
           "tls": "`tls` of a server", "config": "`[config]`",
           "idle": "Keys of mvllm's `[config]` that are read and do nothing here, with a warning: ",
           "flags": "Flags of vLLM that cannot be set", "flags_text":
           "`params`, `vllm_config.json` and `VLLM_DEFAULT_<FLAG>` take every flag of `vllm serve` but these, which are "
           "the daemon's own: ",
           "unsafe_text": "These name files or code, so the params of a request may not hold them unless "
                          "`ALLOW_UNSAFE_PARAMS=true` (`instances/unsafe_flags.py` has the reasons): ",
           "yaml_text": "In the working directory, else `configs/config.yaml`, or `--config FILE`. Top-level keys that "
                        "begin with `x-` are for YAML anchors. [The schema](../configuration/config.schema.json) checks "
                        "it, here and in editors.",
           "toml_text": "In the working directory, or `--servers FILE`, or `SERVERS_CONFIG`."},
    "zh": {"config.yaml": "`config.yaml`", "models": "`models.名称`", "gpu": "`gpu`", "proxy": "`proxy`",
           "key": "`proxy.keys[]`", "servers.toml": "`servers.toml`", "server": "`[servers] servers[]`",
           "tls": "服务器的 `tls`", "config": "`[config]`",
           "idle": "mvllm 的 `[config]` 中以下键会被读取，但在这里不起作用，并给出警告：",
           "flags": "不能设置的 vLLM 参数", "flags_text":
           "`params`、`vllm_config.json` 和 `VLLM_DEFAULT_<FLAG>` 接受 `vllm serve` 的所有参数，但以下由守护进程自己设置的除外：",
           "unsafe_text": "以下参数指向文件或代码，除非 `ALLOW_UNSAFE_PARAMS=true`，请求的 params 不得包含它们"
                          "（理由见 `instances/unsafe_flags.py`）：",
           "yaml_text": "位于工作目录，否则为 `configs/config.yaml`，或由 `--config FILE` 指定。以 `x-` 开头的顶层键供 YAML 锚点使用。"
                        "[其 schema](../configuration/config.schema.json) 在此处和编辑器中都会检查它。",
           "toml_text": "位于工作目录，或由 `--servers FILE`、`SERVERS_CONFIG` 指定。"}}


def document(root: Path, language: str) -> str:
    titles = TITLES[language]
    readme = rows(root / ("README.md" if language == "en" else "README_zh.md"))
    parts = [TEXTS[language]]
    for section, chosen in groupby(SETTINGS, key=lambda one: one.section):
        parts.append(f"### {told(section, language)}\n\n" + table(
            HEADS[language], [_setting(one, language, readme) for one in chosen]))
    parts.append(f"## {titles['config.yaml']}\n\n{titles['yaml_text']}\n")
    found = schema()
    for name, where in (("models", found["definitions"]["model"]), ("gpu", found["properties"]["gpu"]),
                        ("proxy", found["properties"]["proxy"]), ("key", found["definitions"]["key"])):
        parts.append(f"### {titles[name]}\n\n" + table(KEYS[language], [
            [f"`{key}`", kind_of(one), f"`{_shown(one['default'])}`" if "default" in one else
             WORDS[language]["required"] if key in where.get("required", ()) else "",
             told(one["description"], language)] for key, one in where["properties"].items()]))
    parts.append(f"## {titles['servers.toml']}\n\n{titles['toml_text']}\n")
    for name, keys in (("server", SERVER_KEYS), ("tls", TLS_KEYS), ("config", CONFIG_KEYS)):
        columns = KEYS[language]
        parts.append(f"### {titles[name]}\n\n" + table((columns[0], *columns[2:]), [
            [f"`{key}`", WORDS[language]["required"] if default is None else f"`{default}`", told(what, language)]
            for key, (default, what) in keys.items()]))
    parts.append(titles["idle"] + _listed(sorted(OTHERS)) + "\n")
    parts.append(f"## {titles['flags']}\n\n{titles['flags_text']}{_listed(sorted(RESERVED_FLAGS))}\n\n"
                 f"{titles['unsafe_text']}{_listed(sorted(unsafe_flags.UNSAFE_FLAGS))}\n")
    return "\n".join(parts)


def _setting(one: Setting, language: str, readme: Mapping[str, str]) -> list[str]:
    words = WORDS[language]
    notes = [f"{words['older']}: {_listed(one.older)}"] if one.older else []
    notes += [words["secret"]] if one.secret else []
    means = one.help if language == "en" else readme[one.name].partition("（旧名")[0]
    more = f" ({'; '.join(notes)})" if notes else ""
    return [f"`{one.name}`", f"`{one.default}`", words["no" if one.field in FIXED else "yes"],
            means.replace("|", "\\|") + more]


def _listed(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
