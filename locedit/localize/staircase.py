"""Integrated gradients of all layers, steps and targets of some prompts in one forward and one backward pass.

1. A path scales neurons only at the position that predicts its target, and attention is causal, so keys and values of
   earlier positions are the same on all paths: one ordinary pass over the prompts computes them (the prefix).
2. Every (layer, step, target) is then one *row*: one token at the predicting position, which attends to the prefix and
   to itself.
3. The rows of a layer enter at that layer's input, with the state the prefix pass had there, and have the layer's
   neurons replaced by alpha times their value. Rows of earlier layers are already on their way up: a staircase.
4. Rows are laid along the sequence axis, and a mask gives each row its own part of the prefix, so the prefix is stored
   a few times whatever the number of rows (see `rows`). The model itself is run, on one dummy token: before every block
   the rows take the place of its arguments, and what follows the last block (final norm, unembedding, soft-capping) is
   the model's own.

The result is exact, not an approximation, for every causal model. Rows are divided so that memory stays within a
budget. One row with alpha = 1 a target must give the model's own probability again; if it does not, the architecture
does something that the staircase does not know, and it stops instead of giving wrong scores.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from transformers import DynamicCache

from locedit import tracing
from locedit.errors import LoceditError
from locedit.localize.paths import (
    Objective,
    PathSums,
    Prompt,
    gold_log_probability,
    objective_and_slope,
    target_grid,
)
from locedit.localize.quadrature import Rule
from locedit.localize.rows import LONGEST, SHORTEST, Climb, Column, Rows, as_rows, in_sequences, portions
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
        for portion in portions(sequences, at_most=self._most_rows()):
            rows = as_rows(portion, alphas=alphas, weights=weights, layers=active.shape[2]).to(device)
            climb = Climb(self, rows)
            values, gradients = self._climb(climb)
            for layer, (target, point) in enumerate(zip(rows.target, rows.point, strict=True)):
                scaled = climb.of_targets(self.neurons[layer], layer).to(exact) * gradients[layer].to(exact)
                scores[:, :, layer].index_put_((climb.sequence, target), scaled.to(device), accumulate=True)
                here = (point == at_start).nonzero(as_tuple=True)
                start[rows.prompt[here[0]], target[here], layer] = values[layer][here].to(start)
            self._check(rows, values[0], check=check)
        self.checked = True
        return PathSums(scores=scores, start=start)

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

    def _climb(self, climb: Climb) -> tuple[list[Tensor], list[Tensor]]:
        """The objective of every row and its weighted gradient by the neurons where it entered, layer by layer."""
        rows = climb.rows
        leaves: list[Tensor] = []
        counts = [target.shape[1] for target in rows.target]

        def scaled(layer: int, value: Tensor) -> Tensor:
            if not counts[layer]:
                return value
            whole = value.reshape(len(rows.prompt), -1, value.shape[-1])
            neurons = climb.of_targets(self.neurons[layer], layer)
            leaf = (rows.alpha[layer].to(neurons.device)[..., None] * neurons).to(value.dtype).requires_grad_()
            leaves.append(leaf)
            return torch.cat([whole[:, : -counts[layer]], leaf], dim=1).reshape(value.shape)

        dummy = torch.zeros((1, 1), dtype=torch.long, device=self.model.device)
        with torch.inference_mode(False), torch.enable_grad(), self._hooks(climb.enter, scaled):
            logits = self.model.module(input_ids=dummy, use_cache=False).logits
            logits = logits.reshape(*climb.target.shape, -1)
            tokens = self.tokens[climb.sequence, climb.target].to(logits.device)
            weights = torch.cat(rows.weight, dim=1).to(logits.device)
            values, slope = objective_and_slope(logits.detach(), tokens, weights=weights, objective=self.objective)
            gradients = iter(torch.autograd.grad(logits, leaves, grad_outputs=slope))
        nothing = torch.zeros(len(rows.prompt), 0, self.neurons[0].shape[-1], device=dummy.device)
        by_layer = values.to(dummy.device).split(counts, dim=1)
        return list(by_layer), [next(gradients) if n else nothing for n in counts]

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


def builds_own_mask(module: nn.Module) -> bool:
    """Whether an attention builds a window from the number of its keys (GPT-Neo's local layers).

    Then rows cannot share the sequence axis.
    """
    config: Any = getattr(module, "config", None)
    return "local" in (getattr(config, "attention_layers", None) or ())


def row_bytes(model: Model, length: int) -> int:
    """What autograd keeps of a row, its share of a prefix of that length, and its logits; on the large side."""
    size = torch.finfo(model.dtype).bits // 8
    rows = min(max(length, SHORTEST), LONGEST)
    keys = length + rows
    attention = keys * (3 * model.n_heads if attention_of(model) == "eager" else 2)
    copies = keys if builds_own_mask(model.module) else 2 * keys / rows
    attention += int(copies * 2 * model.n_heads * model.d_head)
    return model.n_layers * size * (12 * model.d_model + 4 * model.d_mlp + attention) + 16 * model.vocab_size


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
