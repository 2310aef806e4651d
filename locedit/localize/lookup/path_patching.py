"""Path patching: what a component does along some paths only, many components and items in one forward pass.

In a corrupt run the senders (embedding, attention heads, MLPs) give what they gave in the clean run. Up to the
receiver, all other heads give what they gave in the corrupt run, and so do the MLPs if they are frozen; if they are
free they answer to what reaches them. From the receiver on everything runs as usual (Wang et al. 2022,
arXiv:2211.00593; Goldowsky-Dill et al. 2023, arXiv:2304.05969). The receiver is the residual stream before a layer, at
all positions, or the stream after the last layer, from which the logits are made.

A *row* is one sender (or several at once) on one item. Below the receiver no head answers to anything, so:

- A row is the corrupt run itself up to its lowest sender and enters there: rows join block by block.
- Nothing moves between positions below the receiver. If the receiver is the end, rows are one position long.
- If MLPs are frozen too, what MLPs and the embedding send arrives as it is: the row is the corrupt stream before the
  receiver plus the senders' difference, and enters there (the skip path). This needs a stream that adds what MLPs
  give; `refuse` says where it does not.

So there is no run for each head or MLP. The model itself is run, on a single row of dummy tokens until the first rows
take its place; norms, rotations, masks and caps are its own.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from locedit import tracing
from locedit.data.encode import unseen_padding
from locedit.errors import LoceditError
from locedit.localize.integration.blocks import attention_of
from locedit.localize.patching.noise import corrupted
from locedit.localize.patching.pairs import PairBatch
from locedit.models import Model

Mlps = Literal["free", "frozen"]
Measure = Callable[[Tensor, Tensor], Tensor]
"(logits [row, vocab], item of each row) -> [row, measure]"


class Node(NamedTuple):
    """Something that writes into the residual stream."""

    kind: Literal["embed", "head", "mlp"]
    layer: int = 0
    head: int = 0


Sender = tuple[Node, ...]
"nodes that are patched together; empty = the corrupt run"


@dataclass(frozen=True, kw_only=True, eq=False)
class Runs:
    """What was recorded of one batch: hook name -> `[item, pos, ...]`, all positions or only the measured one."""

    clean: dict[str, Tensor]
    corrupt: dict[str, Tensor]
    at: Bool[Tensor, "item pos"]
    "the measured position among those kept"


def refuse(model: Model) -> None:
    """One line for models on which path patching has no exact meaning."""
    if model.anatomy.post_norm:
        raise LoceditError(
            f"{type(model.core).__name__} normalises the stream after every sum (post-norm), so no path skips a layer "
            "and path patching has no exact meaning; use by='probe'"
        )
    if not model.causal:
        raise LoceditError(f"path patching needs a causal model; {model.name} is not one: use by='probe'")
    apart = _apart(model)
    if apart > (0.1 if torch.finfo(model.dtype).bits < 32 else 1e-3):
        raise LoceditError(
            f"the blocks of {type(model.core).__name__} do not add what attention and MLP give to the stream "
            f"(relative difference {apart:.2g}), so path patching would not be exact; use by='probe'"
        )


def _apart(model: Model) -> float:
    """How far blocks are from input + attention + MLP = output, relative to what the MLP adds; measured."""
    words = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post")
    names = {word: [f"blocks.{layer}.{word}" for layer in range(model.n_layers)] for word in words}
    with torch.no_grad(), tracing.record(model, [n for group in names.values() for n in group]) as seen:
        model.module(input_ids=_dummy(model, 1), use_cache=False)
    found: list[float] = []
    for layer in range(model.n_layers):
        pre, attention, mlp, post = (seen[names[word][layer]].flatten().double().cpu() for word in words)
        found.append(float((pre + attention + mlp - post).norm() / mlp.norm().clamp(min=1e-30)))
    return max(found)


def path_patch(
    model: Model,
    batch: PairBatch,
    senders: Sequence[Sender],
    *,
    receiver: int,
    mlps: Mlps,
    measure: Measure,
    rows: int,
) -> Float[Tensor, "sender item measure"]:
    """`measure` of the logits at each item's measured position, for every sender, on the CPU.

    Args:
        receiver: the layer before which the stream receives; n_layers = the stream after the last one. Nodes at or
            above it have no path to it and change nothing, to the last bit.
        rows: rows of one forward pass, at most.
    """
    below = [tuple(node for node in sender if _enters(node) < receiver) for sender in senders]
    apart = list(dict.fromkeys(below))  # run once: the same row in another pass differs in its last bits
    plan = _Plan(model, apart, receiver=receiver, mlps=mlps)
    runs = _record(model, batch, plan)
    order = sorted((plan.entry[s], s, item) for s in range(len(apart)) for item in range(len(batch)))
    found: dict[tuple[int, int], Tensor] = {}
    for start in range(0, len(order), rows):
        part = order[start : start + rows]
        one = _Pass(model, plan, runs, part)
        values = measure(one.logits(), one.item).cpu()
        found |= {(s, item): value for (_, s, item), value in zip(part, values, strict=True)}
    each = [torch.stack([found[s, item] for item in range(len(batch))]) for s in range(len(apart))]
    return torch.stack([each[apart.index(sender)] for sender in below])


def _enters(node: Node) -> int:
    return -1 if node.kind == "embed" else node.layer


class _Plan:
    """Where the rows of each sender enter, and what has to be recorded for them."""

    def __init__(self, model: Model, senders: Sequence[Sender], *, receiver: int, mlps: Mlps) -> None:
        self.senders = senders
        self.receiver = receiver
        self.frozen = mlps == "frozen"
        self.whole = receiver < model.n_layers
        "all positions are needed"
        self.skips = [self.frozen and self.whole and all(node.kind != "head" for node in sender) for sender in senders]
        lowest = min((node.layer for sender in senders for node in sender), default=0)
        self.entry = [
            receiver if skips else min((node.layer for node in sender), default=lowest)
            for sender, skips in zip(senders, self.skips, strict=True)
        ]
        self.clean, self.corrupt = self._names()

    def _names(self) -> tuple[set[str], set[str]]:
        """Hook names of the clean and of the corrupt run."""
        clean = {_name(node) for sender in self.senders for node in sender}
        corrupt = {f"blocks.{layer}.hook_resid_pre" for layer in self.entry}
        for sender, skips, entry in zip(self.senders, self.skips, self.entry, strict=True):
            if skips:
                corrupt |= {_name(node) for node in sender}
            else:
                layers = range(entry, self.receiver)
                corrupt |= {f"blocks.{layer}.attn.hook_z" for layer in layers}
                corrupt |= {f"blocks.{layer}.hook_mlp_out" for layer in layers if self.frozen}
        return clean, corrupt


def _name(node: Node) -> str:
    """Where a node's output is."""
    if node.kind == "embed":
        return "blocks.0.hook_resid_pre"
    return f"blocks.{node.layer}.{'attn.hook_z' if node.kind == 'head' else 'hook_mlp_out'}"


def _record(model: Model, batch: PairBatch, plan: _Plan) -> Runs:
    """One clean and one corrupt run."""
    kept: list[dict[str, Tensor]] = []
    pick = None if plan.whole else batch.at
    for names, tokens, context in (
        (plan.clean, batch.clean, None),
        (plan.corrupt, batch.corrupt, corrupted(model, batch)),
    ):
        seen: dict[str, Tensor] = {}
        hooks = {name: partial(_keep, seen, name, pick) for name in names}
        with ExitStack() as stack, torch.no_grad():
            if context is not None:
                stack.enter_context(context)
            stack.enter_context(tracing.hooked(model, hooks, strict=False))
            if hooks:
                model.logits(tokens, at=batch.at)
        kept.append(seen)
    at = batch.at if plan.whole else torch.ones(len(batch), 1, dtype=torch.bool)
    return Runs(clean=kept[0], corrupt=kept[1], at=at.to(model.device))


def _keep(seen: dict[str, Tensor], name: str, at: Tensor | None, value: Tensor) -> Tensor:
    seen[name] = value if at is None else value[at.to(value.device)][:, None]
    return value


class _Pass:
    """Some rows in one forward pass."""

    def __init__(self, model: Model, plan: _Plan, runs: Runs, part: Sequence[tuple[int, int, int]]) -> None:
        self.model = model
        self.plan = plan
        self.runs = runs
        self.senders = [plan.senders[s] for _, s, _ in part]
        self.skips = [plan.skips[s] for _, s, _ in part]
        self.entry = [layer for layer, _, _ in part]
        "ascending"
        self.item: Int[Tensor, " row"] = torch.tensor([item for _, _, item in part], device=model.device)

    def logits(self) -> Float[Tensor, "row vocab"]:
        """The logits of every row at its item's measured position."""
        layers = range(min(self.entry), self.plan.receiver)
        hooks = {f"blocks.{layer}.attn.hook_z": partial(self._heads, layer) for layer in layers}
        hooks |= {f"blocks.{layer}.hook_mlp_out": partial(self._mlp, layer) for layer in layers}
        at = self.runs.at[self.item]
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(tracing.rewrite_blocks(self.model, self._enter))
            stack.enter_context(tracing.hooked(self.model, hooks))
            stack.enter_context(tracing.unembed_at(self.model, at))
            return self.model.module(input_ids=_dummy(self.model, at.shape[1]), use_cache=False).logits

    def _enter(self, layer: int, arguments: dict[str, Any]) -> dict[str, Any] | None:
        """Add the rows that begin at this block."""
        begin, end = bisect_left(self.entry, layer), bisect_right(self.entry, layer)
        if begin == end:
            return None
        new = self._states(layer, begin, end)
        if begin:
            new = torch.cat([arguments["hidden_states"], new.to(arguments["hidden_states"])])
        return arguments | {"hidden_states": new}

    def _states(self, layer: int, begin: int, end: int) -> Float[Tensor, "row pos d_model"]:
        """The corrupt stream before the block; with what arrives by the skip path; or the clean embedding."""
        item = self.item[begin:end]
        value = self.runs.corrupt[f"blocks.{layer}.hook_resid_pre"]
        value = value[item.to(value.device)]
        for place, row in enumerate(range(begin, end)):
            for node in self.senders[row]:
                if self.skips[row] or node.kind == "embed":
                    clean, corrupt = (side[_name(node)] for side in (self.runs.clean, self.runs.corrupt))
                    one = self.item[row].to(clean.device)
                    value[place] += (clean[one] - corrupt[one]).to(value)
        return value

    def _inside(self, layer: int) -> int:
        """How many rows have begun at or below a layer."""
        return bisect_right(self.entry, layer)

    def _heads(self, layer: int, value: Tensor) -> Tensor:
        """All heads as in the corrupt run, the senders as in the clean one."""
        if not (count := self._inside(layer)):
            return value
        item = self.item[:count].to(value.device)
        frozen = self.runs.corrupt[f"blocks.{layer}.attn.hook_z"][item]
        places = self._places("head", layer, count)
        if places:
            row, head = (torch.tensor(column, device=value.device) for column in zip(*places, strict=True))
            frozen[row, :, head] = self.runs.clean[f"blocks.{layer}.attn.hook_z"][item[row], :, head]
        return frozen

    def _mlp(self, layer: int, value: Tensor) -> Tensor:
        """The senders as in the clean run, the others free or as in the corrupt run."""
        if not (count := self._inside(layer)):
            return value
        item = self.item[:count].to(value.device)
        places = self._places("mlp", layer, count)
        if self.plan.frozen:
            value = self.runs.corrupt[f"blocks.{layer}.hook_mlp_out"][item]
        if places:
            row = torch.tensor([row for row, _ in places], device=value.device)
            value = value.index_copy(0, row, self.runs.clean[f"blocks.{layer}.hook_mlp_out"][item[row]])
        return value

    def _places(self, kind: str, layer: int, count: int) -> list[tuple[int, int]]:
        """(row, head) of the nodes of that kind in a layer."""
        return [
            (row, node.head)
            for row in range(count)
            for node in self.senders[row]
            if node.kind == kind and node.layer == layer
        ]


def _dummy(model: Model, length: int) -> Int[Tensor, "1 pos"]:
    padding = unseen_padding(model.core.config.pad_token_id)
    return torch.full((1, length), padding, device=model.device)


def row_bytes(model: Model, length: int) -> int:
    """What a row of that many positions takes in a forward pass, with its logits; on the large side."""
    size = torch.finfo(model.dtype).bits // 8
    eager = attention_of(model) == "eager"
    attention = 4 * model.n_heads * model.d_head + (2 * model.n_heads * length if eager else 0)
    return length * size * (8 * model.d_model + 4 * model.d_mlp + attention) + 3 * size * model.vocab_size
