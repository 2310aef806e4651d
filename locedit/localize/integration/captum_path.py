"""Integrated gradients one layer and one token at a time, with captum: slow, for any model and any positions.

The reference that the fast path is tested against, and the way for masked models, where every position sees every
other, and for paths that scale more positions than the predicting one. The neurons of one layer at the scaled positions
are the input of a function whose value is the objective; captum integrates its gradient.
"""

from collections.abc import Callable, Sequence

import torch
from captum.attr import InputXGradient, IntegratedGradients
from jaxtyping import Bool, Float
from torch import Tensor

from locedit import tracing
from locedit.errors import LoceditError
from locedit.localize.integration.blocks import weights_without_gradient
from locedit.localize.integration.paths import (
    Objective,
    PathSums,
    Prompt,
    gold_log_probability,
    objective_value,
    target_grid,
)
from locedit.localize.integration.quadrature import Rule
from locedit.models import Model

METHODS = {"gauss": "gausslegendre", "right": "riemann_right", "left": "riemann_left"}


class CaptumPaths:
    """All paths of some prompts of any model."""

    def __init__(self, model: Model, prompts: Sequence[Prompt], *, objective: Objective, memory_mb: int) -> None:
        self.model = model
        self.prompts = prompts
        self.objective: Objective = objective
        self.memory = memory_mb * 2**20
        positions, tokens, valid = (t.to(model.device) for t in target_grid(prompts))
        self.positions, self.tokens, self.valid = positions, tokens, valid
        self.neurons: dict[tuple[int, int], Float[Tensor, "pos neuron"]] = {}
        "(prompt, layer) -> the layer's neurons as they are"
        self.reached = torch.zeros(valid.shape, device=model.device, dtype=_precise(model))
        self.first = torch.zeros_like(valid)
        for row in range(len(prompts)):
            self._run_plain(row)

    def _run_plain(self, row: int) -> None:
        ids = self._ids(row)
        names = [_point(layer) for layer in range(self.model.n_layers)]
        with torch.no_grad(), tracing.record(self.model, names) as seen:
            logits = self.model.module(input_ids=ids).logits[0, self.positions[row]]
        self.reached[row] = gold_log_probability(logits, self.tokens[row]).to(self.reached)
        self.first[row] = logits.argmax(-1) == self.tokens[row]
        for layer, name in enumerate(names):
            self.neurons[row, layer] = seen[name].reshape(ids.shape[1], -1)

    def _ids(self, row: int) -> Tensor:
        return torch.tensor([self.prompts[row].ids], device=self.model.device)

    def integrate(self, rule: Rule, active: Bool[Tensor, "prompt target layer"]) -> PathSums:
        """The integrals of the active paths, one after the other."""
        width = self.neurons[0, 0].shape[-1]
        scores = torch.zeros(*active.shape, width, dtype=_precise(self.model), device=self.model.device)
        start = torch.zeros(active.shape, dtype=_precise(self.model), device=self.model.device)
        with torch.inference_mode(False), weights_without_gradient(self.model.module):
            for row, target, layer in active.nonzero().tolist():
                function = self._function(row, target, layer)
                neurons = self._scaled(row, target, layer)
                scores[row, target, layer] = self._attribute(function, neurons, rule, row=row).view(-1, width).sum(0)
                with torch.no_grad():
                    start[row, target, layer] = function(torch.zeros_like(neurons))[0]
        return PathSums(scores=scores, start=start)

    def _scaled(self, row: int, target: int, layer: int) -> Float[Tensor, "1 pos_neuron"]:
        positions = list(self.prompts[row].scaled[target])
        return self.neurons[row, layer][positions].reshape(1, -1)

    def _function(
        self, row: int, target: int, layer: int
    ) -> Callable[[Float[Tensor, "step pos_neuron"]], Float[Tensor, " step"]]:
        """The objective as a function of one layer's neurons at the scaled positions."""
        ids, place = self._ids(row), int(self.positions[row, target])
        positions = torch.tensor(self.prompts[row].scaled[target], device=self.model.device)

        def function(neurons: Tensor) -> Tensor:
            steps = len(neurons)

            def put(value: Tensor) -> Tensor:
                whole = value.reshape(steps, ids.shape[1], -1)
                new = neurons.reshape(steps, len(positions), -1).to(whole)
                return whole.index_copy(1, positions.to(whole.device), new).reshape(value.shape)

            at = torch.zeros((steps, ids.shape[1]), dtype=torch.bool, device=ids.device)
            at[:, place] = True
            with tracing.replace(self.model, {_point(layer): put}), tracing.unembed_at(self.model, at):
                logits = self.model.module(input_ids=ids.expand(steps, -1)).logits.reshape(steps, -1)
            token = self.tokens[row, target].to(logits.device).expand(steps)
            return objective_value(gold_log_probability(logits, token), self.objective)

        return function

    def _attribute(self, function: Callable[[Tensor], Tensor], neurons: Tensor, rule: Rule, *, row: int) -> Tensor:
        """captum's integral. "eleuther" is captum's left rule with one point less, joined with the path's end."""
        if rule.steps < (3 if rule.name == "eleuther" else 2):
            raise LoceditError(f"steps={rule.steps!r} is too few for quadrature={rule.name!r} with path='captum'")
        captum = IntegratedGradients(function, multiply_by_inputs=True)
        size = self._internal_batch(row)

        def integral(method: str, steps: int) -> Tensor:
            found = captum.attribute(neurons, method=method, n_steps=steps, internal_batch_size=size)
            return found.detach()

        if rule.name != "eleuther":
            return integral(METHODS[rule.name], rule.steps)
        end = InputXGradient(function).attribute(neurons.clone().requires_grad_()).detach()
        return ((rule.steps - 1) * integral("riemann_left", rule.steps - 1) + end) / rule.steps

    def _internal_batch(self, row: int) -> int:
        model, length = self.model, len(self.prompts[row].ids)
        size = torch.finfo(model.dtype).bits // 8
        attention = 3 * model.n_heads * length
        one = length * model.n_layers * size * (12 * model.d_model + 4 * model.d_mlp + attention)
        return max(1, self.memory // one)


def _point(layer: int) -> str:
    return f"blocks.{layer}.mlp.hook_post"


def _precise(model: Model) -> torch.dtype:
    return torch.float64 if model.dtype == torch.float64 else torch.float32
