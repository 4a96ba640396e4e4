"""The reference of docs/API.md: every route, from the table that /openapi.json is made of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from routing.paths import BY_MODEL
from scripts.doc_words import kind_of, rows, table, told
from web.openapi import ERRORS
from web.openapi_routes import INFER, MANAGE, OPEN, ROUTES, Route, merged
from web.openapi_schemas import CREATE, SLEEP, UNLOAD, WAIT

WORDS = {
    "en": {MANAGE: "Management", INFER: "Inference", OPEN: "Open to everyone", "call": "call", "does": "does",
           "takes": "takes", "answers": "answers", "errors": "errors", "field": "field", "type": "type",
           "means": "means", "body": "Body of", "required": "required",
           "all": "All of these also: ",
           "by model": "**By model.** These take `model` in a JSON body or a multipart form, and answer what the engine "
                       "answers, in events where a stream is asked for:",
           "their errors": "Their errors, beside the engine's own: "},
    "zh": {MANAGE: "管理", INFER: "推理", OPEN: "对所有人开放", "call": "调用", "does": "作用", "takes": "参数",
           "answers": "应答", "errors": "错误", "field": "字段", "type": "类型", "means": "含义", "body": "请求体：",
           "required": "必填",
           "all": "以下调用还都可能返回：",
           "by model": "**按模型路由。** 这些调用在 JSON 请求体或 multipart 表单中带有 `model`，应答就是引擎的应答；要求流式时以事件返回：",
           "their errors": "除引擎自身的错误外，它们的错误有："}}
BODIES = {"POST /instances": CREATE, "POST /instances/<instance_id>/sleep": SLEEP,
          "POST /instances/<instance_id>/wake": WAIT, "POST /admin/models/<name>/load": WAIT,
          "POST /admin/models/<name>/unload": UNLOAD}


def reference(root: Path, language: str) -> str:
    words, does = WORDS[language], rows(root / ("README.md" if language == "en" else "README_zh.md"))
    parts = []
    for access in (MANAGE, INFER, OPEN):
        chosen = [route for route in ROUTES if route.access == access and route.path not in BY_MODEL]
        seen: dict[str, Route] = {}
        for route in chosen:        # ANY /proxy is one line
            seen.setdefault(f"ANY {_path(route)}" if route.path.startswith("/proxy/") else _call(route), route)
        head = [words[name] for name in ("call", "does", "takes", "answers", "errors")]
        common = f"{words['all']}{_listed(ERRORS[access])}\n\n" if ERRORS[access] else ""
        parts.append(f"### {words[access]}\n\n{common}" + table(head, [
            [f"`{call}`", _from_docs(does[call], language), _takes(route), ", ".join(map(str, route.answers)), _errors(route)]
            for call, route in seen.items()]))
        if access == INFER:
            by_model = [route for route in ROUTES if route.path in BY_MODEL]
            listed = ", ".join(f"`{_call(route)}`" for route in by_model)
            parts.append(f"{words['by model']}\n\n{listed}\n\n{words['their errors']}{_errors(by_model[0])}\n")
    for call, schema in BODIES.items():
        parts.append(f"#### {words['body']} `{call}`\n\n" + table([words["field"], words["type"], words["means"]], [
            [f"`{name}`", kind_of(one) + (f" ({words['required']})" if name in schema["required"] else ""),
             told(one.get("description", ""), language)] for name, one in schema["properties"].items()]))
    return "\n" + "\n".join(parts) + "\n"


def _from_docs(text: str, language: str) -> str:
    """With its links as they are from docs/."""
    readme = "README.md" if language == "en" else "README_zh.md"
    return re.sub(r"\]\(#", f"](../{readme}#", re.sub(r"\]\((?!docs/|#|\w+:)", "](../", text)).replace("](docs/", "](")


def _path(route: Route) -> str:
    return re.sub(r"{(\w+)}", r"<\1>", route.path)


def _call(route: Route) -> str:
    return f"{route.method} {_path(route)}"


def _takes(route: Route) -> str:
    names = [f"`?{name}`" for name in route.query]
    return ", ".join(names + [f"`{name}`" for name in (route.body or {}).get("properties", ())])


def _errors(route: Route) -> str:
    """Statuses with their codes."""
    return _listed(merged(route.errors))


def _listed(errors: Mapping[int, str]) -> str:
    return "; ".join(" ".join([str(status), ", ".join(codes(what))]).strip() for status, what in sorted(errors.items()))


def codes(what: str) -> list[str]:
    return list(dict.fromkeys(f"`{code}`" for code in re.findall(r"`([a-z]+_[a-z_]+)`", what)
                              if code not in ("file_name",)))
