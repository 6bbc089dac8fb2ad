"""The layers of the package: imports go down only, and heavy or POSIX-only modules stay local."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {  # a package may import from lower floors and from itself, never sideways or up
    "minsae_jax.errors": 0,
    "minsae_jax.estimates": 0,
    "minsae_jax.interrupts": 0,
    "minsae_jax.locks": 1,
    "minsae_jax.strict_yaml": 1,
    "minsae_jax.files": 2,
    "minsae_jax.settings": 3,
    "minsae_jax.checksums": 3,
    "minsae_jax.json_values": 3,
    "minsae_jax.parallel": 4,
    "minsae_jax.cli": 4,
    "minsae_jax.monitor": 5,
    "minsae_jax.eeg": 6,
    "minsae_jax.activations": 7,
    "minsae_jax.encoder": 8,
    "minsae_jax.sae": 8,
    "minsae_jax.evaluation": 9,
    "convert": 9,
    "minsae_jax.report": 10,
    "minsae_jax.integrity": 10,
    "minsae_jax.api": 11,
    "minsae_jax": 12,  # its __init__.py, the public names
    "minsae_jax.__main__": 13,
}
FAMILIES = ("minsae_jax.encoder.patchtst", "minsae_jax.encoder.cbramod")
POSIX_ONLY = {"fcntl", "grp", "pwd", "resource", "termios"}
FILES = sorted([*(ROOT / "minsae_jax").rglob("*.py"), *(ROOT / "convert").rglob("*.py")])


def package_of(module: str) -> str:
    return max((name for name in FLOORS if f"{module}.".startswith(f"{name}.")), key=len)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_names(nodes: Iterator[ast.AST], path: Path) -> list[str]:
    names = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def all_imports(path: Path) -> list[str]:
    """Return the imported names of a file, those inside functions included."""
    return imported_names(ast.walk(ast.parse(path.read_text())), path)


def imports_at_the_top(path: Path) -> list[str]:
    """Return the names that are imported when the module is: outside functions."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            for child in ast.iter_child_nodes(node):
                yield from walk(child)

    return imported_names(walk(ast.parse(path.read_text())), path)


def top_packages(names: list[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def test_imports_go_down():
    for path in FILES:
        package = package_of(module_of(path))
        for name in all_imports(path):
            if name.split(".")[0] in ("minsae_jax", "convert"):
                target = package_of(name)
                is_below = FLOORS[target] < FLOORS[package]
                assert target == package or is_below, f"{path} imports {name}"


@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_encoders_do_not_import_each_other(family):
    others = tuple(f"{name}." for name in FAMILIES if name != family)
    files = [path for path in FILES if module_of(path).startswith(f"{family}.")]
    assert files
    for path in files:
        for name in all_imports(path):
            assert not name.startswith(others), f"{path} imports {name}"


def test_torch_and_orbax_are_imported_in_few_places():
    for path in FILES:
        packages = top_packages(all_imports(path))
        assert "torch" not in packages or path.is_relative_to(ROOT / "convert"), path
        assert "orbax" not in packages or path.name in ("checkpoints.py", "converted.py"), path


def test_modules_import_on_windows():
    """POSIX-only modules are imported where they are used, if at all."""
    for path in FILES:
        assert not top_packages(imports_at_the_top(path)) & POSIX_ONLY, path


WITHOUT_TORCH = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
import minsae_jax.__main__, minsae_jax.report.features, minsae_jax.sae.trainer
minsae_jax.__main__.main(["--help"])
"""


@pytest.mark.slow
def test_package_runs_without_torch():
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH], check=True, stdout=subprocess.DEVNULL)
