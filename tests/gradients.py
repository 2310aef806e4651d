"""Integrated gradients the slow and obvious way, to test the fast ones against."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from locedit.data.encode import Example, Span
from locedit.localize.integration.quadrature import Rule
from locedit.models import Model
from tests import tiny


class Float64Throughout(TorchFunctionMode):
    """Turns every request for float32 into one for float64.

    Norms and attention of many architectures compute in float32 whatever the model's dtype, so that even a float64
    model has no more than 7 digits.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


def example(
    ids: Sequence[int], *spans: tuple[int, int], id: str = "a", subject: tuple[int, int] | None = None
) -> Example:
    return Example(
        id=id,
        ids=tuple(ids),
        spans=tuple(Span(start=start, end=end, label="answer") for start, end in spans),
        kind="fact",
        subject=None if subject is None else Span(start=subject[0], end=subject[1], label="subject"),
    )


def examples(count: int = 3) -> list[Example]:
    """Texts of different lengths, each with a stretch of two tokens and one of one token."""
    rows = tiny.ids(count, 14).tolist()
    return [example(row[: 14 - i], (9, 11), (12 - i, 13 - i), id=f"e{i}") for i, row in enumerate(rows)]


def by_loop(model: Model, one: Example, rule: Rule, *, log: bool = False) -> Tensor:
    """`[target, layer, neuron]`: for each token and layer a batch of whole texts, neurons scaled at one place."""
    return torch.stack([_of_token(model, one, target, rule=rule, log=log) for target in one.targets])


def _of_token(model: Model, one: Example, target: int, *, rule: Rule, log: bool) -> Tensor:
    ids, place = list(one.ids), target - 1
    if not model.causal:
        ids[target], place = model.tokenizer.mask_token_id, target
    batch = torch.tensor([ids]).expand(rule.steps, -1)
    found: list[Tensor] = []
    for layer in range(model.n_layers):
        projection = model.linear(layer, "mlp.out")
        seen: list[Tensor] = []
        handle = projection.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].detach()))
        model.module(input_ids=batch[:1])
        handle.remove()
        neurons = seen[0].reshape(len(ids), -1)[place]
        leaf = (rule.alphas[:, None] * neurons).to(neurons).requires_grad_()

        def put(_: Any, args: tuple[Tensor], leaf: Tensor = leaf) -> tuple[Tensor]:
            whole = args[0].reshape(*batch.shape, -1).clone()
            whole[:, place] = leaf
            return (whole.reshape(args[0].shape),)

        handle = projection.register_forward_pre_hook(put)
        logits = model.module(input_ids=batch).logits[:, place]
        handle.remove()
        value = logits.log_softmax(-1) if log else logits.softmax(-1)
        (gradient,) = torch.autograd.grad(value[:, one.ids[target]].sum(), leaf)
        found.append(neurons * (rule.weights.to(gradient)[:, None] * gradient).sum(0))
    return torch.stack(found)


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())
