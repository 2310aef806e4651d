"""Patching: what a batch of attribution patching runs, and exact patching against one run for each component.

    python -m benchmarks.patching [--repeats 3]

Random models of 12 layers and width 256, float32, one CPU thread; CPU seconds, the best of the repeats. Attribution
patching must take at most 3 forward passes and 1 backward pass for each batch of items. Exact patching patches every
head and every MLP of one pair of prompts that differ in three tokens, all positions at once: "loop" has one forward
pass for each, as transformer_lens.patching has; "batched" has them as rows of one pass that share the blocks below.
"difference" is the largest difference of the two over the largest score.
"""

import argparse
import sys
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.integrated_gradients import VOCAB, build, timed
from locedit import tracing
from locedit.data.encode import Span
from locedit.localize.attribution_patching import AttributionPatchingOptions, attributions
from locedit.localize.patching.node_patching import Run, effects, run
from locedit.localize.patching.nodes import Patch, patches_of, points_of
from locedit.localize.patching.pairs import Pair, batch_of, measured
from locedit.models import Model

CASES = [("gpt2", 16), ("llama", 16), ("gpt_neox", 16), ("gemma2", 16), ("gpt2", 64)]
"(architecture, tokens)"
ITEMS, ROWS = 8, 64
FORWARDS, BACKWARDS, DIFFERENCE = 3, 1, 1e-4


def pairs(count: int, tokens: int) -> list[Pair]:
    """Random prompts whose tokens 2 to 4 differ."""
    generator = torch.Generator().manual_seed(1)
    found: list[Pair] = []
    for number in range(count):
        clean = torch.randint(5, VOCAB, (tokens,), generator=generator).tolist()
        corrupt = [*clean[:2], *torch.randint(5, VOCAB, (3,), generator=generator).tolist(), *clean[5:]]
        subject = Span(start=2, end=5, label="subject")
        found.append(
            Pair(
                id=str(number), clean=tuple(clean), corrupt=tuple(corrupt), at=tokens - 1, answer=7, wrong=8,
                subject=subject,
            )
        )  # fmt: skip
    return found


@contextmanager
def counting(model: Model) -> Generator[dict[str, int]]:
    """Count the forward and backward passes through the last block."""
    counted = {"forward": 0, "backward": 0}

    def backward(_: Tensor) -> None:
        counted["backward"] += 1

    def forward(_: Any, __: Any, output: Any) -> None:
        counted["forward"] += 1
        value = output[0] if isinstance(output, tuple) else output
        if value.requires_grad:
            value.register_hook(backward)

    handle = model.anatomy.blocks[-1].register_forward_hook(forward)
    try:
        yield counted
    finally:
        handle.remove()


def loop(model: Model, pair: Pair, patches: list[Patch], clean: Run) -> Tensor:
    """Effects of the patches, one forward pass each."""
    batch = batch_of([pair])
    base = run(model, batch, "corrupt", [], kind="logit_difference").metric
    found: list[Tensor] = []
    for patch in patches:
        changes = {p.point: partial(_put, clean.values[p.point], p.component) for p in patch.places}
        with torch.no_grad(), tracing.hooked(model, changes):
            logits = model.logits(batch.corrupt, at=batch.at)
        found.append(measured(logits, batch.answer, batch.wrong, kind="logit_difference") - base)
    return torch.cat(found)


def _put(new: Tensor, component: int | None, value: Tensor) -> Tensor:
    if component is None:
        return new
    changed = value.clone()
    changed[:, :, component] = new[:, :, component]
    return changed


def batched(model: Model, pair: Pair, patches: list[Patch], clean: Run) -> Tensor:
    """The same effects, as locedit computes them."""
    batch = batch_of([pair])
    where = torch.ones(1, len(patches), len(pair.clean), dtype=torch.bool)
    return effects(model, batch, "corrupt", patches, clean.values, where, kind="logit_difference", rows=ROWS)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    titles = f"{'model':10} {'tokens':>6} {'forwards':>8} {'backwards':>9} {'components':>10}"
    print(f"{titles} {'loop s':>8} {'batched s':>9} {'ratio':>7} {'difference':>11}")
    reached = True
    for architecture, tokens in CASES:
        model = build(architecture)
        items = pairs(ITEMS, tokens)
        with counting(model) as counted:
            attributions(model, batch_of(items), AttributionPatchingOptions())
        patches = patches_of(model, "head+mlp")
        clean = run(model, batch_of(items[:1]), "clean", points_of(patches), kind="logit_difference")
        fast, ours = timed(lambda m=model, i=items[0], p=patches, c=clean: batched(m, i, p, c), repeats)
        slow, plain = timed(lambda m=model, i=items[0], p=patches, c=clean: loop(m, i, p, c), repeats)
        difference = float((ours - plain).abs().max() / plain.abs().max())
        good = counted["forward"] <= FORWARDS and counted["backward"] == BACKWARDS and difference <= DIFFERENCE
        reached &= good
        runs = f"{architecture:10} {tokens:6} {counted['forward']:8} {counted['backward']:9} {len(patches):10}"
        times = f"{slow:8.2f} {fast:9.3f} {slow / fast:6.1f}x {difference:11.1e}"
        print(f"{runs} {times}" + ("" if good else "  NOT REACHED"), flush=True)
    sys.exit(0 if reached else 1)


if __name__ == "__main__":
    main()
