"""The house stands as ARCHITECTURE.md draws it: floors import downwards, the wheel ships what it must and nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "specdec"

FLOORS = {
    "interfaces": 1, "sampling": 1, "verification": 1, "stats": 1, "clock": 1, "cost": 1, "pace": 1, "graphs": 1,
    "identity": 1, "ranks": 1,
    "text": 1, "embedded": 1, "provenance": 1,
    "sequences": 2, "speculative": 2, "profiling": 2, "cache": 2, "attention": 2, "models": 2, "support": 2, "quant": 2,
    "compiled": 2, "lockstep": 2, "callbacks": 2, "routing": 2, "loading": 2,
    "drafters": 3,
    "state": 4, "call": 4, "generate": 4,
    "planning": 5, "experiments": 5,
    "cli": 6, "commands": 6,
}  # fmt: skip
WITHOUT_TRANSFORMERS = {
    "interfaces",
    "sampling",
    "verification",
    "stats",
    "clock",
    "cost",
    "pace",
    "graphs",
    "ranks",
    "identity",
    "text",
    "embedded",
    "sequences",
    "lockstep",
    "speculative",
    "profiling",
    "drafters.none",
}
ONLY_UPSTAIRS = {"rich", "hydra", "datasets", "accelerate"}  # the library proper needs torch and transformers alone


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(path: Path) -> set[str]:
    """Modules imported at run time; those under `if TYPE_CHECKING` don't count."""
    found = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names if node.module == "specdec")
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_go_down(path: Path) -> None:
    room = module_name(path).split(".")[0]
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "specdec" and len(parts) > 1 and parts[1] in FLOORS:
            assert FLOORS[parts[1]] <= FLOORS[room], f"{room} imports {name}"
        if parts[0] == "transformers":
            assert module_name(path) not in WITHOUT_TRANSFORMERS, f"{room} imports {name}"
        if parts[0] in ("hydra", "omegaconf"):
            assert FLOORS[room] == 6, f"{module_name(path)} imports {name}: the library never sees a DictConfig"
        if parts[0] in ONLY_UPSTAIRS:
            assert FLOORS[room] >= 5, f"{room} imports {name}"


def test_import_specdec_needs_torch_and_transformers_alone() -> None:
    absent = sorted(ONLY_UPSTAIRS | {"triton"})
    code = f"import sys; sys.modules.update(dict.fromkeys({absent}, None)); import specdec; specdec.enable"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_algorithm_is_read_in_under_150_lines() -> None:
    assert len((PACKAGE / "speculative.py").read_text(encoding="utf-8").splitlines()) < 150


def test_kernels_is_no_package_so_transformers_probe_does_not_find_it() -> None:
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_wheel_ships_the_pair_and_only_our_packages(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"specdec", "specdec_kernels"}
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
