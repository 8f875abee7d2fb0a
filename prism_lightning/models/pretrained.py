"""Opening a pretrained Hugging Face decoder: a hub id, a folder, a GGUF file or an adapter, or a refusal by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from prism_lightning.common.devices import available_memory
from prism_lightning.common.errors import UserError
from prism_lightning.common.hub_access import hub_problem
from prism_lightning.models.adapters import ADAPTER_CONFIG, adapter_base, import_peft, is_adapter, with_adapter_merged

FP32_BYTES = 4
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
LOADING_OVERHEAD = 1.2  # peak memory over the size of the weights, while a checkpoint is read and converted


def open_pretrained(source: str, gguf_file: str | None = None) -> PreTrainedModel:
    """Return a causal language model in fp32 and eval mode, as Hugging Face itself loads it.

    Only safetensors and GGUF weights are read, and no code that comes with a model is run. GGUF weights are
    dequantised. A folder with a peft adapter gives its base model with the adapter merged.

    Args:
        source: a hub id or a folder.
        gguf_file: the name of a GGUF file in it.

    Raises:
        UserError: no such model, an encoder, quantised weights, missing weights, or too little memory.
    """
    folder = Path(source).expanduser()
    if is_adapter(folder):
        import_peft()  # before a large base is read
        return with_adapter_merged(open_pretrained(_base_of(folder), gguf_file), folder)
    config = decoder_configuration(source, gguf_file)
    check_memory(config, source)
    settings: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {"use_safetensors": True}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **_location(source),
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
            **settings,
        )
    except Exception as error:  # safetensors, the hub and transformers have exceptions without a common base
        raise UserError(f"model {source} could not be loaded: {_cause(error)}") from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"model {source} lacks {len(missing)} of its weights ({', '.join(missing[:3])}): give a causal language"
            " model with its head, saved by save_pretrained"
        )
    if gguf_file:  # the weights are plain fp32 now; the configuration still names the quantisation
        model.hf_quantizer, model.is_quantized = None, False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    return model.eval()


def decoder_configuration(source: str, gguf_file: str | None = None) -> PreTrainedConfig:
    """Return the configuration of a causal language model, without loading its weights; of an adapter, its base's.

    Raises:
        UserError: no such model, or one of another kind.
    """
    if is_adapter(Path(source).expanduser()):
        return decoder_configuration(_base_of(Path(source).expanduser()), gguf_file)
    _check_exists(source, gguf_file)
    try:
        config = AutoConfig.from_pretrained(**_location(source), gguf_file=gguf_file, trust_remote_code=False)
    except Exception as error:
        problem = None if Path(source).expanduser().exists() else hub_problem(source)
        if problem:
            raise UserError(
                f"model {source}: {problem}, and no folder or cached model has this name: check name and network"
            ) from error
        raise UserError(f"model {source} could not be opened: {_cause(error)}") from error
    kind = config.model_type
    if kind == "prism":
        raise UserError(f"model {source} is a PRISM model already: give it to other verbs by --ckpt_path")
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"model {source} is an encoder-decoder ({kind}): give a decoder, such as Llama or GPT-2")
    is_encoder = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if is_encoder or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(f"model {source} ({kind}) is no causal language model: give a decoder, such as Llama or GPT-2")
    if config.get_text_config() is not config:
        raise UserError(f"model {source} ({kind}) also reads other inputs than text: give a decoder of text alone")
    if not hasattr(config, "max_position_embeddings"):
        raise UserError(f"model {source} ({kind}) states no length of its context: give another decoder")
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is not None and not gguf_file:
        method = quantisation.get("quant_method", "?") if isinstance(quantisation, dict) else quantisation.quant_method
        raise UserError(
            f"model {source} has quantised weights ({method}): give the unquantised model, or a GGUF file by"
            " --gguf_file, which is dequantised"
        )
    return config


def check_memory(config: PreTrainedConfig, source: str) -> None:
    """Raise UserError if the weights in fp32 do not fit into the memory that is available now."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    needed, available = parameters * FP32_BYTES * LOADING_OVERHEAD, available_memory()
    if available is not None and needed > available:
        raise UserError(
            f"model {source} has {parameters / 1e9:.2f} G parameters and needs {needed / 2**30:.1f} GiB in fp32, but"
            f" {available / 2**30:.1f} GiB of memory are free: take a machine with more memory, or a smaller model"
        )


def tokenizer_location(source: str) -> str:
    """Return the hub id or folder that has a model's tokenizer: an adapter folder without one has its base's."""
    folder = Path(source).expanduser()
    if is_adapter(folder) and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return tokenizer_location(_base_of(folder))
    return source


def _base_of(folder: Path) -> str:
    """Return the base of an adapter folder; raise UserError that names both where the base is no folder any more."""
    base = adapter_base(folder)
    if _is_path(base) and not Path(base).expanduser().exists():
        raise UserError(
            f"adapter {folder} belongs to model {base}, and there is no such folder: restore it, or correct"
            f" base_model_name_or_path in {ADAPTER_CONFIG}"
        )
    return base


def _is_path(source: str) -> bool:
    """Return whether a name can only be a path, and no hub id."""
    return Path(source).is_absolute() or source.startswith((".", "~")) or not HUB_ID.fullmatch(source)


def _location(source: str) -> dict[str, Any]:
    """Return where transformers finds a model, as arguments of `from_pretrained`."""
    path = Path(source).expanduser()
    if path.exists():
        return {"pretrained_model_name_or_path": str(path)}
    return {"pretrained_model_name_or_path": source, "local_files_only": hub_problem(source) is not None}


def _check_exists(source: str, gguf_file: str | None) -> None:
    path = Path(source).expanduser()
    if path.is_file():
        raise UserError(f"model {source} is a file: give its folder, and a GGUF file's name by --gguf_file")
    if path.is_dir():
        name = gguf_file or "config.json"
        if not (path / name).is_file():
            files = sorted(file.name for file in path.glob("*.gguf"))
            advice = f"give --gguf_file {files[0]}" if files else "give the folder of a Hugging Face model"
            raise UserError(f"model folder {source} has no {name}: {advice}")
    elif _is_path(source):
        raise UserError(f"model {source}: no such folder; give a folder or a hub id such as HuggingFaceTB/SmolLM2-135M")


def _cause(error: Exception) -> str:
    """Return what went wrong, on one line, without the advice that libraries add."""
    text = " ".join(str(error).split())
    if "use_safetensors" in text or "no file named model.safetensors" in text:
        return "it has no safetensors weights, and pickles are not opened; convert it by save_pretrained"
    return text[:200].rstrip(".") + "; check the name and the connection"
