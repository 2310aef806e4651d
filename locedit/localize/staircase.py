"""Integrated gradients of all layers, steps and targets of some prompts in one forward and one backward pass.

1. A path scales neurons only at the position that predicts its target, and attention is causal, so keys and values of
   earlier positions are the same on all paths: one ordinary pass over the prompts computes them (the prefix).
2. Every (layer, step, target) is then one *row*: one token at the predicting position, which attends to the prefix and
   to itself.
3. The rows of a layer enter at that layer's input, with the state the prefix pass had there, and have the layer's
   neurons replaced by alpha times their value. Rows of earlier layers are already on their way up: a staircase.
4. Rows are laid along the sequence axis, and a mask gives each row its own part of the prefix, so the prefix is stored
   once whatever the number of rows. The model itself is run, on one dummy token: before every block the rows take the
   place of its arguments, and what follows the last block (final norm, unembedding, soft-capping) is the model's own.

The result is exact, not an approximation, for every causal model. Rows are divided so that memory stays within a
budget. One row with alpha = 1 a target must give the model's own probability again; if it does not, the architecture
does something that the staircase does not know, and it stops instead of giving wrong scores.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from locedit import tracing
from locedit.errors import LoceditError
from locedit.localize.paths import (
    Objective,
    PathSums,
    Prompt,
    gold_log_probability,
    objective_value,
    target_grid,
)
from locedit.localize.quadrature import Rule
from locedit.localize.rows import Climb, Rows
from locedit.models import Model

MOST_ROWS = 512
"rows in one pass for one prompt; every row has a key of its own, so attention among rows grows with their square"
AGREEMENT = {torch.float64: 1e-4, torch.float32: 1e-2}
"""largest difference in log-probability, relative where above 1, between a row with alpha = 1 and the model; in half
precision HALF_AGREEMENT"""
HALF_AGREEMENT = 0.3
EnterBlock = Callable[[int, dict[str, Any]], dict[str, Any] | None]
ChangeNeurons = Callable[[int, Tensor], Tensor]


class Staircase:
    """All paths of some prompts of a causal model. The first thing it does is the prefix pass."""

    def __init__(self, model: Model, prompts: Sequence[Prompt], *, objective: Objective, memory_mb: int) -> None:
        self.model = model
        self.objective: Objective = objective
        self.memory = memory_mb * 2**20
        positions, tokens, valid = target_grid(prompts)
        self.positions, self.tokens, self.valid = (t.to(model.device) for t in (positions, tokens, valid))
        self.prompt = torch.arange(len(prompts), device=model.device)[:, None]
        self.own_mask = builds_own_mask(model.module)
        self.checked = False
        self._run_prefix(prompts)

    # --- the prefix ------------------------------------------------------------------------------------------------

    def _run_prefix(self, prompts: Sequence[Prompt]) -> None:
        """One ordinary pass: keys and values, and at the predicting positions block inputs, neurons and logits."""
        ids = padded_ids(prompts, self.model.device)
        self.calls: dict[int, dict[str, Any]] = {}
        self.inputs: dict[int, Float[Tensor, "prompt target d_model"]] = {}
        self.neurons: dict[int, Float[Tensor, "prompt target neuron"]] = {}
        cache = DynamicCache()  # without a config, or layers with a sliding window would forget the beginning

        def note(layer: int, arguments: dict[str, Any]) -> None:
            self.inputs[layer] = self._at_targets(arguments["hidden_states"])
            self.calls[layer] = {name: v for name, v in arguments.items() if name != "hidden_states"}

        def keep(layer: int, value: Tensor) -> Tensor:
            self.neurons[layer] = self._at_targets(value.reshape(*ids.shape, -1))
            return value

        wanted = torch.zeros_like(ids, dtype=torch.bool)
        wanted[self.prompt, self.positions] = True
        with torch.no_grad(), self._hooks(note, keep), tracing.unembed_at(self.model, wanted):
            output = self.model.module(input_ids=ids, past_key_values=cache, use_cache=True)
        place = wanted.flatten().cumsum(0).reshape(wanted.shape) - 1
        logits = output.logits.reshape(-1, output.logits.shape[-1])[place[self.prompt, self.positions]]
        self.reached = gold_log_probability(logits, self.tokens)
        self.first = logits.argmax(-1) == self.tokens
        self.length = int(self.positions.max())
        layers: list[Any] = cache.layers
        self.keys: list[Tensor] = [layer.keys[:, :, : self.length] for layer in layers]
        self.values: list[Tensor] = [layer.values[:, :, : self.length] for layer in layers]
        self.visible = {layer: self._visible(call.get("attention_mask")) for layer, call in self.calls.items()}

    def _at_targets(self, value: Float[Tensor, "prompt pos *rest"]) -> Float[Tensor, "prompt target *rest"]:
        device = value.device
        return value[self.prompt.to(device), self.positions.to(device)].detach()

    def _visible(self, mask: Any) -> Bool[Tensor, "prompt target prefix"]:
        """Which earlier keys each target's position attends to, read off the mask that the model itself made."""
        keys = torch.arange(self.length, device=self.positions.device)
        earlier = keys < self.positions[:, :, None]
        if mask is None:  # plain causal attention
            return earlier
        if not isinstance(mask, Tensor) or mask.ndim != 4:
            raise LoceditError(
                f"attention {attention_of(self.model)!r} makes no mask that can be read; load the "
                "model with attn_implementation='sdpa' or 'eager', or localize with path='captum'"
            )
        allowed = mask if mask.dtype == torch.bool else mask == 0
        allowed = self._at_targets(allowed[:, 0].expand(len(self.prompt), -1, -1))[..., : self.length]
        return earlier & allowed.to(earlier.device)

    # --- rows ------------------------------------------------------------------------------------------------------

    def integrate(self, rule: Rule, active: Bool[Tensor, "prompt target layer"]) -> PathSums:
        """The integrals of the active paths."""
        active = active.to(self.positions.device)
        exact = torch.float64 if self.model.dtype == torch.float64 else torch.float32
        neurons = self.neurons[0].shape[-1]
        scores = torch.zeros(*active.shape, neurons, dtype=exact, device=active.device)
        start = torch.zeros(active.shape, dtype=exact, device=active.device)
        for rows in self._passes(rule, active):
            values, gradients = self._climb(rows)
            for layer, (target, point) in enumerate(zip(rows.target, rows.point, strict=True)):
                if not len(target):
                    continue
                scaled = self.neurons[layer][:, target].to(exact) * gradients[layer].to(exact)
                scores[:, :, layer].index_add_(1, target, scaled.to(active.device))
                at_start = point == rule.steps
                start[:, target[at_start], layer] = values[layer][:, at_start].to(exact)
                self._check(values[layer], target=target, point=point, check=rule.steps + 1)
        self.checked = True
        return PathSums(scores=scores * active[..., None], start=start * active)

    def _passes(self, rule: Rule, active: Bool[Tensor, "prompt target layer"]) -> Iterator[Rows]:
        """Rows in portions that fit the memory, every portion with all layers of its (target, point) pairs."""
        alphas = [*rule.alphas.tolist(), 0.0, 1.0]
        weights = [*rule.weights.tolist(), 0.0, 0.0]
        layers = active.any(0)  # [target, layer]
        chosen: list[tuple[int, int, list[int]]] = []
        limit, count = self._most_rows(), 0
        for target in layers.any(1).nonzero().flatten().tolist():
            wanted = layers[target].nonzero().flatten().tolist()
            for point in range(rule.steps + (1 if self.checked else 2)):
                entering = [0] if point == rule.steps + 1 else wanted
                if chosen and count + len(entering) > limit:
                    yield self._rows(chosen, alphas=alphas, weights=weights, active=active)
                    chosen, count = [], 0
                chosen.append((target, point, entering))
                count += len(entering)
        if chosen:
            yield self._rows(chosen, alphas=alphas, weights=weights, active=active)

    def _rows(
        self, chosen: list[tuple[int, int, list[int]]], *, alphas: list[float], weights: list[float], active: Tensor
    ) -> Rows:
        device = active.device
        target, point, alpha, weight = [], [], [], []
        for layer in range(active.shape[2]):
            here = [(t, p) for t, p, layers in chosen if layer in layers]
            targets = torch.tensor([t for t, _ in here], dtype=torch.long, device=device)
            target.append(targets)
            point.append(torch.tensor([p for _, p in here], dtype=torch.long, device=device))
            alpha.append(torch.tensor([alphas[p] for _, p in here], dtype=torch.float64, device=device))
            step = torch.tensor([weights[p] for _, p in here], dtype=torch.float64, device=device)
            weight.append(step * active[:, targets, layer])
        return Rows(target=target, alpha=alpha, weight=weight, point=point)

    def _most_rows(self) -> int:
        """How many rows of one prompt fit into the memory: what autograd keeps of a row, and its logits."""
        model, prompts = self.model, len(self.prompt)
        size = torch.finfo(model.dtype).bits // 8
        keys = self.length + MOST_ROWS
        eager = attention_of(model) == "eager"
        attention = keys * (3 * model.n_heads if eager else 2)
        if self.own_mask:
            attention += 2 * keys * model.n_heads * model.d_head
        row = model.n_layers * size * (12 * model.d_model + 4 * model.d_mlp + attention) + 16 * model.vocab_size
        return max(model.n_layers, min(MOST_ROWS, self.memory // (row * prompts)))

    def _climb(self, rows: Rows) -> tuple[list[Tensor], list[Tensor]]:
        """The objective of every row and its weighted gradient by the neurons where it entered, layer by layer."""
        leaves: list[Tensor] = []
        counts = [len(target) for target in rows.target]
        order = torch.cat(rows.target)  # target of each row, in the order of entrance
        climb = Climb(self, rows)

        def scaled(layer: int, value: Tensor) -> Tensor:
            if not counts[layer]:
                return value
            whole = value.reshape(len(self.prompt), -1, value.shape[-1])
            neurons = self.neurons[layer][:, rows.target[layer]]
            leaf = (rows.alpha[layer][:, None].to(neurons.device) * neurons).to(value.dtype).requires_grad_()
            leaves.append(leaf)
            return torch.cat([whole[:, : -counts[layer]], leaf], dim=1).reshape(value.shape)

        dummy = torch.zeros((1, 1), dtype=torch.long, device=self.model.device)
        with torch.inference_mode(False), torch.enable_grad(), self._hooks(climb.enter, scaled):
            logits = self.model.module(input_ids=dummy, use_cache=False).logits
            logits = logits.reshape(len(self.prompt), len(order), -1)
            tokens = self.tokens[:, order].to(logits.device)
            values = objective_value(gold_log_probability(logits, tokens), self.objective)
            weights = torch.cat(rows.weight, dim=1).to(values)
            gradients = iter(torch.autograd.grad((values * weights).sum(), leaves))
        nothing = torch.empty(0)
        return list(values.detach().split(counts, dim=1)), [next(gradients) if n else nothing for n in counts]

    @contextmanager
    def _hooks(self, enter: EnterBlock, neurons: ChangeNeurons) -> Generator[None]:
        """Every block's arguments through `enter`, every layer's neurons through `neurons`, no gradients of weights."""
        names = {
            f"blocks.{layer}.mlp.hook_post": (lambda value, layer=layer: neurons(layer, value))
            for layer in range(self.model.n_layers)
        }
        weights = weights_without_gradient(self.model.module)
        with weights, tracing.rewrite_blocks(self.model, enter), tracing.replace(self.model, names):
            yield

    def _check(self, values: Tensor, *, target: Tensor, point: Tensor, check: int) -> None:
        """A row with alpha = 1 is the model as it is."""
        here = point == check
        if not bool(here.any()):
            return
        expected = self.reached[:, target[here]].to(values.device)
        found = values[:, here] if self.objective == "log_probability" else values[:, here].log()
        allowed = AGREEMENT.get(self.model.dtype, HALF_AGREEMENT)
        if bool(((found - expected).abs() > allowed * expected.abs().clamp(min=1)).any()):
            raise LoceditError(
                f"{type(self.model.core).__name__} does more with earlier positions than attend to their keys and "
                "values, so the fast integrated gradients do not hold for it; localize with path='captum'"
            )


def builds_own_mask(module: nn.Module) -> bool:
    """Whether an attention builds a window from the number of its keys (GPT-Neo's local layers).

    Then rows cannot share the sequence axis.
    """
    config: Any = getattr(module, "config", None)
    return "local" in (getattr(config, "attention_layers", None) or ())


def attention_of(model: Model) -> str:
    """Name of the attention implementation: sdpa, eager, ..."""
    return str(getattr(model.core.config, "_attn_implementation", None))


def padded_ids(prompts: Sequence[Prompt], device: torch.device) -> Int[Tensor, "prompt pos"]:
    """Token ids padded on the right; what stands there is never attended to."""
    ids = [torch.tensor(prompt.ids) for prompt in prompts]
    return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)


@contextmanager
def weights_without_gradient(module: nn.Module) -> Generator[None]:
    """Inside, no parameter asks for a gradient, so that autograd keeps only what the rows need."""
    asking = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
