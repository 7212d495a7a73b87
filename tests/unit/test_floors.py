"""The house holds: imports go down only, the model knows no cluster, importing does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]

FLOORS = {
    "jobs": 7,
    "kgray.serving": 6,
    "kgray.pipeline": 6,
    "kgray.prediction": 6,
    "kgray.training": 5,
    "kgray.evaluation": 4,
    "kgray.model": 4,
    "kgray.reasoning": 4,
    "kgray.extraction": 4,
    "kgray.graph": 3,
    "kgray.data": 3,
    "kgray.text": 3,
    "kgray.lineage": 3,
    "kgray.artifact": 2,
    "kgray.config": 2,
    "kgray.config_recipes": 2,
    "kgray.config_text": 2,
    "kgray.runtime": 2,
    "kgray.machine": 2,
    "kgray.phases": 2,
    "kgray.errors": 1,
}

FILES = sorted(p for top in ("kgray", "jobs") for p in (REPO / top).rglob("*.py"))
CLUSTER = ("ray", "mlflow", "pydantic", "fastapi")


def module_of(path: Path) -> str:
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[0] if parts[0] == "jobs" else ".".join(parts[:2])


def imports_of(path: Path, top_level_only: bool = False) -> list[tuple[int, str]]:
    """(line, module) of every import, also those inside functions unless told otherwise."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    package = module_of(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found = []
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (base, node.module or "") if part)
            if base == "kgray":
                found += [(node.lineno, f"kgray.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, base))
    return found


def test_every_room_has_a_floor():
    rooms = {room_of(module_of(path)) for path in FILES} - {"kgray"}
    assert rooms <= set(FLOORS), f"give these a floor in FLOORS: {sorted(rooms - set(FLOORS))}"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_down_only(path: Path):
    own = room_of(module_of(path))
    floor = FLOORS.get(own, 0)  # kgray/__init__.py stands below all
    upward = [
        f"{path.relative_to(REPO)}:{line} (floor {floor}) imports {name} (floor {FLOORS[room_of(name)]})"
        for line, name in imports_of(path)
        if room_of(name) in FLOORS and FLOORS[room_of(name)] > floor
    ]
    assert not upward, "\n".join(upward)


def test_the_walk_sees_a_wrong_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The test above would fail if the rule were broken, in each way an import can be written."""
    monkeypatch.setitem(globals(), "REPO", tmp_path)
    folder = tmp_path / "kgray" / "graph"
    folder.mkdir(parents=True)
    wrong = folder / "wrong.py"
    for text in (
        "import kgray.model.fused",
        "from kgray.model import fused",
        "from kgray import model",
        "from ..model.fused import Fused",
        "def f():\n    from kgray.model.fused import Fused",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import kgray.model.fused",
    ):
        wrong.write_text(text)
        with pytest.raises(AssertionError, match=r"wrong\.py:\d \(floor 3\) imports kgray\.model"):
            test_imports_go_down_only(wrong)


BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(name + " is out of bounds here")

sys.meta_path.insert(0, Block())
import importlib
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def import_blocked(modules: list[str], blocked: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    code = BLOCK.format(blocked=blocked)
    return subprocess.run([sys.executable, "-c", code, *modules], cwd=REPO, capture_output=True, text=True, check=False)


def ray_free_modules() -> list[str]:
    rooms = ("kgray.model", "kgray.graph", "kgray.reasoning")
    modules = [module_of(path) for path in FILES]
    # The one exception: it keeps shards of the graph in Ray actors.
    chosen = [m for m in modules if room_of(m) in rooms and m != "kgray.graph.actors"]
    return [*chosen, "kgray.training.loop"]


def test_model_graph_and_loop_know_no_cluster():
    """Not even through what they import; a lone GPU box without Ray can train and score."""
    done = import_blocked(ray_free_modules(), CLUSTER)
    assert done.returncode == 0, done.stderr
    assert import_blocked(["kgray.runtime", "ray"], CLUSTER).returncode != 0


def test_foundation_imports_fast():
    """An up-to-date run only reads manifests; it must not pay for what it does not use."""
    light = ["kgray.config", "kgray.artifact", "kgray.runtime", "kgray.errors"]
    done = import_blocked(light, ("ray", "torch", "mlflow", "pandas", "transformers"))
    assert done.returncode == 0, done.stderr


def lines_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_size_of_files_and_functions(path: Path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400, "more than 400 lines: usually two things"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            # Functions inside (the routes of an app) are counted for themselves.
            inner = [n for n in ast.walk(node) if n is not node and isinstance(n, type(node))]
            length = lines_of(node) - sum(lines_of(n) for n in inner)
            assert length <= 60, f"{node.name} has {length} lines, more than 60: usually two things"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_only_the_runtime_starts_ray(path: Path):
    """One module owns ``ray.init``, Ray's environment variables and the DataContext."""
    if module_of(path) == "kgray.runtime":
        return
    text = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            assert call not in ("ray.init", "ray.shutdown"), f"line {node.lineno}: use kgray.runtime.ray_session"
        if isinstance(node, ast.Assign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                written = ast.unparse(target)
                assert not written.startswith(("os.environ['RAY", 'os.environ["RAY')), f"line {node.lineno}"
