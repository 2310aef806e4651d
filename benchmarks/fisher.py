"""Exact per-sample Fisher information against one plain forward and backward pass over the same batch.

    python -m benchmarks.fisher [--layers 4,12] [--pos 32,64,128] [--units neuron,weight] [--batch 16] [--rounds 5]

Random models of width 256 and a vocabulary of 2000, every token scored, float32, one CPU thread. The plain pass has the
same loss and gives the gradients of all weights, as a training step does. Both take turns, so that a slow moment of the
machine hits both; CPU seconds of the best round. "ratio" must be at most 1.5 (exit status 1 otherwise). With --others
also one backward pass for each example ("loop"), and torch.func's vmap of gradients, in units of the plain pass.
"difference" is the largest difference of the sums of squares to the loop's, over the largest.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor

from locedit.data.encode import Batch, Example, Span, collate
from locedit.localize.information.per_sample import SquaredGradients, one_by_one, squares_of
from locedit.localize.information.slice_sums import parts_of
from locedit.localize.information.squares import Squares
from locedit.losses import score, sequence_nll
from locedit.models import Model, load
from tests import tiny

WIDTH, HEADS, VOCAB, AT_MOST = 256, 4, 2000, 1.5
Run = Callable[[], Any]


def main() -> None:
    args = _arguments()
    torch.set_num_threads(1)
    print(f"width {WIDTH}, vocabulary {VOCAB}, {args.batch} texts a batch; CPU seconds")
    print(
        f"{'model':6} {'layers':>6} {'pos':>4} {'unit':8} {'plain':>7} {'fisher':>7} {'ratio':>6}  others, difference"
    )
    kept = True
    for name in args.models.split(","):
        for layers in map(int, args.layers.split(",")):
            model = build(name, layers)
            for pos in map(int, args.pos.split(",")):
                for unit in args.units.split(","):
                    kept &= _report(name, model, unit, examples(args.batch, pos), args)
    sys.exit(0 if kept else 1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="gpt2")
    parser.add_argument("--layers", default="4,12")
    parser.add_argument("--pos", default="32,64,128", help="tokens a text")
    parser.add_argument("--units", default="neuron,weight")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--others", action="store_true", help="the loop and vmap too")
    return parser.parse_args()


def build(name: str, layers: int) -> Model:
    """A random model."""
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCAB}
    if name == "gpt2":
        sizes = {"n_embd": WIDTH, "n_layer": layers, "n_head": HEADS, "n_positions": 512}
        config = transformers.GPT2Config(**sizes, **ids, attn_implementation="eager")
        module = transformers.GPT2LMHeadModel(config)
    else:
        sizes = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": layers}
        heads = {"num_attention_heads": HEADS, "num_key_value_heads": 2}
        module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, **ids))
    return load(module, tokenizer=tiny.tokenizer(), device="cpu")


def examples(count: int, pos: int) -> list[Example]:
    """Texts of random tokens, all scored."""
    ids = torch.randint(4, VOCAB, (count, pos), generator=torch.Generator().manual_seed(1)).tolist()
    return [
        Example(id=str(i), ids=tuple(row), spans=(Span(start=1, end=pos, label="text"),), kind="plain")
        for i, row in enumerate(ids)
    ]


def losses(model: Model, batch: Batch) -> Tensor:
    return sequence_nll(score(model, batch))


def plain(model: Model, batch: Batch) -> None:
    """One forward and one backward pass, with the gradients of all weights."""
    model.module.zero_grad(set_to_none=True)
    losses(model, batch).sum().backward()


def per_sample(model: Model, batch: Batch, unit: str) -> dict[str, Squares]:
    """All examples' squared gradients."""
    gradients = SquaredGradients(model, parts_of(model.sites(unit).values()), loss=partial(losses, model))
    gradients.update(batch)
    return gradients.squares


def loop(model: Model, texts: Sequence[Example], unit: str) -> dict[str, Squares]:
    """The same with one forward and one backward pass for each example."""
    squares = squares_of(model, parts_of(model.sites(unit).values()))
    one_by_one(model, squares, texts, loss=partial(losses, model))
    return squares


def by_vmap(model: Model, batch: Batch, unit: str) -> dict[str, Tensor]:
    """The same with torch.func, which makes every example's gradient of every weight at once."""
    from torch.func import functional_call, grad, vmap

    weights = {name: p.detach() for name, p in model.module.named_parameters()}
    chosen = {name: weights[name] for name in parts_of(model.sites(unit).values())}

    def loss(some: dict[str, Tensor], ids: Tensor) -> Tensor:
        logits = functional_call(model.module, weights | some, (ids[None],), {"use_cache": False}).logits[0]
        return torch.nn.functional.cross_entropy(logits[:-1], ids[1:])

    gradients = vmap(grad(loss), in_dims=(None, 0))(chosen, batch.ids)
    return {name: gradient.square().sum(0) for name, gradient in gradients.items()}


def best(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """CPU seconds of each, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    return {name: min(times[1:]) for name, times in seconds.items()}


def _report(name: str, model: Model, unit: str, texts: Sequence[Example], args: argparse.Namespace) -> bool:
    batch = collate(texts, model)
    runs: dict[str, Run] = {"plain": partial(plain, model, batch), "fisher": partial(per_sample, model, batch, unit)}
    others: dict[str, Run] = {"loop": partial(loop, model, texts, unit), "vmap": partial(by_vmap, model, batch, unit)}
    seconds = best(runs | others if args.others else runs, args.rounds)
    ratio = seconds["fisher"] / seconds["plain"]
    fast, slow = per_sample(model, batch, unit), loop(model, texts, unit)
    difference = max(
        float((value - slow[p].sums[part]).abs().max() / slow[p].sums[part].abs().max())
        for p, squares in fast.items()
        for part, value in squares.sums.items()
    )
    extra = ", ".join(f"{other} {seconds[other] / seconds['plain']:.2f}" for other in others if args.others)
    print(
        f"{name:6} {model.n_layers:6} {batch.ids.shape[1]:4} {unit:8} {seconds['plain']:7.3f} {seconds['fisher']:7.3f} "
        f"{ratio:6.2f}  {extra} {difference:.0e}{'' if ratio <= AT_MOST else '  NOT REACHED'}",
        flush=True,
    )
    return ratio <= AT_MOST


if __name__ == "__main__":
    main()
