"""Provenance names specdec's own files and this machine."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from specdec.utils import provenance as module
from specdec.utils.provenance import cpu_of, model_identity, provenance, source_commit


def git(folder: Path, *command: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    done = subprocess.run(["git", "-C", str(folder), *identity, *command], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with one file, committed."""
    git(tmp_path, "init", "-q")
    (tmp_path / "package.py").write_text("first\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def test_the_commit_is_that_of_the_file_s_repository_not_of_the_current_folder(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reports named the commit of whatever repository the command was run in."""
    before = source_commit(module.SOURCE)
    monkeypatch.chdir(repository)
    assert source_commit(module.SOURCE) == before
    assert provenance("cpu")["commit"] == before[0] != git(repository, "rev-parse", "HEAD")
    monkeypatch.chdir("/")
    assert source_commit(repository / "package.py") == (git(repository, "rev-parse", "HEAD"), False)


def test_changes_make_it_dirty(repository: Path) -> None:
    (repository / "package.py").write_text("second\n")
    assert source_commit(repository / "package.py") == (git(repository, "rev-parse", "HEAD"), True)


def test_an_installed_package_has_no_commit_even_inside_a_repository(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = repository / "venv" / "site-packages"
    installed.mkdir(parents=True)
    (installed / "package.py").touch()
    assert source_commit(installed / "package.py") == (None, None)
    monkeypatch.setattr(module, "SOURCE", installed / "package.py")
    found = provenance("cpu")
    assert found["commit"] is found["dirty"] is None
    assert found["torch"]


def test_the_cpu_is_named_with_the_flags_that_choose_kernels() -> None:
    x86 = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx2 avx512f amx_int8 sse\n\nprocessor\t: 1\n"
    assert cpu_of(x86) == ("Some CPU @ 2 GHz", "avx2 avx512f amx_int8")
    model, flags = cpu_of("processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n")
    assert model
    assert flags == "asimd asimddp i8mm"
    assert cpu_of("")[1] == ""


def test_the_command_can_be_pasted_into_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sys.argv", ["/some/where/specdec", "experiment", "workload.names=[a, b]", "num_draft_tokens=4"]
    )
    assert provenance("cpu")["command"] == "specdec experiment 'workload.names=[a, b]' num_draft_tokens=4"


def test_a_model_is_identified_by_its_files_or_its_commit_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    first = model_identity(str(tmp_path), None)
    assert first is not None
    assert first.startswith("sha256 ")
    (tmp_path / "config.json").write_text("{ }")
    assert model_identity(str(tmp_path), None) not in (first, None)
    assert model_identity("someone/model", "abc") == "hub commit abc"
    assert model_identity("someone/model", None) is None
