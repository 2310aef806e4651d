"""EL_n and memorization accuracy against the published double loop, which generates anew after every prefix.

    python -m benchmarks.extraction [--models gpt2,llama] [--layers 4] [--width 128] [--pos 64] [--texts 2,8]

Random models with a vocabulary of 2000, float32, one CPU thread. The texts are written by the model itself, every
twelfth token ("known") or every other token ("forgotten") replaced; the less a text is known, the more has to be
decoded. The loop generates with transformers' own key-value cache after each of the T - 1 prefixes. Both take turns, so
that a slow moment of the machine hits both; CPU seconds of the best round. "ratio" must be at least 15 where 8 texts or
more are read together, and the values equal everywhere (exit status 1 otherwise). The gain comes from the rows that
share a step: with few texts of which little is known, a step has few rows that still write, and the ratio can be lower.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import transformers

from locedit.data.encode import Example, Span
from locedit.evaluate.extraction import Extraction, extraction
from locedit.models import Model, load
from tests import tiny

VOCAB, AT_LEAST, TOGETHER, SIZES = 2000, 15.0, 8, (3, 10)
TEXTS = {"known": 12, "forgotten": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="gpt2,llama")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--pos", default="64", help="tokens a text")
    parser.add_argument("--texts", default="2,8", help="how many, read together")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{args.layers} layers, width {args.width}, vocabulary {VOCAB}; CPU seconds")
    print(f"{'model':6} {'texts':12} {'pos':>4} {'loop':>7} {'locedit':>8} {'ratio':>6}  EL_3, EL_10, MA; difference")
    kept = True
    for name in args.models.split(","):
        model = build(name, layers=args.layers, width=args.width)
        for count, pos in itertools.product(map(int, args.texts.split(",")), map(int, args.pos.split(","))):
            for kind, every in TEXTS.items():
                texts = written(model, count, pos, every=every)
                kept &= report(f"{name:6} {count:2} {kind:9}", model, texts, args.rounds)
    sys.exit(0 if kept else 1)


def build(name: str, *, layers: int, width: int) -> Model:
    """A random model that ends no text."""
    ids = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(0)
    if name == "gpt2":
        module: Any = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=width, n_layer=layers, n_head=4, n_positions=512, **ids)
        )
    else:
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, **ids))
    tiny.randomise(module, seed=0)
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    return load(module, tokenizer=tokenizer, device="cpu")


@torch.no_grad()
def written(model: Model, count: int, pos: int, *, every: int) -> list[Example]:
    """Random tokens, then what the model writes after them, with every so-manieth token replaced."""
    ids = torch.randint(4, VOCAB, (count, 8), generator=torch.Generator().manual_seed(1))
    while ids.shape[1] < pos:
        said = model.module(input_ids=ids).logits[:, -1].argmax(-1)
        said = (said + ids.shape[1]) % VOCAB if ids.shape[1] % every == 0 else said
        ids = torch.cat([ids, said[:, None]], dim=1)
    span = (Span(start=1, end=pos, label="plain"),)
    return [Example(id=str(row), ids=tuple(each), spans=span, kind="plain") for row, each in enumerate(ids.tolist())]


def loop(model: Model, texts: Sequence[Example]) -> list[Extraction]:
    """The published algorithm."""
    return [_loop(model.module, torch.tensor(text.ids)) for text in texts]


def _loop(module: Any, x: torch.Tensor) -> Extraction:
    total, hits, likelihood = len(x), 0, dict.fromkeys(SIZES, 0.0)
    for i in range(1, total):
        ones = torch.ones(1, i, dtype=torch.long)
        said = module.generate(x[None, :i], attention_mask=ones, max_length=total, do_sample=False, pad_token_id=0)
        written, truth = said[0, i:].tolist(), x[i:].tolist()
        hits += written[0] == truth[0]
        for n in SIZES:
            if len(truth) >= n:
                true = ngrams(truth, n)
                unique = set(true)
                likelihood[n] += sum(gram in unique for gram in ngrams(written, n)) / len(true)
    return Extraction(el={n: value / (total - n) for n, value in likelihood.items()}, ma=hits / (total - 1))


def ngrams(tokens: list[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1)]


def report(name: str, model: Model, texts: Sequence[Example], rounds: int) -> bool:
    """Print one row; whether the ratio is reached, where it must be, and the values are equal."""
    runs = {"loop": partial(loop, model, texts), "locedit": partial(extraction, model, texts, n=SIZES)}
    seconds: dict[str, list[float]] = {side: [] for side in runs}
    found: dict[str, list[Extraction]] = {}
    for _ in range(rounds):
        for side, run in runs.items():
            start = time.process_time()
            found[side] = run()
            seconds[side].append(time.process_time() - start)
    slow, fast = min(seconds["loop"]), min(seconds["locedit"])
    difference = max(
        max(abs(one.ma - other.ma), *(abs(one.el[n] - other.el[n]) for n in SIZES))
        for one, other in zip(found["loop"], found["locedit"], strict=True)
    )
    means = [sum(each.el[n] for each in found["locedit"]) / len(texts) for n in SIZES]
    means.append(sum(each.ma for each in found["locedit"]) / len(texts))
    good = (slow / fast >= AT_LEAST or len(texts) < TOGETHER) and difference < 1e-9
    print(
        f"{name} {len(texts[0].ids):4} {slow:7.2f} {fast:8.2f} {slow / fast:6.1f}  "
        f"{', '.join(f'{mean:.3f}' for mean in means)}; {difference:.0e}{'' if good else '  NOT REACHED'}",
        flush=True,
    )
    return good


if __name__ == "__main__":
    main()
