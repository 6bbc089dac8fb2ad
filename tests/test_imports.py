"""The floors of the house: imports go down only, and torch stays in its room."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {  # a package may import from packages of a lower number, and from itself
    "minsae_jax.errors": 0, "minsae_jax.settings": 1, "minsae_jax.files": 1, "minsae_jax.parallel": 1,
    "minsae_jax.cli": 2, "minsae_jax.monitor": 2,
    "minsae_jax.eeg": 3, "minsae_jax.activations": 4, "minsae_jax.encoder": 5, "minsae_jax.sae": 5,
    "minsae_jax.evaluation": 6, "minsae_jax.report": 7, "convert": 6,
    "minsae_jax": 8,  # its __init__.py, the public API
    "minsae_jax.__main__": 9,
}  # fmt: skip
FILES = sorted([*(ROOT / "minsae_jax").rglob("*.py"), *(ROOT / "convert").rglob("*.py")])


def room(module: str) -> str:
    return max((name for name in FLOORS if f"{module}.".startswith(f"{name}.")), key=len)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_down(path):
    here = room(module_of(path))
    for name in imports(path):
        if name.split(".")[0] in ("minsae_jax", "convert"):
            there = room(name)
            assert there == here or FLOORS[there] < FLOORS[here], f"{path} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_torch_and_orbax_stay_in_their_rooms(path):
    tops = {name.split(".")[0] for name in imports(path)}
    if "torch" in tops:
        assert path.parent.name == "convert"
    if "orbax" in tops:
        assert path.name in ("checkpoints.py", "converted.py")


WITHOUT_TORCH = """
import sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ImportError(name)

sys.meta_path.insert(0, Refused())
import minsae_jax.__main__, minsae_jax.report.features
minsae_jax.__main__.main([])
"""


def test_the_package_runs_without_torch():
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH], check=True, stdout=subprocess.DEVNULL)
