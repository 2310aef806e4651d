"""The residual stream at a few positions of many prompts, as it is or with the attention of upper layers taken out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from locedit import tracing
from locedit.data.encode import Example, unseen_padding
from locedit.localize.budget import BatchOptions
from locedit.localize.integration.blocks import attention_of
from locedit.models import Model

EMBEDDING = -1
"the layer number of the residual stream that enters layer 0"


class Point(NamedTuple):
    """Where the stream is read: after a layer, or in its middle, before its MLP has added its output."""

    layer: int
    middle: bool = False


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Token ids without the answer, and the positions that are read."""

    ids: tuple[int, ...]
    places: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Prompts as `model.logits` takes them, on the model's device."""

    ids: Int[Tensor, "row pos"]
    attention_mask: Int[Tensor, "row pos"]
    places: Int[Tensor, "row place"]


class States:
    """The states of some prompts, each text run once. The first pass is the model as it is."""

    def __init__(self, model: Model, prompts: Sequence[Prompt], options: BatchOptions) -> None:
        self.model = model
        self.options = options
        unique = list(dict.fromkeys(prompts))
        self.index = torch.tensor([unique.index(prompt) for prompt in prompts])
        self.order = sorted(range(len(unique)), key=lambda number: len(unique[number].ids))
        self.prompts = [unique[number] for number in self.order]
        self.sums = torch.zeros(model.n_layers, model.d_model, dtype=torch.float64)
        self.plain = self._run(self._points(), self._summing)
        self.means = self.sums / sum(len(prompt.ids) for prompt in self.prompts)

    def ablated(self, first: int) -> dict[Point, Float[Tensor, "prompt place d_model"]]:
        """The states after layers `first` and up, with the attention outputs of these layers at their means."""
        return self._run([Point(layer) for layer in range(first, self.model.n_layers)], partial(self._at_means, first))

    def _points(self) -> list[Point]:
        layers = range(self.model.n_layers)
        return [Point(EMBEDDING), *(Point(layer, middle) for layer in layers for middle in (True, False))]

    def _run(
        self, points: Sequence[Point], changes: Callable[[Rows], dict[str, tracing.Change]]
    ) -> dict[Point, Tensor]:
        found: dict[str, list[Tensor]] = {}
        size = self.options.rows(row_bytes(self.model, max(len(prompt.ids) for prompt in self.prompts)))
        for start in range(0, len(self.prompts), size):
            rows = self._rows(self.prompts[start : start + size])
            hooks = {name: partial(_keep, found, name, rows.places) for point in points for name in self._names(point)}
            with torch.no_grad(), tracing.hooked(self.model, changes(rows)), tracing.hooked(self.model, hooks):
                self.model.logits(rows, at=_last(rows))
        whole = {name: torch.cat(parts)[self._restored()] for name, parts in found.items()}
        return {point: self._value(point, whole) for point in points}

    def _restored(self) -> Tensor:
        """For each prompt given, its row in the order of the runs."""
        place = torch.empty(len(self.order), dtype=torch.long)
        place[torch.tensor(self.order)] = torch.arange(len(self.order))
        return place[self.index]

    def _rows(self, prompts: Sequence[Prompt]) -> Rows:
        width = max(len(prompt.ids) for prompt in prompts)
        padding = self.model.tokenizer.pad_token_id
        padding = unseen_padding(padding) if self.model.causal or padding is None else padding
        ids = torch.full((len(prompts), width), padding)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt.ids)] = torch.tensor(prompt.ids)
            mask[row, : len(prompt.ids)] = 1
        return Rows(ids=ids, attention_mask=mask, places=torch.tensor([prompt.places for prompt in prompts]))

    # --- where the stream is ---------------------------------------------------------------------------------------

    def _names(self, point: Point) -> list[str]:
        if point.layer == EMBEDDING:
            return ["blocks.0.hook_resid_pre"]
        block = f"blocks.{point.layer}"
        if not point.middle:
            return [f"{block}.hook_resid_post"]
        if self.model.parallel:  # the stream without what the MLP adds to it
            return [f"{block}.hook_resid_post", f"{block}.hook_mlp_out"]
        return [f"{block}.hook_resid_mid"]

    def _value(self, point: Point, whole: dict[str, Tensor]) -> Tensor:
        first, *rest = (whole[name] for name in self._names(point))
        return first - rest[0] if rest else first

    # --- attention -------------------------------------------------------------------------------------------------

    def _summing(self, rows: Rows) -> dict[str, tracing.Change]:
        real = rows.attention_mask.bool()
        return {
            f"blocks.{layer}.hook_attn_out": partial(_add, self.sums[layer], real)
            for layer in range(self.model.n_layers)
        }

    def _at_means(self, first: int, rows: Rows) -> dict[str, tracing.Change]:  # noqa: ARG002
        return {
            f"blocks.{layer}.hook_attn_out": partial(_instead, self.means[layer])
            for layer in range(first, self.model.n_layers)
        }


def _keep(found: dict[str, list[Tensor]], name: str, places: Tensor, value: Tensor) -> Tensor:
    rows = torch.arange(len(places), device=value.device)[:, None]
    found.setdefault(name, []).append(value[rows, places.to(value.device)].float().cpu())
    return value


def _add(total: Tensor, real: Bool[Tensor, "row pos"], value: Tensor) -> Tensor:
    total += value[real.to(value.device)].double().sum(0).cpu()
    return value


def _instead(mean: Tensor, value: Tensor) -> Tensor:
    return mean.to(value).expand_as(value)


def _last(rows: Rows) -> Bool[Tensor, "row pos"]:
    """One position a row, so that little is unembedded."""
    at = torch.zeros_like(rows.ids, dtype=torch.bool)
    at[:, 0] = True
    return at


def row_bytes(model: Model, length: int) -> int:
    """What the forward pass of one prompt takes: one block's activations and one row of logits; on the large side."""
    size = torch.finfo(model.dtype).bits // 8
    attention = 2 * model.n_heads * length if attention_of(model) == "eager" else 0
    return length * size * (12 * model.d_model + 4 * model.d_mlp + attention) + 8 * model.vocab_size


# --- prompts ---------------------------------------------------------------------------------------------------------


def in_prompt(model: Model, example: Example) -> Prompt:
    """The prompt up to the answer, read at the last token of the subject and at the token that predicts the answer.

    For a masked model the answer's tokens are masked, and its first one is read.
    """
    assert example.subject is not None
    first = min(example.targets)
    if model.causal:
        return Prompt(ids=example.ids[:first], places=(example.subject.end - 1, first - 1))
    targets = set(example.targets)
    mask = model.tokenizer.mask_token_id
    ids = tuple(mask if position in targets else token for position, token in enumerate(example.ids))
    return Prompt(ids=ids, places=(example.subject.end - 1, first))


def alone(model: Model, example: Example) -> Prompt:
    """The subject's tokens as the whole prompt, between the special tokens that begin (and end) the text."""
    assert example.subject is not None
    special = set(model.tokenizer.all_special_ids)
    begin = next((i for i, token in enumerate(example.ids) if token not in special), 0)
    end = next((i for i, token in enumerate(reversed(example.ids)) if token not in special), 0)
    name = example.ids[example.subject.start : example.subject.end]
    after = () if model.causal else example.ids[len(example.ids) - end :]
    ids = (*example.ids[:begin], *name, *after)
    return Prompt(ids=ids, places=(begin + len(name) - 1,))
