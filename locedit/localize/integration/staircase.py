"""Integrated gradients of all layers, steps and targets of some prompts in one forward and one backward pass.

1. A path scales neurons only at the position that predicts its target, and attention is causal, so keys and values of
   earlier positions are the same on all paths: one ordinary pass over the prompts computes them (the prefix).
2. Every (layer, step, target) is then one *row*: one token at the predicting position, which attends to the prefix and
   to itself.
3. Where a block adds its MLP's output to the residual stream as it is, the rows of a layer enter at the next block,
   with the state that the prefix pass had before the MLP's output plus alpha times what the neurons add. Elsewhere (a
   norm or a factor follows the MLP), and in the last layer, they enter at their own block and have its neurons replaced
   by alpha times their value. Rows of earlier layers are already on their way up: a staircase.
4. Rows are laid along the sequence axis, and a mask gives each row its own part of the prefix, so the prefix is stored
   a few times whatever the number of rows (see `rows`). The model itself is run, on one dummy token: before every block
   the rows take the place of its arguments, and what follows the last block (final norm, unembedding, soft-capping) is
   the model's own.

The result is exact, not an approximation, for every causal model. Rows are divided so that memory stays within a
budget. One row with alpha = 1 a target must give the model's own probability again; if it does not, the architecture
does something that the staircase does not know, and it stops instead of giving wrong scores.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from transformers import DynamicCache

from locedit import tracing
from locedit.data.encode import unseen_padding
from locedit.errors import LoceditError
from locedit.localize.integration.blocks import (
    adds_mlp_output,
    attention_of,
    builds_own_mask,
    row_bytes,
    weights_without_gradient,
)
from locedit.localize.integration.paths import (
    Objective,
    PathSums,
    Prompt,
    gold_log_probability,
    objective_and_slope,
    target_grid,
)
from locedit.localize.integration.quadrature import Rule
from locedit.localize.integration.rows import LONGEST, SHORTEST, Climb, Column, Rows, as_rows, in_sequences, portions
from locedit.models import Model

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
        self.additive = adds_mlp_output(model)
        self.checked = False
        self._run_prefix(prompts)

    # --- the prefix ------------------------------------------------------------------------------------------------

    def _run_prefix(self, prompts: Sequence[Prompt]) -> None:
        """One ordinary pass: keys and values, and at the predicting positions block inputs, neurons and logits."""
        self.filler = unseen_padding(self.model.core.config.pad_token_id)
        ids = padded_ids(prompts, self.model.device, padding=self.filler)
        self.calls: dict[int, dict[str, Any]] = {}
        self.inputs: dict[int, Float[Tensor, "prompt target d_model"]] = {}
        self.neurons: dict[int, Float[Tensor, "prompt target neuron"]] = {}
        self.without: dict[int, Float[Tensor, "prompt target d_model"]] = {}
        "the state after the block if its neurons were 0, for layers whose rows are shifted"
        cache = DynamicCache()  # without a config, or layers with a sliding window would forget the beginning

        def note(layer: int, arguments: dict[str, Any]) -> None:
            self.inputs[layer] = self._at_targets(arguments["hidden_states"])
            self.calls[layer] = {name: v for name, v in arguments.items() if name != "hidden_states"}

        def keep(layer: int, value: Tensor) -> Tensor:
            self.neurons[layer] = self._at_targets(value.reshape(*ids.shape, -1))
            return value

        wanted = torch.zeros_like(ids, dtype=torch.bool)
        wanted[self.prompt, self.positions] = True

        def attended(layer: int, value: Tensor) -> Tensor:
            self.without[layer] = self.inputs[layer] + self._at_targets(value.reshape(*ids.shape, -1))
            return value

        attention = {
            f"blocks.{layer}.hook_attn_out": partial(attended, layer)
            for layer in range(self.model.n_layers)
            if self.shifts(layer)
        }
        with torch.no_grad(), self._hooks(note, keep, attention), tracing.unembed_at(self.model, wanted):
            output = self.model.module(input_ids=ids, past_key_values=cache, use_cache=True)
        self.added = {layer: self._added(layer) for layer in self.without}
        place = wanted.flatten().cumsum(0).reshape(wanted.shape) - 1
        logits = output.logits.reshape(-1, output.logits.shape[-1])[place[self.prompt, self.positions]]
        self.reached = gold_log_probability(logits, self.tokens)
        self.first = logits.argmax(-1) == self.tokens
        self.length = int(self.positions.max())
        layers: list[Any] = cache.layers
        self.keys: list[Tensor] = [layer.keys[:, :, : self.length] for layer in layers]
        self.values: list[Tensor] = [layer.values[:, :, : self.length] for layer in layers]
        self.visible = {layer: self._visible(call.get("attention_mask")) for layer, call in self.calls.items()}

    def shifts(self, layer: int) -> bool:
        """Whether the rows of a layer enter at the next block."""
        return self.additive and layer < self.model.n_layers - 1

    @torch.no_grad()
    def _added(self, layer: int) -> Float[Tensor, "prompt target d_model"]:
        """What the neurons add to the residual stream; the bias goes to the state without them."""
        project = self.model.linear(layer, "mlp.out")
        neurons = self.neurons[layer]
        bias = project(torch.zeros_like(neurons[:1, :1]))
        self.without[layer] = self.without[layer] + bias
        return project(neurons) - bias

    def _at_targets(self, value: Shaped[Tensor, "prompt pos *rest"]) -> Shaped[Tensor, "prompt target *rest"]:
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
        exact = torch.float64 if self.model.dtype == torch.float64 else torch.float32
        device = self.positions.device
        scores = torch.zeros(*active.shape, self.neurons[0].shape[-1], dtype=exact, device=device)
        start = torch.zeros(active.shape, dtype=exact, device=device)
        alphas, weights, at_start, check = self._points(rule)
        columns, checks = self._columns(active.cpu(), len(rule.alphas), at_start=at_start, check=check)
        sequences = in_sequences(columns, rows=min(max(self.length, SHORTEST), LONGEST), also=checks)
        slopes = {
            layer: torch.zeros(*active.shape[:2], self._width(layer), dtype=exact, device=device)
            for layer in range(active.shape[2])
        }
        for portion in portions(sequences, at_most=self._most_rows()):
            rows = as_rows(portion, alphas=alphas, weights=weights, layers=active.shape[2]).to(device)
            climb = Climb(self, rows)
            values, gradients = self._climb(climb)
            for layer, gradient in gradients.items():
                place = (climb.sequence, rows.target[layer])
                slopes[layer].index_put_(place, gradient.to(slopes[layer]), accumulate=True)
            for layer, (target, point) in enumerate(zip(rows.target, rows.point, strict=True)):
                here = (point == at_start).nonzero(as_tuple=True)
                start[rows.prompt[here[0]], target[here], layer] = values[layer][here].to(start)
            self._check(rows, values[0], check=check)
        self.checked = True
        for layer in active.any(0).any(0).nonzero().flatten().tolist():
            scores[:, :, layer] = self._by_neurons(layer, slopes[layer])
        return PathSums(scores=scores, start=start)

    def _width(self, layer: int) -> int:
        return (self.inputs if self.shifts(layer) else self.neurons)[layer].shape[-1]

    def _by_neurons(self, layer: int, slopes: Float[Tensor, "prompt target width"]) -> Tensor:
        """Neurons times gradients; where rows were shifted, those go through the output projection first."""
        neurons = self.neurons[layer]
        if self.shifts(layer):
            with torch.inference_mode(False), torch.enable_grad(), weights_without_gradient(self.model.module):
                leaf = neurons.clone().requires_grad_()
                added = self.model.linear(layer, "mlp.out")(leaf)
                (slopes,) = torch.autograd.grad(added, leaf, grad_outputs=slopes.to(added))
        return neurons.to(self.positions.device, slopes.dtype) * slopes.to(self.positions.device)

    def _points(self, rule: Rule) -> tuple[list[float], list[float], int, int]:
        """Points and weights with the path's ends, where the rule has none, and which points these are."""
        alphas, weights = rule.alphas.tolist(), rule.weights.tolist()
        for end in (0.0, 1.0):
            if end not in alphas:
                alphas, weights = [*alphas, end], [*weights, 0.0]
        return alphas, weights, alphas.index(0.0), alphas.index(1.0)

    def _columns(
        self, active: Bool[Tensor, "prompt target layer"], steps: int, *, at_start: int, check: int
    ) -> tuple[list[Column], list[Column]]:
        """A column for every point of every target with active paths; and the checks, one a prompt, the first time."""
        columns: list[Column] = []
        checks: list[Column] = []
        for prompt, target in active.any(2).nonzero().tolist():
            layers = tuple(active[prompt, target].nonzero().flatten().tolist())
            wanted = sorted({*range(steps), at_start})
            columns += [Column(layers, prompt, target, point) for point in wanted]
            if check >= steps and not self.checked and (not checks or checks[-1].prompt != prompt):
                checks.append(Column((0,), prompt, target, check))
        return columns, checks

    def _most_rows(self) -> int:
        return max(1, self.memory // row_bytes(self.model, self.length))

    def _climb(self, climb: Climb) -> tuple[list[Tensor], dict[int, Tensor]]:
        """The objective of every row, layer by layer, and its weighted gradient by what was scaled."""
        rows = climb.rows
        counts = [target.shape[1] for target in rows.target]

        def scaled(layer: int, value: Tensor) -> Tensor:
            if not counts[layer] or self.shifts(layer):
                return value
            whole = value.reshape(len(rows.prompt), -1, value.shape[-1])
            neurons = climb.of_targets(self.neurons[layer], layer)
            leaf = (rows.alpha[layer].to(neurons.device)[..., None] * neurons).to(value.dtype).requires_grad_()
            climb.leaves[layer] = leaf
            return torch.cat([whole[:, : -counts[layer]], leaf], dim=1).reshape(value.shape)

        dummy = torch.full((1, 1), self.filler, device=self.model.device)
        with torch.inference_mode(False), torch.enable_grad(), self._hooks(climb.enter, scaled):
            logits = self.model.module(input_ids=dummy, use_cache=False).logits
            logits = logits.reshape(*climb.target.shape, -1)
            tokens = self.tokens[climb.sequence, climb.target].to(logits.device)
            weights = torch.cat(rows.weight, dim=1).to(logits.device)
            values, slope = objective_and_slope(logits.detach(), tokens, weights=weights, objective=self.objective)
            gradients = torch.autograd.grad(logits, list(climb.leaves.values()), grad_outputs=slope)
        by_layer = values.to(dummy.device).split(counts, dim=1)
        return list(by_layer), dict(zip(climb.leaves, gradients, strict=True))

    @contextmanager
    def _hooks(
        self, enter: EnterBlock, neurons: ChangeNeurons, others: Mapping[str, tracing.Change] | None = None
    ) -> Generator[None]:
        """Every block's arguments through `enter`, every layer's neurons through `neurons`, no gradients of weights."""
        layers = range(self.model.n_layers)
        names = {f"blocks.{layer}.mlp.hook_post": partial(neurons, layer) for layer in layers} | dict(others or {})
        weights = weights_without_gradient(self.model.module)
        with weights, tracing.rewrite_blocks(self.model, enter), tracing.replace(self.model, names):
            yield

    def _check(self, rows: Rows, values: Float[Tensor, "sequence row"], *, check: int) -> None:
        """A row that enters at layer 0 with alpha = 1 is the model as it is."""
        here = (rows.point[0] == check).nonzero(as_tuple=True)
        expected = self.reached[rows.prompt[here[0]], rows.target[0][here]].to(values)
        found = values[here] if self.objective == "log_probability" else values[here].log()
        allowed = AGREEMENT.get(self.model.dtype, HALF_AGREEMENT)
        if bool(((found - expected).abs() > allowed * expected.abs().clamp(min=1)).any()):
            raise LoceditError(
                f"{type(self.model.core).__name__} does more with earlier positions than attend to their keys and "
                "values, so the fast integrated gradients do not hold for it; localize with path='captum'"
            )


def padded_ids(prompts: Sequence[Prompt], device: torch.device, *, padding: int) -> Int[Tensor, "prompt pos"]:
    """Token ids padded on the right; what stands there is never attended to."""
    ids = [torch.tensor(prompt.ids) for prompt in prompts]
    return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=padding).to(device)
