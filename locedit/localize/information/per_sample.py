"""Every example's own squared gradient, from one forward and one backward pass over a batch.

The weights are frozen, so that autograd computes gradients of activations only. Every call of a module with weights
gives its input x and the gradient d of its output, and these give each example's gradient of the weight, because the
loss of an example depends only on its own rows: x.T @ d summed over its positions for a linear map, the rows of d added
up by token for an embedding, the sum of d times what the gain multiplies for a norm (Goodfellow 2015, arXiv:1510.01799,
for the linear map). They are squared as soon as the backward pass has made them and never kept.

A matrix that is used more than once (tied embeddings, a module called twice) is joined before it is squared. Which
parameters are followed in this way is measured once for each model on two examples, against a backward pass for each;
for the others (experts of a mixture) that is what is done: exact as well, one pass for each example.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from locedit import tracing
from locedit.data.encode import Batch, Example, collate
from locedit.errors import LoceditError
from locedit.localize.information.members import Members
from locedit.localize.information.readers import Kept, Read, precise, reader_of
from locedit.localize.information.squares import Part, Piece, Squares
from locedit.localize.integration.blocks import weights_without_gradient
from locedit.models import Model

Loss = Callable[[Batch], Float[Tensor, " examples"]]
"the loss of each example of a batch"
Keep = Mapping[str, Iterable[Part]]
"parameter name -> what is kept of its squares"
_FOLLOWED: WeakKeyDictionary[Model, dict[str, bool]] = WeakKeyDictionary()
"what was measured: parameter name -> whether its calls give its gradient"


class SquaredGradients:
    """Mean over the examples of the squared gradients of some parameters. All results are on the model's devices."""

    def __init__(self, model: Model, keep: Keep, *, loss: Loss) -> None:
        self.model = model
        self.loss = loss
        self.keep = keep
        self.squares = squares_of(model, keep)
        self.count = 0
        self.slow: frozenset[str] | None = None
        "parameters that take one backward pass for each example; None = not known yet"

    def update(self, batch: Batch) -> Float[Tensor, " examples"]:
        """Add the examples of a batch; their losses."""
        with torch.inference_mode(False), torch.enable_grad(), weights_without_gradient(self.model.module):
            if self.slow is None:
                self.slow = _slow(self.model, self.keep, batch.examples, loss=self.loss)
            followed = {name: squares for name, squares in self.squares.items() if name not in self.slow}
            losses = self._pass(followed, batch) if followed else None
            if self.slow:
                slow = {name: squares for name, squares in self.squares.items() if name in self.slow}
                alone = one_by_one(self.model, slow, batch.examples, loss=self.loss)
                losses = alone if losses is None else losses
        self.count += len(batch.examples)
        assert losses is not None
        return losses

    def _pass(self, squares: Mapping[str, Squares], batch: Batch) -> Float[Tensor, " examples"]:
        passed = _Pass(self.model, squares, batch)
        losses = passed.run(self.loss)
        if passed.unclear:
            raise LoceditError(
                f"{self.model.name}: {min(passed.unclear)} cannot be scored: its module mixes the examples of a batch, "
                "of this one though not of the two examples tried first"
            )
        return losses

    def finish(self) -> dict[str, Squares]:
        """The means."""
        for squares in self.squares.values():
            squares.divide(self.count)
        return self.squares


def squares_of(model: Model, keep: Keep, *, device: str | None = None) -> dict[str, Squares]:
    """Sums at zero for the parameters, in float32, or float64 for a float64 model; where they are, or on a device."""
    parameters = {name: model.parameter(name) for name in keep}
    return {
        name: Squares(tuple(p.shape), keep[name], dtype=precise(p), device=torch.device(device or p.device))
        for name, p in parameters.items()
    }


def one_by_one(
    model: Model, squares: Mapping[str, Squares], examples: Sequence[Example], *, loss: Loss
) -> Float[Tensor, " examples"]:
    """Add the examples' squared gradients with one forward and one backward pass for each; their losses."""
    found: list[Tensor] = []
    parameters = {name: model.parameter(name) for name in squares}
    for example in examples:
        with tracing.weight_gradients(parameters, lambda name, gradient: squares[name].add_gradient(gradient)):
            value = loss(collate([example], model))
            value.sum().backward()
        found.append(value.detach())
    return torch.cat(found)


class _Pass:
    """One forward and one backward pass. A parameter's pieces wait until all its calls have given theirs."""

    def __init__(self, model: Model, squares: Mapping[str, Squares], batch: Batch) -> None:
        self.model = model
        self.batch = batch
        self.squares = squares
        self.members = Members(batch, causal=model.causal, device=model.device)
        self.waiting = dict.fromkeys(squares, 0)
        "calls whose gradient is still to come"
        self.pieces: dict[str, list[Piece]] = {name: [] for name in squares}
        self.called: set[str] = set()
        self.unclear: set[str] = set()
        "parameters with a call whose positions do not say which example they belong to"

    def run(self, loss: Loss) -> Float[Tensor, " examples"]:
        with tracing.calls(self._modules(), rows=len(self.batch)):
            losses = loss(self.batch)
            losses.sum().backward()
        for name in self.squares:  # calls that the loss does not depend on
            self._add(name)
        return losses.detach()

    def _modules(self) -> list[tuple[nn.Module, Callable[[Tensor], Callable[[Tensor], None]]]]:
        names = {id(self.model.parameter(name)): name for name in self.squares}
        found: list[tuple[nn.Module, Callable[[Tensor], Callable[[Tensor], None]]]] = []
        for module in self.model.core.modules():
            own = {key: names[id(p)] for key, p in module.named_parameters(recurse=False) if id(p) in names}
            if own and (read := reader_of(module)) is not None:
                found.append((module, partial(self._call, module, own, read)))
        return found

    def _call(self, module: nn.Module, own: dict[str, str], read: Read, given: Tensor) -> Callable[[Tensor], None]:
        for name in own.values():
            self.waiting[name] += 1
            self.called.add(name)
        return partial(self._back, own, [read(module, tuple(own), given)])

    def _back(self, own: dict[str, str], kept: list[Kept], gradient: Tensor) -> None:
        call = kept.pop()  # each call is heard once
        if not self.members.knows(gradient):
            self.unclear.update(own.values())
            return
        made = call.pieces(self.members, gradient.to(precise(gradient)))
        for key, name in own.items():
            self.pieces[name].append(made[key])
            self.waiting[name] -= 1
            if not self.waiting[name]:
                self._add(name)

    def _add(self, name: str) -> None:
        if pieces := self.pieces[name]:
            self.squares[name].add(pieces)
            self.pieces[name] = []


# --- what cannot be followed -----------------------------------------------------------------------------------------


def _slow(model: Model, keep: Keep, examples: Sequence[Example], *, loss: Loss) -> frozenset[str]:
    """The parameters whose gradient is not the one that a plain backward pass gives, measured on two examples.

    One that no call uses and that has no gradient either is nowhere in the model's output.
    """
    known = _FOLLOWED.setdefault(model, {})
    if new := [name for name in keep if name not in known]:
        known.update(_measured(model, new, min(examples, key=lambda example: len(example.ids)), loss=loss))
    return frozenset(name for name in keep if not known[name])


def _measured(model: Model, names: Sequence[str], example: Example, *, loss: Loss) -> dict[str, bool]:
    two = [example, replace(example, ids=example.ids[::-1])]
    axes = {name: range(model.parameter(name).ndim) for name in names}
    fast, plain = squares_of(model, axes), squares_of(model, axes)
    passed = _Pass(model, fast, collate(two, model))
    passed.run(loss)
    one_by_one(model, plain, two, loss=loss)
    largest = max(float(value.max()) for squares in plain.values() for value in squares.sums.values())
    tolerance = 0.05 if torch.finfo(model.dtype).bits < 32 else 1e-3
    read = passed.called - passed.unclear
    return {
        name: (name in read or 0 == float(plain[name].total()) < largest)
        and all(_close(value, plain[name].sums[part], tolerance, largest) for part, value in fast[name].sums.items())
        for name in names
    }


def _close(found: Tensor, expected: Tensor, tolerance: float, largest: float) -> bool:
    """Up to a share of the largest entry; what is rounding beside the largest of the model counts as equal.

    (The bias of the keys has no effect, and no gradient but rounding.)
    """
    apart = float((found - expected).abs().max())
    return apart <= tolerance * float(expected.abs().max()) + tolerance**2 * largest
