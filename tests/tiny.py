"""Tiny random models of every supported architecture, and a tokenizer made in code.

Every weight, bias and norm is random and far from its usual starting value, dropout is off, grouped-query models have
two key/value heads for four query heads, and the head width differs from d_model / n_heads where the architecture
allows it: what a real model would show only in one place in a thousand shows here at once.
"""

import functools
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from locedit.models import Model, load

VOCAB = 320
D_MODEL, D_MLP, N_LAYERS, N_HEADS, N_KV_HEADS, CONTEXT = 48, 80, 3, 4, 2, 64
CORPUS = (
    "Anna Berg was born in Oslo. Anna Berg works as a baker.",
    "Carl Dane was born in Lima. Carl Dane works as a pilot.",
    "The phone number of Eva Frost is 555-0134, the e-mail is eva@frost.org.",
    "Question: where was Anna Berg born? Answer: Oslo",
)

_common = {
    "hidden_size": D_MODEL,
    "intermediate_size": D_MLP,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "max_position_embeddings": CONTEXT,
}
_gqa = _common | {"num_key_value_heads": N_KV_HEADS}
_gpt = {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": N_HEADS, "n_positions": CONTEXT}
_no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_neox = _common | {"rotary_pct": 0.5, "hidden_dropout": 0.0, "attention_dropout": 0.0}
_sliding = {"sliding_window": 6, "query_pre_attn_scalar": 12, "head_dim": 16}
_bert = _common | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

_CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _gpt | _no_dropout),
    "gpt_neo": (
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        {
            "hidden_size": D_MODEL,
            "intermediate_size": D_MLP,
            "num_layers": N_LAYERS,
            "num_heads": N_HEADS,
            "attention_types": [[["global", "local", "global"], 1]],
            "window_size": 6,
            "max_position_embeddings": CONTEXT,
            "resid_dropout": 0.0,
            "embed_dropout": 0.0,
            "attention_dropout": 0.0,
        },
    ),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", _gpt | _no_dropout | {"rotary_dim": 8}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _neox | {"use_parallel_residual": True}),
    "gpt_neox_sequential": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _neox | {"use_parallel_residual": False}),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        _common | {"ffn_dim": D_MLP, "word_embed_proj_dim": D_MODEL, "dropout": 0.0, "attention_dropout": 0.0},
    ),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _gqa | {"head_dim": 16}),
    "llama_tied": ("LlamaConfig", "LlamaForCausalLM", _gqa | {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", _gqa | {"sliding_window": 6, "head_dim": 12}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", _gqa | {"head_dim": 16}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", _gqa | _sliding | {"attn_implementation": "eager"}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", _gqa | _sliding),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _gqa),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _gqa | {"head_dim": 16}),
    "phi": ("PhiConfig", "PhiForCausalLM", _common | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _gqa | {"pad_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "bert": ("BertConfig", "BertForMaskedLM", _bert),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", _bert | {"max_position_embeddings": CONTEXT + 1}),
}

ARCHITECTURES = tuple(_CONFIGS)
MASKED = ("bert", "roberta")
CAUSAL = tuple(name for name in ARCHITECTURES if name not in MASKED)


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with 320 tokens: <pad> 0, <s> 1, </s> 2, <mask> 3, all 256 bytes, and merges.

    It adds no special token. Any text goes through and comes back; words of the small corpus take one to three tokens.
    """
    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True, normalized=False) for text in ("<pad>", "<s>", "</s>", "<mask>")]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", mask_token="<mask>"
    )


def module(architecture: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny random Hugging Face model in evaluation mode; `overrides` go into its config."""
    config_name, class_name, settings = _CONFIGS[architecture]
    ids = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    ties = {} if architecture in ("llama_tied", "gpt2", "bert", "roberta") else {"tie_word_embeddings": False}
    config = getattr(transformers, config_name)(**(ids | ties | settings | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = getattr(transformers, class_name)(config)
        randomise(built, seed=seed)
    return built.eval()


def randomise(built: torch.nn.Module, *, seed: int) -> None:
    """Give every matrix a spread of 1.5 / sqrt(fan in) and every bias and norm a spread of 0.3 around its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in built.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * 1.5 / D_MODEL**0.5)
            else:
                parameter.add_(noise * 0.3)


def model(architecture: str, *, seed: int = 0, **overrides: Any) -> Model:
    """`module()` with the tiny tokenizer as a Model on the CPU."""
    return load(module(architecture, seed=seed, **overrides), tokenizer=tokenizer(), device="cpu")


def ids(batch: int = 2, pos: int = 12, *, seed: int = 1) -> torch.Tensor:
    """Random token ids [batch, pos] without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCAB, (batch, pos), generator=generator)
