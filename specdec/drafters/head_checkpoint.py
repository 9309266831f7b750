"""Reading of draft heads, in the layouts of the speculators library and of those that introduced them.

https://github.com/vllm-project/speculators; https://github.com/SafeAILab/EAGLE (EAGLE-3),
https://github.com/z-lab/dflash, https://github.com/deepseek-ai/DeepSpec (DSpark)
"""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from specdec.drafters.dflash import DFlashHead, DFlashSettings
from specdec.drafters.dspark import MARKOV_HEADS, VANILLA, DSparkHead, DSparkSettings
from specdec.drafters.eagle3 import LAYERS, Eagle3Head, Eagle3Settings
from specdec.drafters.heads import DraftHead, HeadSettings
from specdec.drafters.mtp import MtpHead, MtpSettings, mtp_config
from specdec.drafters.mtp_checkpoint import NO_LAYERS, has_mtp, read_mtp_tensors
from specdec.drafters.peagle import PEagleHead, PEagleSettings
from specdec.quant.checkpoints import HUB_FILES, checkpoint_folder, config_folder, read_json, tensor_files
from specdec.quant.layers import abbreviate
from specdec.quant.mtp_names import DECODER
from specdec.runtime.kv_cache.masks import attention_kinds
from specdec.utils.warn import warn

EAGLE3, PEAGLE, DFLASH, DSPARK, MTP = "eagle3", "peagle", "dflash", "dspark", "mtp"
OTHER_KINDS = {  # of draft heads that specdec does not run, in words
    "dflash2": "a head of DFlash's second version",
    "eagle": "an EAGLE head of the first two versions",
    MTP: "an MTP head of the speculators library",
}
NORMS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
PICKLE = "pytorch_model.bin"  # SafeAILab's heads; read without running code of it
OPTIONAL = {"t2d"}  # which d2t decides as well
OWN_PREFIX, FIRST_LAYER = r"^midlayer\.", "layers.0."  # of the first layer: SafeAILab's, speculators'
MASK_STATE = "mask_hidden"
NO_CHECKPOINT = "the target was not loaded from a checkpoint that may have MTP layers; name the checkpoint"
EMBEDDING, OUTPUT = "embed_tokens.weight", "lm_head.weight"


def kind_of(config: Mapping[str, Any]) -> str | None:
    """The kind of draft head that a config.json describes, a key of HEADS or OTHER_KINDS; None for a language model.

    Raises ValueError for a kind of the speculators library that is not known here.
    """
    kind = config.get("speculators_model_type")
    if kind is None:
        names = " ".join(map(str, config.get("architectures") or [])).lower()
        kind = next((kind for kind in (EAGLE3, DFLASH, DSPARK) if kind in names), None)
    if kind is not None and kind not in HEADS and kind not in OTHER_KINDS:
        raise ValueError(f"it is a draft head of the kind {kind!r}, which specdec does not know")
    return kind


def is_head(path: str, target: PreTrainedConfig) -> bool:
    """Whether a folder or hub id holds a draft head for a target, not a language model; MTP layers are one.

    "mtp" stands for the target's own checkpoint. Raises ValueError where the kind of a head is not known.
    """
    if path == MTP:
        return True
    try:
        folder = config_folder(path)
        content = read_json(folder / "config.json")
    except (ValueError, OSError):  # whoever loads it as a language model says why
        return False
    return kind_of(content) is not None or has_mtp(folder, content, target.get_text_config(decoder=True))


def load_head(path: str, target: PreTrainedModel) -> DraftHead:
    """The draft head in a folder or under a hub id, "mtp" for the target's own, in its dtype and on its device.

    Raises ValueError where specdec does not run its kind, tensors are missing, not used or of another shape, or it was
    made for another target.
    """
    if path == MTP and not target.name_or_path:
        raise ValueError(NO_CHECKPOINT)
    model: Any = target
    source = str(target.name_or_path) if path == MTP else path
    head, tensors = _read_head(source, target.config, type(model.get_decoder()))
    if isinstance(head, MtpHead):
        names = [name for name in tensors if name.startswith(DECODER)]
        head.load_decoder({name.removeprefix(DECODER): tensors.pop(name) for name in names}, target)
    head.share(target)
    weights = {
        name: tensor.to(device=target.device, dtype=target.dtype if tensor.is_floating_point() else None)
        for name, tensor in tensors.items()
        if name not in OPTIONAL
    }
    if not head.is_reduced:
        weights["d2t"] = torch.zeros(head.settings.draft_vocab_size, dtype=torch.int64, device=target.device)
    head.load_state_dict(weights, strict=False, assign=True)
    head.reset_rotary()
    head.train(False)
    head.requires_grad_(False)
    return head


def make_head(path: str, target: PreTrainedConfig) -> DraftHead:
    """The draft head of a folder or hub id on the meta device, checked as `load_head` says.

    target: the config of its target, whose embedding and output layer it has not yet where it shares them. Of an MTP
    layer, which is large, no tensor is read.
    """
    if path == MTP and not target.name_or_path:
        raise ValueError(NO_CHECKPOINT)
    folder = config_folder(str(target.name_or_path) if path == MTP else path)
    content, text = read_json(folder / "config.json"), target.get_text_config(decoder=True)
    if kind_of(content) is None and not has_mtp(folder, content, text):
        raise ValueError(NO_LAYERS)
    with torch.device("meta"):
        decoder_class = type(AutoModel.from_config(text))  # type: ignore[no-untyped-call]
        if kind_of(content) is None:
            return MtpHead(*_of_mtp_layer(target, decoder_class), False, False)
    return _read_head(path, target, decoder_class)[0]


def _read_head(
    path: str, target: PreTrainedConfig, decoder_class: type[PreTrainedModel]
) -> tuple[DraftHead, dict[str, Tensor]]:
    """-> the head on the meta device, checked, and its tensors. decoder_class: the target's class without its head."""
    folder = checkpoint_folder(path, {}, [*HUB_FILES, PICKLE])
    content = read_json(folder / "config.json")
    kind = kind_of(content)
    text = target.get_text_config(decoder=True)
    if kind is None:
        tensors, hidden_first = read_mtp_tensors(folder, text.num_hidden_layers)
        with torch.device("meta"):
            head: DraftHead = MtpHead(*_of_mtp_layer(target, decoder_class, hidden_first), False, False)
        _check_tensors(head, tensors)
        return head, tensors
    if kind not in HEADS:
        raise ValueError(
            f"it is {OTHER_KINDS[kind]}; specdec runs EAGLE-3, P-EAGLE, DFlash and DSpark heads and the MTP layer in a"
            " target's own checkpoint"
        )
    tensors = _read_tensors(folder)
    head_class, read = HEADS[kind]
    config, settings = read(content, text)
    _check_target(config, settings, text, tensors)
    is_full = settings.draft_vocab_size == config.vocab_size
    with torch.device("meta"):
        head = head_class(config, settings, EMBEDDING in tensors, OUTPUT in tensors or not is_full)
    _check_tensors(head, tensors)
    _check_ids(head, tensors)
    return head, tensors


def _of_mtp_layer(
    target: PreTrainedConfig, decoder_class: type[PreTrainedModel], hidden_first: bool = False
) -> tuple[PreTrainedConfig, MtpSettings]:
    """The config of the target's MTP layer, and its settings."""
    text = target.get_text_config(decoder=True)
    layers, vocab_size, width = (text.num_hidden_layers,), int(text.vocab_size), int(text.hidden_size)
    settings = MtpSettings(layers, vocab_size, width, decoder_class=decoder_class, hidden_first=hidden_first)
    return mtp_config(text), settings


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder under the names of the speculators library."""
    if (pickle := folder / PICKLE).is_file() and not any(folder.glob("*.safetensors")):
        try:
            tensors: dict[str, Tensor] = torch.load(pickle, map_location="cpu", weights_only=True)
        except Exception as error:  # torch's message advises to run the file's code
            raise ValueError(f"{pickle} is damaged, or holds more than tensors; it is not read") from error
        if not isinstance(tensors, dict):
            raise ValueError(f"{pickle} holds no tensors by name")
    else:
        tensors = {name: file.get_tensor(name) for name, file in tensor_files(folder).items()}
    tensors = {re.sub(OWN_PREFIX, FIRST_LAYER, name): tensor for name, tensor in tensors.items()}
    if MASK_STATE in tensors:
        tensors[MASK_STATE] = tensors[MASK_STATE].flatten()  # written with dimensions of size 1
    return tensors


def _layer_config(content: Mapping[str, Any], model_types: Collection[str], text: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the head's layers, in a section of its own or at the top."""
    is_speculators = "speculators_model_type" in content
    section = content.get("transformer_layer_config") if is_speculators else content
    if not isinstance(section, Mapping):
        raise ValueError("its config.json has no transformer_layer_config, the config of its layers")
    layers = dict(section)
    model_type = layers.pop("model_type", "qwen3" if is_speculators else "llama")
    if model_type not in model_types:
        raise ValueError(f"its layers are of the type {model_type!r}; specdec runs {', '.join(model_types)}")
    for name in ("architectures", "quantization_config", "auto_map"):
        layers.pop(name, None)
    config = AutoConfig.for_model(model_type, **layers)
    positions = [getattr(one, "max_position_embeddings", None) or 0 for one in (config, text)]
    config.max_position_embeddings = max(positions)  # rotary embeddings go on; checkpoints name the training length
    return config


def _read_eagle3(content: Mapping[str, Any], text: PreTrainedConfig) -> tuple[PreTrainedConfig, Eagle3Settings]:
    """The config of the layers of an EAGLE-3 head, and its settings. text: the target's config."""
    is_speculators = "speculators_model_type" in content
    own = content if is_speculators else {**content, **(content.get("eagle_config") or {})}
    config = _layer_config(content, LAYERS, text)
    num_layers = text.num_hidden_layers
    if is_speculators and "norm_before_residual" not in content:
        warn(
            "the config.json of the EAGLE-3 head lacks norm_before_residual; specdec assumes false, the default of the"
            " speculators library (vLLM assumes true): if few drafts are accepted, add it"
        )
    settings = Eagle3Settings(
        tuple(own.get("eagle_aux_hidden_state_layer_ids") or [2, num_layers // 2, num_layers - 3]),
        int(own.get("draft_vocab_size") or config.vocab_size),
        int(own.get("target_hidden_size") or text.hidden_size),
        **{name: bool(own.get(name, False)) for name in NORMS},
    )
    if settings.norm_before_fc and settings.fc_norm:
        raise ValueError("its config.json sets norm_before_fc and fc_norm, which exclude each other")
    return config, settings


def _read_peagle(content: Mapping[str, Any], text: PreTrainedConfig) -> tuple[PreTrainedConfig, PEagleSettings]:
    """The config of the layers of a P-EAGLE head, and its settings."""
    config, settings = _read_eagle3(content, text)
    return config, PEagleSettings(**vars(settings), mask_token_id=_mask_id(content, config.vocab_size))


def _number(content: Mapping[str, Any], name: str) -> int:
    value = content.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"its config.json has {name}={value!r}, where a whole number is needed")
    return value


def _mask_id(content: Mapping[str, Any], vocab_size: int) -> int:
    value = _number(content, "mask_token_id")
    if not 0 <= value < vocab_size:
        raise ValueError(f"its mask_token_id={value} is none of the target's ids, 0 … {vocab_size - 1}")
    return value


def _read_dflash(content: Mapping[str, Any], text: PreTrainedConfig) -> tuple[PreTrainedConfig, DFlashSettings]:
    """The config of the layers of a DFlash head, and its settings."""
    own = _sections(content, "dflash_config")
    config = _layer_config(content, ["qwen3"], text)
    return config, _block_settings(own, config, text, sample_from_anchor=False)


def _read_dspark(content: Mapping[str, Any], text: PreTrainedConfig) -> tuple[PreTrainedConfig, DSparkSettings]:
    """The config of the layers of a DSpark head, and its settings."""
    own = _sections(content, "dspark_config", "dflash_config")
    config = _layer_config(content, ["qwen3"], text)
    settings = DSparkSettings(
        **vars(_block_settings(own, config, text, sample_from_anchor=True)),
        markov_rank=_number({"markov_rank": 256, **own}, "markov_rank"),
        markov_head_type=str(own.get("markov_head_type", VANILLA)),
        enable_confidence_head=bool(own.get("enable_confidence_head", True)),
        confidence_head_with_markov=bool(own.get("confidence_head_with_markov", True)),
    )
    if settings.markov_rank < 0:
        raise ValueError(f"its markov_rank={settings.markov_rank} must be 0, without a Markov head, or more")
    if settings.markov_rank and settings.markov_head_type not in MARKOV_HEADS:
        raise ValueError(
            f"its Markov head is of the type {settings.markov_head_type!r}; specdec runs {', '.join(MARKOV_HEADS)}"
        )
    if settings.enable_confidence_head and settings.confidence_head_with_markov and not settings.markov_rank:
        raise ValueError("its config.json has a confidence head that reads a Markov head, but markov_rank=0")
    return config, settings


def _sections(content: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """The settings of a head, those in sections of their own included, in another layout than speculators'."""
    sections = [] if "speculators_model_type" in content else [content.get(name) or {} for name in names]
    return {**content, **{name: value for section in sections for name, value in section.items()}}


def _block_settings(
    own: Mapping[str, Any], config: PreTrainedConfig, text: PreTrainedConfig, sample_from_anchor: bool
) -> DFlashSettings:
    """The settings of a DFlash block. Layouts other than speculators' count layers from the first one's output."""
    if kinds := attention_kinds(config) - {"full_attention"}:
        raise ValueError(f"its layers have {', '.join(sorted(kinds))}; of such heads specdec runs full attention")
    is_speculators = "speculators_model_type" in own
    layers = own.get("aux_hidden_state_layer_ids" if is_speculators else "target_layer_ids")
    if not layers or not isinstance(layers, list):
        raise ValueError("its config.json does not name the target's layers that it reads")
    settings = DFlashSettings(
        tuple(layers if is_speculators else [layer + 1 for layer in layers]),
        int(own.get("draft_vocab_size") or config.vocab_size),
        int(own.get("target_hidden_size") or text.hidden_size),
        _number(own, "block_size"),
        _mask_id(own, config.vocab_size),
        bool(own.get("sample_from_anchor", sample_from_anchor)),
    )
    if settings.max_draft_tokens < 1:
        raise ValueError(f"its block_size={settings.block_size} leaves nothing to draft")
    return settings


def _check_target(
    config: PreTrainedConfig, settings: HeadSettings, text: PreTrainedConfig, names: Container[str]
) -> None:
    """Raise ValueError where a head was made for another target than that of the config `text`."""
    num_layers = text.num_hidden_layers
    if any(not isinstance(layer, int) or not 0 <= layer < num_layers for layer in settings.feature_layers):
        raise ValueError(
            f"it reads the hidden states {list(settings.feature_layers)}, but those of a target with {num_layers}"
            f" layers are 0 … {num_layers - 1}"
        )
    if settings.target_hidden_size != text.hidden_size:
        raise ValueError(
            f"it reads hidden states of width {settings.target_hidden_size}, and the target's have {text.hidden_size}"
        )
    if config.vocab_size != text.vocab_size:
        raise ValueError(f"it is for a target of {config.vocab_size} ids, and this one has {text.vocab_size}")
    if config.hidden_size != text.hidden_size and EMBEDDING not in names:
        raise ValueError(
            f"it has no embedding of its own, and its width is {config.hidden_size}, the target's {text.hidden_size}"
        )


HEADS: dict[str, tuple[Any, Any]] = {
    EAGLE3: (Eagle3Head, _read_eagle3),
    PEAGLE: (PEagleHead, _read_peagle),
    DFLASH: (DFlashHead, _read_dflash),
    DSPARK: (DSparkHead, _read_dspark),
}


def _check_tensors(head: DraftHead, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError where tensors are missing, not used, or of another shape than the head's."""
    expected = {name: value for name, value in head.state_dict().items() if not name.startswith(DECODER)}
    tensors = {name: value for name, value in tensors.items() if not name.startswith(DECODER)}
    optional = OPTIONAL if head.is_reduced else {*OPTIONAL, "d2t"}
    wrong = {
        "lacks": expected.keys() - tensors.keys() - optional,
        "has, for its config.json, too many tensors:": tensors.keys() - expected.keys() - optional,
        "has tensors of another shape than its config.json says:": {
            f"{name} {list(tensors[name].shape)}, not {list(expected[name].shape)}"
            for name in expected.keys() & tensors.keys()
            if tensors[name].shape != expected[name].shape
        },
    }
    for what, names in wrong.items():
        if names:
            raise ValueError(f"it {what} {abbreviate(sorted(names))}")


def _check_ids(head: DraftHead, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError where the head drafts ids that are no ids of the target."""
    if (d2t := tensors.get("d2t")) is None:
        return
    if d2t.is_floating_point() or (not head.is_reduced and d2t.any()):
        raise ValueError("its d2t must hold whole numbers, and zeros alone where it drafts all ids of the target")
    ids = torch.arange(len(d2t)) + d2t
    if ids.min() < 0 or ids.max() >= head.config.vocab_size or len(torch.unique(ids)) < len(ids):
        raise ValueError(
            "its d2t, added to 0, 1, …, does not give different ids of the target: d2t holds offsets (target's id -"
            " draft's id)"
        )
    t2d = tensors.get("t2d")
    if t2d is not None and len(t2d) != head.config.vocab_size:
        raise ValueError(f"its t2d has {len(t2d)} entries, and the target {head.config.vocab_size} ids")
    if t2d is not None and not t2d.nonzero().flatten().equal(ids.sort().values):
        raise ValueError("its t2d and d2t name different ids")
