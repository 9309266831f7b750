"""The layout of ARCHITECTURE.md: packages import downwards, names are standard terms, the wheel ships what it must."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "specdec"

LAYERS = {
    "utils": 0,
    "core": 1,
    "quant": 2,
    "runtime": 3,
    "drafters": 4,
    "draft_length": 4,
    "generation": 5,
    "pages": 6,
    "audit": 7,
    "planning": 7,
    "experiments": 8,
    "training": 9,
    "specdec_cli": 10,
}
# packages of the extra "experiments"
NEEDS_EXTRAS = {"hydra", "omegaconf", "datasets", "accelerate", "jinja2", "matplotlib", "numpy"}


# Words that names had before the field's terms replaced them
PRIVATE_WORDS = {
    "pace", "experience", "hoped", "outcome", "told", "heard", "hears", "unheard", "settle", "look", "looked", "judge",
    "seat", "siblings", "lent", "directly", "ordinary", "beside", "wording", "slab", "lap", "laps", "clock",
    "forerunner", "forerunners", "guess", "room", "rooms", "floor", "floors",
}  # fmt: skip
PRIVATE_NAMES = {"LARGEST"}
PRIVATE_MODULES = {"beside", "wording", "reported", "pace"}
SOURCES = [
    path
    for folder in ("specdec", "specdec_cli", "kernels", "scripts")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removeprefix("specdec.")


def imports(path: Path, for_types: bool = False) -> set[str]:
    """Modules imported at run time; for_types: those under `if TYPE_CHECKING` as well."""
    found = set()

    def visit(node: ast.AST) -> None:
        is_for_types = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        if is_for_types and not for_types:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names if node.module.startswith("specdec"))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


MODULES = [
    path
    for folder in (PACKAGE, ROOT / "specdec_cli")
    for path in sorted(folder.rglob("*.py"))
    if path.name != "__init__.py"
]


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_go_down(path: Path) -> None:
    package = module_name(path).split(".")[0]
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "specdec_cli":
            assert package == "specdec_cli", f"{module_name(path)} imports {name}"
        if parts[0] == "specdec":
            imported = parts[1] if len(parts) > 1 and parts[1] in LAYERS else "generation"  # the public names
            is_below = LAYERS[imported] < LAYERS[package] or imported == package
            assert is_below, f"{module_name(path)} imports {name}"
        if parts[0] == "transformers":
            assert package != "core", f"{module_name(path)} imports {name}"
        if parts[0] in ("hydra", "omegaconf"):
            assert package == "specdec_cli", f"{module_name(path)} imports {name}: the library never sees a DictConfig"
        if parts[0] in NEEDS_EXTRAS:
            assert LAYERS[package] > LAYERS["generation"], f"{module_name(path)} imports {name}"


def test_no_circle() -> None:
    """Of modules, imports for the type checker alone included."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in MODULES}
    graph = {module: imports(path, for_types=True) & files.keys() for module, path in files.items()}
    for node in (order := TopologicalSorter(graph)).static_order():
        assert node in files
    assert not order.is_active()


def defined_names(tree: ast.AST) -> set[tuple[int, str]]:
    """(line, name) of the functions, classes, arguments, variables and attributes that a module defines."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add((node.lineno, node.name))
        elif isinstance(node, ast.arg):
            names.add((node.lineno, node.arg))
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add((node.lineno, node.id))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add((node.lineno, node.attr))
        elif isinstance(node, ast.alias) and node.asname:
            names.add((node.lineno, node.asname))
    return names


def words(name: str) -> set[str]:
    """The words of an identifier in snake_case, CamelCase or UPPER_CASE, in lower case."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_names_are_standard_terms(path: Path) -> None:
    assert path.stem not in PRIVATE_MODULES
    names = defined_names(ast.parse(path.read_text(encoding="utf-8")))
    private = [(line, name) for line, name in sorted(names) if words(name) & PRIVATE_WORDS or name in PRIVATE_NAMES]
    assert private == []


def test_names_are_split_into_words() -> None:
    assert words("has_looked") == {"has", "looked"}
    assert words("ModuleClock") == {"module", "clock"}
    assert words("MAX_ROOM_S") == {"max", "room", "s"}
    assert words("overlap") == {"overlap"}


def test_import_specdec_needs_torch_and_transformers_alone() -> None:
    absent = sorted(NEEDS_EXTRAS - {"numpy", "jinja2"} | {"rich", "triton"})
    code = f"import sys; sys.modules.update(dict.fromkeys({absent}, None)); import specdec; specdec.enable"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_algorithm_is_read_in_under_150_lines() -> None:
    assert len((PACKAGE / "core" / "speculative.py").read_text(encoding="utf-8").splitlines()) < 150


def test_kernels_is_no_package_so_transformers_probe_does_not_find_it() -> None:
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_wheel_ships_the_pair_and_only_our_packages(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"specdec", "specdec_cli", "specdec_kernels"}
    for needed in ("target/model.safetensors", "draft/model.safetensors", "target/tokenizer.json", "prompts.jsonl"):
        assert f"specdec/assets/{needed}" in names
    assert "specdec/py.typed" in names
    assert wheel.stat().st_size < 12_000_000  # 15.9 MB when the target shipped in bfloat16


def test_no_file_names_a_machine() -> None:
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    for name in tracked:
        if not name.endswith((".safetensors", ".png", "test_layout.py")):
            text = (ROOT / name).read_text(encoding="utf-8")
            assert "/" + "work/" not in text, name
            assert "/" + "root/" not in text, name
