"""Dependencies point one way; read from the source, so that an import inside a function counts too."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
FOLDERS = ("configuration", "instances", "routing", "web", "simulation", "scripts")
PATHS = [*CHECKOUT.glob("*.py"), *(path for folder in FOLDERS for path in CHECKOUT.glob(f"{folder}/*.py"))]
FILES = {".".join(path.relative_to(CHECKOUT).with_suffix("").parts): path for path in PATHS}
OURS = {name.partition(".")[0] for name in FILES} - {"scripts"}

GROUND = {"config", "errors", "gpu", "instances.instance", "instances.startup_log", "instances.placement",
          "instances.ledger", "instances.eviction", "instances.switching", "instances.footprint", "instances.flags",
          *(name for name in FILES if name.startswith("configuration."))}
"""What depends on nothing above it."""

MAY_IMPORT = {
    "errors": set(),
    "config": {"configuration", "errors", "instances.flags"},
    "configuration.models": set(),
    "configuration.yaml_file": {"errors"},
    "gpu": {"errors"},
    "instance_manager": {"config", "configuration", "errors", "gpu", "instances"},
    "configuration.servers_lines": set(),
    "routing.policies": set(),
    "routing.circuit": set(),
    "routing.health": set(),
    "routing.scrape": set(),
    "routing.balancer": {"errors", "instances.instance", "routing.circuit", "routing.policies", "routing.remote"},
    "instances.scaling": set(),
    "router": {"config", "errors", "instance_manager", "instances.instance", "instances.replicas", "routing"},
}
"""The strictest edges; a package stands for its modules."""


@cache
def imports(name: str) -> frozenset[str]:
    return frozenset(module for module in imported_by(FILES[name]) if module not in OURS or module in FILES)


def imported_by(path: Path) -> set[str]:
    """What a file imports, anywhere in it; without what only a type checker sees."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            node.body = []
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{path}: a relative import"
            found.add(node.module)
            found |= {full for alias in node.names if (full := f"{node.module}.{alias.name}") in FILES}
    return found


def ours(name: str) -> set[str]:
    return {module for module in imports(name) if module.partition(".")[0] in OURS}


def importers(package: str) -> set[str]:
    return {name for name in FILES if any(module.partition(".")[0] == package for module in imports(name))}


@pytest.mark.parametrize("name", sorted(GROUND & FILES.keys()))
def test_the_ground_depends_on_nothing_above_it(name: str) -> None:
    assert ours(name) <= GROUND


@pytest.mark.parametrize("name", sorted(MAY_IMPORT.keys() & FILES.keys()))
def test_each_part_imports_only_what_is_below_it(name: str) -> None:
    allowed = MAY_IMPORT[name]
    assert not {module for module in ours(name) if module not in allowed and module.partition(".")[0] not in allowed}


@pytest.mark.parametrize(("package", "allowed"), [
    ("configuration", {"configuration", "errors", "instances"}),
    ("instances", {"config", "configuration", "errors", "gpu", "instances"}),
    ("routing", {"config", "configuration", "errors", "instances", "routing"}),
    ("web", {"config", "configuration", "errors", "gpu", "instance_manager", "instances", "router", "routing", "web"}),
    ("simulation", {"simulation"})])
def test_a_folder_is_a_part_of_what_stands_above_it(package: str, allowed: set[str]) -> None:
    reached = {(name, module) for name in FILES if name.partition(".")[0] == package for module in ours(name)}
    assert not {(name, module) for name, module in reached if module.partition(".")[0] not in allowed}


def test_nobody_imports_the_composition_root() -> None:
    assert importers("app") == set()


def test_the_simulator_and_the_daemon_know_nothing_of_each_other() -> None:
    assert importers("simulation") <= {name for name in FILES if name.partition(".")[0] in ("simulation", "simulator")}
    assert ours("simulator") <= {"simulation"} | {name for name in FILES if name.startswith("simulation.")}


def test_flask_is_for_the_web_side() -> None:
    assert {name for name in importers("flask") if not name.startswith("web.")} <= {"app", "router"}


def test_one_place_makes_processes() -> None:
    scripts = {name for name in FILES if name.startswith("scripts.")}
    assert importers("subprocess") - scripts <= {"instances.launcher", "routing.relay_process"}
    assert "instances.launcher" in importers("subprocess")      # else this test has lost its sight


def test_there_is_no_circle() -> None:
    """Type checkers may see one (a keeper names its manager); the running program may not."""
    edges = {name: {module for module in ours(name) if module in FILES and module != name} for name in FILES}
    while leaves := {name for name, below in edges.items() if not below}:
        edges = {name: below - leaves for name, below in edges.items() if name not in leaves}
    assert edges == {}
