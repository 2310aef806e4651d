"""Path patching from every head to the logits: a run for each head against rows of one pass.

    python -m benchmarks.path_patching [--repeats 3]

Random models of 12 layers and width 256, 8 pairs of 32 tokens, float32, one CPU thread; CPU seconds, the best of the
repeats. The loop does what the published code does: for each head one corrupt run of the whole prompts in which all
heads are held at their corrupt values and that head at its clean one, MLPs free. "difference" is the largest
difference of the logits over their standard deviation.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.integrated_gradients import VOCAB, build
from locedit import tracing
from locedit.localize.lookup.path_patching import Node, path_patch
from locedit.localize.patching.pairs import Pair, PairBatch, batch_of
from locedit.models import Model

PAIRS, TOKENS, ASKED = 8, 32, 5.0
MODELS = ("gpt2", "llama", "gpt_neox", "gemma2")


def some_pairs() -> PairBatch:
    generator = torch.Generator().manual_seed(1)
    pairs: list[Pair] = []
    for number in range(PAIRS):
        clean, corrupt = torch.randint(5, VOCAB, (2, TOKENS), generator=generator).tolist()
        corrupt = [*clean[:4], *corrupt[4:8], *clean[8:]]
        pairs.append(
            Pair(
                id=str(number),
                clean=tuple(clean),
                corrupt=tuple(corrupt),
                at=TOKENS - 1,
                answer=5,
                wrong=6,
                subject=None,
            )
        )
    return batch_of(pairs)


def nodes(model: Model) -> list[Node]:
    return [Node("head", layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]


def together(model: Model, batch: PairBatch) -> Tensor:
    senders = [(node,) for node in nodes(model)]
    return path_patch(
        model, batch, senders, receiver=model.n_layers, mlps="free", measure=lambda logits, _: logits, rows=256
    )


def one_by_one(model: Model, batch: PairBatch) -> Tensor:
    """A run for each head."""
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(model.n_layers)]
    sides: list[dict[str, Tensor]] = []
    for tokens in (batch.clean, batch.corrupt):
        with torch.no_grad(), tracing.record(model, names) as seen:
            model.logits(tokens, at=batch.at)
        sides.append(dict(seen))
    clean, corrupt = sides
    found: list[Tensor] = []
    for node in nodes(model):
        held = dict(corrupt)
        name = names[node.layer]
        held[name] = held[name].clone()
        held[name][:, :, node.head] = clean[name][:, :, node.head]
        with torch.no_grad(), tracing.replace(model, held):
            found.append(model.logits(batch.corrupt, at=batch.at))
    return torch.stack(found)


def timed(function: Callable[[], Tensor], repeats: int) -> tuple[float, Tensor]:
    """CPU seconds (the best run) and the result."""
    seconds: list[float] = []
    result = torch.empty(0)
    for _ in range(repeats):
        start = time.process_time()
        result = function()
        seconds.append(time.process_time() - start)
    return min(seconds), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    reached = True
    print(f"{'model':10} {'heads':>6} {'loop s':>8} {'ours s':>8} {'ratio':>7} {'asked':>6} {'difference':>11}")
    batch = some_pairs()
    for architecture in MODELS:
        model = build(architecture)
        together(model, batch)  # warm-up
        fast, ours = timed(partial(together, model, batch), repeats)
        slow, loop = timed(partial(one_by_one, model, batch), max(1, repeats // 2))
        difference = float((ours - loop).abs().max() / loop.std())
        ratio = slow / fast
        reached &= ratio >= ASKED and difference < 1e-3
        count = len(nodes(model))
        print(f"{architecture:10} {count:6} {slow:8.2f} {fast:8.3f} {ratio:7.1f} {ASKED:6.1f} {difference:11.1e}")
    sys.exit(0 if reached else 1)


if __name__ == "__main__":
    main()
