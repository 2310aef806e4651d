"""From a path, a hub id or a module to a checked Hugging Face model; one clear line for what can be wrong."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from locedit.errors import LoceditError

CAUSAL = (
    "GPT2LMHeadModel", "GPTNeoForCausalLM", "GPTJForCausalLM", "GPTNeoXForCausalLM", "OPTForCausalLM",
    "LlamaForCausalLM", "MistralForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM",
    "Qwen2ForCausalLM", "Qwen3ForCausalLM", "PhiForCausalLM", "Phi3ForCausalLM", "MixtralForCausalLM",
)  # fmt: skip
MASKED = ("BertForMaskedLM", "RobertaForMaskedLM")
SUPPORTED = CAUSAL + MASKED


# --- what the user gave ----------------------------------------------------------------------------------------------


def locate(source: str | Path) -> Path | None:
    """The local folder that `source` names, or None when it can only be a hub id."""
    path = Path(source).expanduser()
    text = str(source)
    looks_local = isinstance(source, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1
    if not path.exists():
        if looks_local:
            raise LoceditError(f"model folder {text!r} does not exist")
        return None
    if not path.is_dir():
        raise LoceditError(f"{text!r} is a file; give the model's folder, the one with config.json")
    if not (path / "config.json").exists():
        if (path / "adapter_config.json").exists():
            raise LoceditError(f"{text!r} holds a PEFT adapter, not a model: load the base model and wrap it with PEFT")
        found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise LoceditError(f"{text!r} is not a model folder: it has no config.json (found: {found})")
    return path


def accept(module: nn.Module) -> nn.Module:
    """The built module itself, when it is of a supported class."""
    core = core_of(module)
    if type(core).__name__ not in SUPPORTED:
        raise _unknown(type(core).__name__, core)
    if module is not core and not any(hasattr(m, "base_layer") for m in core.modules()):
        raise LoceditError(
            f"a PEFT model of kind {type(module).__name__} without adapter layers is not supported: use LoRA"
        )
    return module


def core_of(module: nn.Module) -> PreTrainedModel:
    """The PreTrainedModel inside PEFT's wrapper, or the module itself."""
    inner = module.get_base_model() if hasattr(module, "get_base_model") else module  # type: ignore[operator]
    if not isinstance(inner, PreTrainedModel):
        raise LoceditError(f"{type(module).__name__} is not a Hugging Face language model; supported: {_choices()}")
    return inner


def name_of(module: nn.Module) -> str:
    """Where a built module came from, when it says so, else its class."""
    core = core_of(module)
    return str(getattr(core, "name_or_path", "") or type(core).__name__)


def is_causal(core: PreTrainedModel) -> bool:
    return type(core).__name__ not in MASKED


def _unknown(found: str, module: nn.Module | None = None) -> LoceditError:
    parts = "" if module is None else f" with {', '.join(name for name, _ in module.named_children())}"
    return LoceditError(f"architecture {found!r}{parts} is not supported; supported: {_choices()}")


def _choices() -> str:
    return ", ".join(SUPPORTED)


def check(source: str, *, tokenizer: str | None = None) -> None:
    """Raise LoceditError where no model can be loaded from `source`; reads its config.json and its tokenizer only."""
    there = str(locate(source) or source)
    _class_name(_config(there))
    tokenizer_from(tokenizer, beside=there)


# --- reading ---------------------------------------------------------------------------------------------------------


def read(source: str, *, dtype: str | torch.dtype, device_map: Any) -> PreTrainedModel:
    """The model of a folder or hub id; every weight must be in the checkpoint."""
    config = _config(source)
    kind = getattr(transformers, _class_name(config))
    if dtype != "auto" and not isinstance(dtype, torch.dtype):
        dtype = _dtype(dtype)
    try:
        with quiet():
            module, info = kind.from_pretrained(
                source, config=config, dtype=dtype, device_map=device_map,
                output_loading_info=True, ignore_mismatched_sizes=True,
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise LoceditError(f"cannot read the weights of {source!r}: {_first_line(error)}") from error
    _refuse_incomplete(source, type(module).__name__, info)
    return module


def _refuse_incomplete(source: str, kind: str, info: dict[str, Any]) -> None:
    """transformers fills what a checkpoint lacks with random numbers."""
    if missing := sorted(info["missing_keys"]):
        raise LoceditError(f"the checkpoint {source!r} lacks {len(missing)} weights of {kind}, first {missing[0]!r}")
    if other := sorted(info["mismatched_keys"]):
        name, found, wanted = other[0]
        raise LoceditError(
            f"the checkpoint {source!r} has {len(other)} weights of other shapes than its config.json says, first "
            f"{name!r}: {list(found)} instead of {list(wanted)}"
        )


@contextmanager
def quiet() -> Generator[None]:
    """Keep transformers' tables and bars and the hub's retries off the screen while a checkpoint is read or written."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    level, bars, hub_level = logging.get_verbosity(), logging.is_progress_bar_enabled(), hub.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        hub.set_verbosity(hub_level)
        if bars:
            logging.enable_progress_bar()


def _config(source: str) -> PretrainedConfig:
    try:
        with quiet():
            return transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        if Path(source).is_dir():
            raise LoceditError(f"cannot read {source}/config.json: {_first_line(error)}") from error
        raise LoceditError(
            f"model {source!r}: there is no such folder, and no answer from the Hugging Face hub: {_first_line(error)}"
        ) from error


def _class_name(config: PretrainedConfig) -> str:
    """The supported class for a config: the one it names, else the one for its type."""
    named = (config.architectures or [None])[0]
    if named in SUPPORTED:
        return named
    for name in SUPPORTED:
        if getattr(transformers, name).config_class is type(config):
            return name
    raise _unknown(named or config.model_type)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise LoceditError(f"dtype={name!r}: choices: auto, float32, bfloat16, float16")
    return found


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def tokenizer_from(given: Any, *, beside: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer given (object, folder or hub id), or the one beside the weights; it must be a fast one."""
    if isinstance(given, PreTrainedTokenizerBase):
        found = given
    else:
        source = str(given) if given is not None else beside
        if source is None:
            raise LoceditError("a built module needs its tokenizer: load(module, tokenizer=...)")
        try:
            with quiet():
                found = transformers.AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            raise LoceditError(
                f"no fast tokenizer in {source!r}: it needs a tokenizer.json, or give tokenizer= another folder"
            ) from error
        if not set(found.get_vocab()) - set(found.all_special_tokens):
            raise LoceditError(f"no tokenizer in {source!r}: it needs a tokenizer.json, or give --tokenizer FOLDER")
    if not found.is_fast:
        raise LoceditError(
            f"the tokenizer of {beside or type(found).__name__!r} is not a fast one (no tokenizer.json), so it cannot "
            "say which characters a token covers"
        )
    return found


# --- checks and placing ----------------------------------------------------------------------------------------------


def place(module: nn.Module, *, dtype: Any, device: Any, built: bool, spread: Any) -> nn.Module:
    """Move a model to its device and, when asked for by name, dtype."""
    if spread is not None:
        return module
    if built and dtype != "auto":
        module = module.to(dtype if isinstance(dtype, torch.dtype) else _dtype(dtype))
    if device == "auto":
        if built or not torch.cuda.is_available():
            return module
        device = "cuda"
    try:
        return module.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise LoceditError(f"device={str(device)!r} cannot be used: {_first_line(error)}") from error


def refuse_broken_weights(module: nn.Module, name: str) -> None:
    """Raise when a weight is NaN or infinite."""
    for parameter_name, parameter in module.named_parameters():
        if parameter.is_meta or not parameter.is_floating_point():
            continue
        if not bool(parameter.detach().sum(dtype=torch.float32).isfinite()) and not bool(parameter.isfinite().all()):
            raise LoceditError(f"{name}: parameter {parameter_name!r} holds NaN or infinite values")


def context_length(core: PreTrainedModel) -> int | None:
    """How many tokens fit; RoBERTa numbers its positions from padding_idx + 1."""
    config = core.config
    length = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if length is None:
        return None
    return int(length) - (config.pad_token_id + 1 if config.model_type == "roberta" else 0)
