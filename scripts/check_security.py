"""Looks for what should not be in a commit: risky calls, secrets, packages with known holes.  `make check` runs it.

What is accepted all the same stands in pyproject.toml ([tool.bandit], [tool.vllm-server.security]) with its reason, or
beside the line (`# nosec ID`).  Packages are checked by pip-audit against PyPI's database; where that cannot be
reached, against the last list that can be installed (safety-db), which is old, and that is said.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
CODE = ("app.py", "config.py", "errors.py", "gpu.py", "instance_manager.py", "router.py", "simulator.py",
        "configuration", "instances", "routing", "web", "simulation", "scripts", "client/vllm_server_client",
        "benchmarks", "examples")
NOT_SCANNED = ("tests/data/", "LICENSE")
ANY_WORD = ("KeywordDetector", "BasicAuthDetector", "Base64HighEntropyString", "HexHighEntropyString")
"""They find what tests are full of, on purpose."""
DATABASE_WAIT_S = 5


def exceptions() -> Mapping[str, Any]:
    with open(CHECKOUT / "pyproject.toml", "rb") as file:
        found: Mapping[str, Any] = tomllib.load(file)["tool"]["vllm-server"]["security"]
    return found


def risky_calls() -> Iterator[str]:
    done = subprocess.run([sys.executable, "-m", "bandit", "-q", "-c", "pyproject.toml", "-r", *CODE, "-f", "json"],
                          cwd=CHECKOUT, capture_output=True, text=True, check=False)
    try:
        report = json.loads(done.stdout)
    except ValueError:
        yield f"bandit does not run: {done.stderr.strip()[-300:]} (make check installs it)"
        return
    for one in (*report["errors"], *report["results"]):
        yield f"{one['filename']}:{one.get('line_number', 0)} {one.get('test_id', '')} {one.get('issue_text', one)}"


def secrets(accepted: Mapping[str, str]) -> Iterator[str]:
    """`accepted`: text of a line -> why it holds none."""
    from detect_secrets.core.secrets_collection import SecretsCollection
    from detect_secrets.settings import default_settings, get_settings

    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=CHECKOUT, capture_output=True,
                            text=True, check=False).stdout.splitlines()
    with default_settings():
        # nothing is sent to any service to be tried, and the tests come last, with what only has a real key's form
        get_settings().disable_filters("detect_secrets.filters.common.is_ignored_due_to_verification_policies")
        for name in sorted(listed, key=lambda name: (name.startswith("tests/"), name)):
            if name.startswith(NOT_SCANNED) or not (CHECKOUT / name).is_file():
                continue
            if name.startswith("tests/"):
                get_settings().disable_plugins(*ANY_WORD)
            found = SecretsCollection(root=str(CHECKOUT))
            found.scan_file(name)
            for _, secret in found:
                line = (CHECKOUT / name).read_text().splitlines()[secret.line_number - 1]
                if not any(text in line for text in accepted):
                    yield f"{name}:{secret.line_number} {secret.type}"


def packages(accepted: Mapping[str, str]) -> Iterator[str]:
    """`accepted`: id of a hole -> why it does not matter here."""
    installed = {one.metadata["Name"].lower(): one.version for one in metadata.distributions()}
    found = _audited(installed)
    if found is None:
        say("packages: pip-audit's database cannot be reached; checked against safety-db's list of 2021 instead")
        found = _listed(installed)
    for package, hole in found:
        if hole not in accepted:
            yield f"{package} {installed.get(package, '')} has a known hole: {hole}"


def _audited(installed: Mapping[str, str]) -> list[tuple[str, str]] | None:
    """None: not all could be looked up."""
    first = _pip_audit({"flask": installed["flask"]})       # an index without the database is known by one question
    return _pip_audit(installed) if first is not None else None


def _pip_audit(wanted: Mapping[str, str]) -> list[tuple[str, str]] | None:
    lines = "\n".join(f"{name}=={version}" for name, version in wanted.items() if not name.startswith("vllm-server"))
    done = subprocess.run([sys.executable, "-m", "pip_audit", "-r", "/dev/stdin", "--disable-pip", "--no-deps", "-f",
                           "json", "--progress-spinner", "off", "--timeout", str(DATABASE_WAIT_S)],
                          input=lines, capture_output=True, text=True, check=False)
    try:
        report = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        return None
    if any("skip_reason" in one for one in report):
        return None
    return [(one["name"].lower(), hole["id"]) for one in report for hole in one["vulns"]]


def _listed(installed: Mapping[str, str]) -> list[tuple[str, str]]:
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    spec = find_spec("safety_db")       # which cannot be imported: it opens its own files by a wrong name
    if spec is None or spec.origin is None:
        return [("safety-db", "is not installed")]
    listed = json.loads((Path(spec.origin).parent / "insecure_full.json").read_text())
    found = []
    for name, version in installed.items():
        for hole in listed.get(name, []):
            try:
                hit = any(SpecifierSet(spec).contains(version, prereleases=True) for spec in hole["specs"])
            except InvalidSpecifier:
                hit = True
            if hit:
                found.append((name, hole.get("cve") or hole["id"]))
    return found


def say(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    accepted = exceptions()
    broken = 0
    for what, problems in (("risky calls", risky_calls()), ("secrets", secrets(accepted["not-secrets"])),
                           ("packages", packages(accepted["holes"]))):
        found = list(problems)
        say("\n".join([f"{what}: {len(found)} found" if found else f"{what}: none found", *found]))
        broken += len(found)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
