"""Time and optimizer memory of a restricted training step against a full fine-tuning step.

    python benchmarks/restricted_step.py [--share 0.05] [--d-model 256] [--layers 4] [--pos 64]

Both sides run the same loss (gradient ascent on 8 texts) with AdamW on the same random model, one after the other in
turns, so that a slow moment of the machine hits both; the ratio of the fastest rounds is printed. Full fine-tuning is
plain torch: gradients of all weights, one optimizer step. The restricted step is the trainer's own, on a random share
of the neurons, by hooks and by the scatter.
"""

import argparse
import time
from collections.abc import Callable

import torch
import transformers
from torch import Tensor

from locedit import losses
from locedit.components import ComponentSet
from locedit.data.encode import Example, Span, collate
from locedit.edit.objective import Objective, Step
from locedit.edit.restrict import frozen
from locedit.edit.train import Run, TrainOptions
from locedit.models import Model
from locedit.unlearn.gradient_ascent import ascent

BATCH, VOCAB, ROUNDS, STEPS = 8, 2000, 8, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--share", type=float, default=0.05, help="of the neurons of every layer")
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--pos", type=int, default=64, help="tokens a text")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{args.layers} layers, d_model {args.d_model}, {args.share:.0%} of the neurons, {BATCH} texts of {args.pos}")
    columns = f"{'full':>9} {'restricted':>11} {'full / restricted':>18} {'optimizer memory':>17}"
    print(f"{'model':8} {'path':8} {columns}")
    for name in ("gpt2", "llama"):
        model = build(name, d_model=args.d_model, layers=args.layers)
        texts = examples(args.pos)
        within = some_neurons(model, args.share)
        for path in ("auto", "scatter"):
            report(name, path, model, texts, within)


def build(name: str, *, d_model: int, layers: int) -> Model:
    """A random model with a vocabulary of VOCAB tokens."""
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    if name == "gpt2":
        config = transformers.GPT2Config(
            n_embd=d_model, n_layer=layers, n_head=4, vocab_size=VOCAB, n_positions=512, **ids
        )
        module = transformers.GPT2LMHeadModel(config)
    else:
        sizes = {"hidden_size": d_model, "intermediate_size": 4 * d_model, "num_hidden_layers": layers}
        config = transformers.LlamaConfig(
            **sizes, num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCAB, max_position_embeddings=512
        )
        module = transformers.LlamaForCausalLM(config)
    return Model(module.eval(), _Padding(), name=name)


class _Padding:
    """All that a batch of token ids needs of a tokenizer."""

    pad_token_id = 0

    def __len__(self) -> int:
        return VOCAB


def examples(pos: int) -> list[Example]:
    ids = torch.randint(1, VOCAB, (BATCH, pos), generator=torch.Generator().manual_seed(1)).tolist()
    span = (Span(start=1, end=pos, label="plain"),)
    return [Example(id=str(row), ids=tuple(tokens), spans=span, kind="plain") for row, tokens in enumerate(ids)]


def some_neurons(model: Model, share: float) -> ComponentSet:
    generator = torch.Generator().manual_seed(0)
    chosen = {
        site.name: torch.randperm(site.count, generator=generator)[: max(1, int(share * site.count))].tolist()
        for site in model.sites("neuron").values()
    }
    return model.components(chosen)


def report(name: str, path: str, model: Model, texts: list[Example], within: ComponentSet) -> None:
    """Print one row of the table."""
    options = TrainOptions(steps=1, batch_size=BATCH, eval_every=0, learning_rate=1e-6, path=path)
    run = Run(model, Objective(loss=ascend, forget=texts), within=within, options=options, hold="weights")
    weights = list(model.module.parameters())
    start = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, lr=1e-6, weight_decay=0.0)

    def full() -> None:
        optimizer.zero_grad(set_to_none=True)
        ascent(losses.score(model, collate(texts, model))).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()

    def restricted() -> None:
        with frozen(model.module):
            run.step(1)

    times = fastest({"full": full, "restricted": restricted})
    memory = state_bytes(run.optimizer) / state_bytes(optimizer)
    ratio = times["full"] / times["restricted"]
    print(
        f"{name:8} {path:8} {1e3 * times['full']:8.1f} {1e3 * times['restricted']:14.1f} {ratio:18.2f} {memory:16.1%}"
    )
    with torch.no_grad():
        for weight, old in zip(weights, start, strict=True):
            weight.copy_(old)
            weight.grad = None


def ascend(step: Step) -> dict[str, Tensor]:
    return {"forget_loss": ascent(step.score(step.forget))}


def fastest(sides: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Seconds a step of the fastest round of each side, the sides taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS + 1):
        for name, step in sides.items():
            start = time.process_time()
            for _ in range(STEPS):
                step()
            seconds[name].append((time.process_time() - start) / STEPS)
    return {name: min(rounds[1:]) for name, rounds in seconds.items()}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(t.numel() * t.element_size() for state in optimizer.state.values() for t in state.values() if t.ndim)


if __name__ == "__main__":
    main()
