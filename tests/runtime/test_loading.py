"""Loading by path: tensors that do not fit, damaged files, subfolders and hub arguments, by every caller."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

import specdec
from specdec.drafters.resolve import resolve_drafter
from specdec.planning.footprint import measure_footprint
from specdec.quant import checkpoints
from specdec.quant.checkpoints import load_checkpoint, named_errors
from specdec.quant.layers import is_4bit
from specdec.quant.linear import Int4Linear
from specdec.runtime.loading import load, load_tokenizer
from specdec_cli.main import main
from tests.generation.test_multimodal import CLIP, CONFIGS
from tests.helpers.checkpoint_writers import TINY, Case, edit_config, edit_tensors, quantization_config, write
from tests.helpers.families import FAMILIES, VOCAB_SIZE, make_model, prompts
from tests.helpers.plain import target, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:specdec keeps in full precision")
ONE_LAYER = TINY | {"num_hidden_layers": 1}
SMALL = specdec.Int4Config(group_size=32)
NORM = "model.norm.weight"
UP = "model.layers.0.mlp.up_proj"


def write_plain(folder: Path, **kwargs: Any) -> None:
    make_model("llama", **ONE_LAYER).save_pretrained(folder, **kwargs)


def write_gptq(folder: Path) -> None:
    write(folder, Case("gptq", values={"num_hidden_layers": 1}))


def write_int4(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        specdec.quantize(make_model("llama", **ONE_LAYER), SMALL).save_pretrained(folder)


KINDS: dict[str, Callable[[Path], None]] = {
    "plain": write_plain,
    "shards": lambda folder: write_plain(folder, max_shard_size="60KB"),
    "gptq": write_gptq,
    "int4": write_int4,
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind with its tokenizer; tests copy it and do not change it."""
    root = tmp_path_factory.mktemp("originals")
    folders = {kind: root / kind for kind in KINDS}
    for kind, folder in folders.items():
        KINDS[kind](folder)
        tokenizer().save_pretrained(folder)
    return folders


@pytest.fixture
def copied(originals: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: Path(shutil.copytree(originals[kind], tmp_path / kind, dirs_exist_ok=True))


def assert_refused(words: str, folder: Path, **kwargs: Any) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        load_checkpoint(folder, **kwargs)
    assert str(folder) in str(caught.value)


# Tensors.

CHANGES: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "missing": ({NORM: None}, f"lacks {NORM}; the checkpoint is damaged or incomplete"),
    "unexpected": (
        {"model.layers.7.x": torch.ones(2)},
        r"has model\.layers\.7\.x, which the model has no place for; is config",
    ),
    "misshapen": ({NORM: torch.ones(60)}, rf"{NORM} .*\[60\].* model has \[64\]"),
}


@pytest.mark.parametrize("kind", ["plain", "gptq", "int4"])
@pytest.mark.parametrize("change", CHANGES)
def test_tensors_that_do_not_fit_are_named(kind: str, change: str, copied: Callable[[str], Path]) -> None:
    tensors, words = CHANGES[change]
    folder = copied(kind)
    edit_tensors(folder, **tensors)
    assert_refused(words, folder)


@pytest.mark.parametrize(("change", "words"), [(None, f"lacks {UP}"), (torch.ones(50, 64), UP)])
def test_tensors_that_do_not_fit_are_named_while_a_model_is_quantized(
    change: Tensor | None, words: str, copied: Callable[[str], Path]
) -> None:
    folder = copied("plain")
    edit_tensors(folder, **{f"{UP}.weight": change})
    assert_refused(words, folder, config=SMALL)


def test_no_drafter_and_no_command_runs_with_missing_weights(
    copied: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied("plain")
    edit_tensors(folder, **{f"{UP}.weight": None})
    with pytest.raises(ValueError, match=rf"drafter='.*plain' is not one of .*, and no model .* lacks {UP}\.weight"):
        resolve_drafter(folder, target())
    other = str(folder.parent / "int4")
    for arguments in (
        ["generate", str(folder), "a"],
        ["quantize", str(folder), other, "--group-size", "32"],
    ):
        assert main(arguments) == 2
        assert f"lacks {UP}" in capsys.readouterr().err
    assert not Path(other).exists()


HARMLESS: dict[str, tuple[str, dict[str, Tensor]]] = {
    "frequencies": ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
    "gpt2's masks": (
        "gpt2",
        {
            "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8),
            "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
        },
    ),
    "gpt_bigcode's mask": ("gpt_bigcode", {"transformer.h.0.attn.bias": torch.ones(8, 8)}),
    "xglm's positions": ("xglm", {"model.embed_positions.weights": torch.ones(5, 32)}),
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_additional_tensors_of_old_checkpoints_are_no_error(name: str, tmp_path: Path) -> None:
    model_type, tensors = HARMLESS[name]
    model = make_model(model_type, **FAMILIES[model_type])
    model.save_pretrained(tmp_path)
    edit_tensors(tmp_path, **tensors)
    assert same_logits(load_checkpoint(tmp_path), model)


def same_logits(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    with torch.no_grad():
        return torch.equal(one(**prompts(1)).logits, other(**prompts(1)).logits)


def test_tied_heads_and_checkpoints_without_a_head(tmp_path: Path) -> None:
    tied = make_model("llama", **ONE_LAYER | {"tie_word_embeddings": True})
    tied.model.save_pretrained(tmp_path / "below")
    assert same_logits(load_checkpoint(tmp_path / "below"), tied)
    tied.save_pretrained(tmp_path / "tied")
    edit_tensors(tmp_path / "tied", **{"lm_head.weight": tied.lm_head.weight.detach().clone()})
    assert same_logits(load_checkpoint(tmp_path / "tied"), tied)
    make_model("llama", **ONE_LAYER).model.save_pretrained(tmp_path / "headless")
    assert_refused("lacks lm_head.weight", tmp_path / "headless")


LLAMA4 = {
    "text_config": FAMILIES["llama4_text"] | {"vocab_size": VOCAB_SIZE, "bos_token_id": None, "eos_token_id": None},
    "vision_config": CLIP | {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
}


@pytest.mark.parametrize(
    ("model_type", "values", "loads_as"),
    [("gemma3", CONFIGS["gemma3"], "Gemma3ForConditionalGeneration"), ("llama4", LLAMA4, "Llama4ForCausalLM")],
)
def test_a_multimodal_checkpoint_is_loaded_as_transformers_does(
    model_type: str, values: dict[str, Any], loads_as: str, tmp_path: Path
) -> None:
    """As a whole, or its text model alone: then tensors of the vision tower are ignored, and others are errors."""
    AutoModelForImageTextToText.from_config(AutoConfig.for_model(model_type, **values)).save_pretrained(tmp_path)
    assert type(load_checkpoint(tmp_path)).__name__ == loads_as
    edit_tensors(tmp_path, **{"language_model.model.layers.0.other.weight": torch.ones(2)})
    assert_refused(r"layers\.0\.other\.weight, which the model has no place for", tmp_path)


# Settings of the quantization.


def move_settings(folder: Path, file: str, **changes: Any) -> None:
    settings = quantization_config(Case("gptq")) | changes
    del settings["quant_method"]
    edit_config(folder, quantization_config=None)
    (folder / file).write_text(json.dumps(settings))


def test_settings_in_a_file_of_their_own_count_for_drafters_and_plans(copied: Callable[[str], Path]) -> None:
    folder = copied("gptq")
    move_settings(folder, "quantize_config.json")
    assert measure_footprint(folder, device="cpu", group_size=32).checkpoint_method == "gptq"
    drafter: Any = resolve_drafter(folder, make_model("llama", **ONE_LAYER))
    assert is_4bit(drafter.runner.model)


def test_without_their_settings_quantized_tensors_are_refused(copied: Callable[[str], Path]) -> None:
    folder = copied("gptq")
    edit_config(folder, quantization_config=None)
    assert_refused(
        r"lacks .*weight.*; it has .*\.g_idx.* no place for; is config.json its own, with the quantization_config",
        folder,
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "fp8"},
        {"quant_method": "torchao"},
        None,
    ],
    ids=["bitsandbytes", "fp8", "torchao", "modelopt"],
)
def test_other_quantization_is_refused_by_name_before_weights_are_read(
    settings: dict[str, Any] | None, copied: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied("plain")
    if settings is None:
        move_settings(folder, "hf_quant_config.json")
    else:
        edit_config(folder, quantization_config=settings)
    (folder / "model.safetensors").unlink()
    method = settings["quant_method"] if settings else "modelopt"
    with pytest.raises(ValueError, match=f"'{method}'"):
        resolve_drafter(folder, target())
    assert main(["generate", str(folder), "a"]) == 2
    assert f"'{method}'" in capsys.readouterr().err
    assert main(["quantize", str(folder), str(folder / "int4")]) == 2
    advice = "write its bfloat16 copy" if method == "fp8" else "quantize the original"
    assert f"quantized already, by {method}; {advice}" in capsys.readouterr().err


# Damaged files.

WHOLE = (load_checkpoint, lambda folder: resolve_drafter(folder, target()))
TOKENIZER = (lambda folder: load_tokenizer(str(folder)),)
DAMAGED: dict[str, tuple[str, str, bytes | None, tuple[Callable[[Path], Any], ...]]] = {
    "no config": ("plain", "config.json", None, (*WHOLE, measure_footprint)),
    "config: no JSON": ("plain", "config.json", b"{", (*WHOLE, measure_footprint)),
    "config: a list": ("plain", "config.json", b"[1]", (*WHOLE, measure_footprint)),
    "config: not UTF-8": ("plain", "config.json", b'{"model_type": "\xff"}', (*WHOLE, measure_footprint)),
    "config: too deep": ("plain", "config.json", b"[" * 100_000, (*WHOLE, measure_footprint)),
    "config: wrong value": (
        "plain", "config.json", b'{"model_type": "llama", "hidden_size": "x"}', (*WHOLE, measure_footprint),
    ),
    "config: no model type": ("plain", "config.json", b"{}", (*WHOLE, measure_footprint)),
    "generation_config": ("plain", "generation_config.json", b"{", WHOLE),
    "generation_config of a format": ("gptq", "generation_config.json", b"[]", WHOLE),
    "index: no JSON": ("shards", "model.safetensors.index.json", b"", WHOLE),
    "index: a list": ("shards", "model.safetensors.index.json", b"[]", WHOLE),
    "index: no weight_map": ("shards", "model.safetensors.index.json", b"{}", WHOLE),
    "index: weight_map a list": ("shards", "model.safetensors.index.json", b'{"weight_map": []}', WHOLE),
    "index: values no names": ("shards", "model.safetensors.index.json", b'{"weight_map": {"a": 3}}', WHOLE),
    "weights": ("plain", "model.safetensors", b"\x08\0\0\0\0\0\0\0{}", WHOLE),
    "quantize_config": ("plain", "quantize_config.json", b"{", (*WHOLE, measure_footprint)),
    "quantize_config: a list": ("plain", "quantize_config.json", b"[]", (*WHOLE, measure_footprint)),
    "tokenizer.json": ("plain", "tokenizer.json", b"{", TOKENIZER),
    "tokenizer_config": ("plain", "tokenizer_config.json", b'["\xff"]', TOKENIZER),
    "special_tokens_map": ("plain", "special_tokens_map.json", b"7", TOKENIZER),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named(name: str, copied: Callable[[str], Path]) -> None:
    kind, file, content, calls = DAMAGED[name]
    folder = copied(kind)
    (folder / file).unlink(missing_ok=True)
    if content is not None:
        (folder / file).write_bytes(content)
    for call in calls:
        with pytest.raises(ValueError, match=file.replace(".", r"\.")):
            call(folder)


@pytest.mark.parametrize("settings", [[], ["gptq"], "gptq", 4, True])
def test_a_quantization_config_that_is_no_object(settings: Any, copied: Callable[[str], Path]) -> None:
    folder = copied("gptq")
    edit_config(folder, quantization_config=settings)
    for call in (*WHOLE, measure_footprint):
        with pytest.raises(ValueError, match=r"the quantization_config in .*config.json is no JSON object"):
            call(folder)


def test_a_damaged_tokenizer_of_a_draft_is_an_error(copied: Callable[[str], Path]) -> None:
    model = load(str(copied("plain")), "auto", "cpu")
    folder = copied("int4")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"int4/tokenizer\.json is no JSON"):
        resolve_drafter(folder, model)


@pytest.mark.parametrize("command", ["generate", "quantize", "plan", "audit"])
def test_commands_end_with_a_message(
    command: str, copied: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied("plain")
    edit_config(folder, rope_parameters=[3])
    arguments = {
        "generate": [str(folder), "a"],
        "quantize": [str(folder), str(folder / "int4")],
        "plan": ["--target", str(folder)],
        "audit": ["quality", str(folder), "--text", __file__],
    }[command]
    assert main([command, *arguments]) == 2
    error = capsys.readouterr().err
    assert str(folder) in error
    assert "Traceback" not in error


@pytest.mark.parametrize("device", ["nowhere", "cuda:77"])
def test_a_missing_device(device: str, copied: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=r"no model could be loaded from '.*plain'"):
        load(str(copied("plain")), "auto", device)


def test_random_damage_ends_in_an_error_that_can_be_caught(originals: dict[str, Path], tmp_path: Path) -> None:
    """Or in a model: a flipped bit of a weight cannot be detected."""
    generator = random.Random(0)
    outcomes, errors = set(), []
    for _ in range(60):
        shutil.rmtree(tmp_path)
        folder = Path(shutil.copytree(originals[generator.choice(list(KINDS))], tmp_path))
        file = generator.choice(sorted(folder.iterdir()))
        content = bytearray(file.read_bytes())
        index = generator.randrange(min(len(content), 3000))  # in the header of a file of tensors
        if generator.random() < 0.3:
            del content[index:]
        else:
            content[index] = generator.choice([*b'"[]{},:09x', generator.randrange(256)])
        file.write_bytes(content)
        for call in (load_checkpoint, *TOKENIZER):
            try:
                call(folder)
                outcomes.add("loaded")
            except (ValueError, TypeError, OSError, ImportError) as error:
                errors.append(str(error))
                outcomes.add("refused")
    assert outcomes == {"loaded", "refused"}
    assert all(str(tmp_path) in error for error in errors)


def test_errors_of_other_classes_become_value_errors() -> None:
    with pytest.raises(ValueError, match=r"^it failed: KeyError: 'x'$") as caught, named_errors("it failed"):
        raise KeyError("x")
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(ValueError, match=r"^it failed: first$"), named_errors("it failed"):
        raise ImportError("\nfirst\nsecond")


# Location of a checkpoint.


@pytest.mark.parametrize("kind", ["plain", "gptq", "int4"])
def test_a_subfolder(kind: str, copied: Callable[[str], Path]) -> None:
    folder = copied(kind)
    whole = load_checkpoint(folder)
    model = load_checkpoint(folder.parent, subfolder=kind)
    assert same_logits(model, whole)
    if kind != "plain":
        assert is_4bit(specdec.load_quantized(folder.parent, subfolder=kind))
    with pytest.raises(ValueError, match=r"there is no config\.json in .*elsewhere"):
        load_checkpoint(folder.parent, subfolder="elsewhere")


HUB = {"revision": "v2", "token": "t", "cache_dir": "c", "local_files_only": True, "subfolder": "int4"}


def test_hub_arguments_go_to_the_hub(originals: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """For a format that specdec reads, all of its files in that subfolder; else transformers gets id and arguments."""
    downloads: list[dict[str, Any]] = []
    root = originals["gptq"].parent

    def download(name: str, **kwargs: Any) -> str:
        downloads.append({"name": name} | kwargs)
        return str(root)

    monkeypatch.setattr(checkpoints, "snapshot_download", download)
    assert is_4bit(specdec.load_quantized("a/b", **HUB | {"subfolder": "gptq"}))
    location = {"name": "a/b", "revision": "v2", "token": "t", "cache_dir": "c", "local_files_only": True}
    assert [{name: call[name] for name in location} for call in downloads] == [location, location]
    assert "gptq/config.json" in downloads[0]["allow_patterns"]
    assert "gptq/*.safetensors" not in downloads[0]["allow_patterns"]
    assert "gptq/*.safetensors" in downloads[1]["allow_patterns"]
    assert all("gptq/*/*" in call["ignore_patterns"] for call in downloads)

    def from_pretrained(name: str, **kwargs: Any) -> Any:
        given.append((name, kwargs))
        raise OSError("no network")

    given: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(ValueError, match="no model could be loaded from 'a/b': no network"):
        load_checkpoint("a/b", **HUB | {"subfolder": "plain"})
    name, arguments = given[0]
    assert name == "a/b"
    assert arguments.items() >= (HUB | {"subfolder": "plain"}).items()


# Offloading.

OFFLOADED = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers": "disk",
    "model.norm": "cpu",
    "lm_head": "cpu",
}


@pytest.mark.parametrize("kind", ["gptq", "int4", "plain"])
def test_offloaded_4bit_weights_are_refused(kind: str, copied: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    words = r"device_map offloads model\.layers\.0\.\S+, .* and \d+ more, .* which 4-bit weights do not support"
    for device_map in ({"": "disk"}, OFFLOADED):
        with pytest.raises(ValueError, match=words):
            specdec.load_quantized(
                copied(kind),
                SMALL if kind == "plain" else None,
                device_map=device_map,
                offload_folder=str(tmp_path / "offload"),
            )
    on_cpu = specdec.load_quantized(copied(kind), SMALL if kind == "plain" else None, device_map={"": "cpu"})
    assert any(isinstance(module, Int4Linear) for module in on_cpu.modules())


def test_an_index_names_the_files_and_pickles_are_left_to_transformers(
    copied: Callable[[str], Path], tmp_path: Path
) -> None:
    """In full precision; pickles of other quantized formats are not read."""
    folder = copied("plain")
    whole = load_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    torch.save(dict(whole.state_dict()), folder / "pytorch_model.bin")
    assert same_logits(load_checkpoint(folder), whole)
    save_file({NORM: torch.ones(64)}, folder / "model.safetensors", metadata={"format": "pt"})
    assert_refused("lacks lm_head.weight", folder)
