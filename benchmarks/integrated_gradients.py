"""Integrated gradients of all neurons: the published loop over layers against one staircase.

    python -m benchmarks.integrated_gradients [--repeats 5]

Random models of 12 layers and width 256, one scored token, 20 points by the left rule (the published code), float32,
one CPU thread; CPU seconds, the best of the repeats. "difference" is the largest difference of the two over the
largest score. The published loop does, for each layer, one pass to read the activation and one batch of 20 passes with
the layer's neurons scaled, with the backward pass down to that layer (Dai et al. 2022, Wu et al. 2023), here without
padding.
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from locedit.localize.integration.paths import Prompt
from locedit.localize.integration.quadrature import Rule, rule
from locedit.localize.integration.staircase import Staircase
from locedit.models import Model

LAYERS, WIDTH, VOCAB, STEPS = 12, 256, 5000, 20
CASES = [("gpt2", 64, 40.0), ("llama", 64, 40.0), ("gpt_neox", 64, 40.0), ("gemma2", 64, 40.0), ("gpt2", 128, 100.0)]
"(architecture, tokens, the ratio that must be reached)"
_common = {
    "num_hidden_layers": LAYERS,
    "hidden_size": WIDTH,
    "num_attention_heads": 4,
    "intermediate_size": 4 * WIDTH,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "initializer_range": 0.08,
}
_gpt2 = {"n_layer": LAYERS, "n_embd": WIDTH, "n_head": 4, "n_positions": 256, "vocab_size": VOCAB}
_gemma2 = {"num_key_value_heads": 2, "head_dim": 64, "sliding_window": 16, "query_pre_attn_scalar": 64}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _gpt2 | {"initializer_range": 0.08}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _common),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _common | {"num_key_value_heads": 2}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", _common | _gemma2 | {"attn_implementation": "eager"}),
}


def build(architecture: str) -> Model:
    config, name, settings = MODELS[architecture]
    torch.manual_seed(0)
    built = getattr(transformers, name)(getattr(transformers, config)(**settings, bos_token_id=0, eos_token_id=0))
    return Model(built.eval(), None, name=architecture)


def published_loop(model: Model, ids: Tensor, *, token: int, points: Rule) -> Tensor:
    """Scores `[layer, neuron]` of the token that follows `ids`, one layer after the other."""
    found: list[Tensor] = []
    alphas, weights = points.alphas.to(model.dtype), points.weights.to(model.dtype)
    for layer in range(model.n_layers):
        projection = model.linear(layer, "mlp.out")
        neurons = _activation(model, projection, ids)
        scaled = (alphas[:, None] * neurons).requires_grad_()

        def put(_: Any, args: tuple[Tensor], scaled: Tensor = scaled) -> tuple[Tensor]:
            whole = args[0].clone()
            whole[:, -1] = scaled
            return (whole,)

        handle = projection.register_forward_pre_hook(put)
        logits = model.module(ids.expand(len(alphas), -1)).logits[:, -1]
        handle.remove()
        (gradient,) = torch.autograd.grad(logits.softmax(-1)[:, token].sum(), scaled)
        found.append(neurons * (weights[:, None] * gradient).sum(0))
    return torch.stack(found)


def _activation(model: Model, projection: torch.nn.Module, ids: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = projection.register_forward_pre_hook(lambda _, args: seen.append(args[0][0, -1].detach()))
    model.module(ids)
    handle.remove()
    return seen[0]


def staircase(model: Model, ids: Tensor, *, token: int, points: Rule) -> Tensor:
    """The same scores by the staircase."""
    last = ids.shape[1] - 1
    prompt = Prompt(ids=tuple(ids[0].tolist()), positions=(last,), tokens=(token,), scaled=((last,),))
    paths = Staircase(model, [prompt], objective="probability", memory_mb=1024)
    return paths.integrate(points, torch.ones(1, 1, model.n_layers, dtype=torch.bool)).scores[0, 0]


def timed(function: Callable[[], Tensor], repeats: int) -> tuple[float, Tensor]:
    """CPU seconds (the best run, the least disturbed by other work) and the result."""
    seconds: list[float] = []
    result = torch.empty(0)
    for _ in range(repeats):
        start = time.process_time()
        result = function()
        seconds.append(time.process_time() - start)
    return min(seconds), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="of the fast run; the loop runs half as often")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    print(f"{'model':10} {'tokens':>6} {'loop s':>8} {'ours s':>8} {'ratio':>8} {'asked':>6} {'difference':>11}")
    reached = True
    for architecture, tokens, asked in CASES:
        model, points = build(architecture), rule("left", STEPS)
        ids = torch.randint(5, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(1))
        staircase(model, ids, token=7, points=points)  # warm-up
        fast, ours = timed(lambda m=model, i=ids, p=points: staircase(m, i, token=7, points=p), repeats)
        slow, loop = timed(
            lambda m=model, i=ids, p=points: published_loop(m, i, token=7, points=p), max(1, repeats // 2)
        )
        difference = float((ours - loop).abs().max() / loop.abs().max())
        good = slow / fast >= asked and difference <= 1e-5
        reached &= good
        print(
            f"{architecture:10} {tokens:6} {slow:8.2f} {fast:8.3f} {slow / fast:7.1f}x {asked:5.0f}x {difference:11.1e}"
            + ("" if good else "  NOT REACHED"),
            flush=True,
        )
    sys.exit(0 if reached else 1)


if __name__ == "__main__":
    main()
