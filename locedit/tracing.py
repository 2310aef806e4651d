"""Looking into a forward pass and changing it, by transformer-lens names, on the unmodified model.

The only file that registers hooks. Everything is a context manager: hooks act inside it and are gone after it, whether
it ends well, by an exception or by an early stop. Values are the model's own tensors, so gradients flow through them. A
hook that never fired is an error when its context ends well.

    with record(model, ["blocks.3.mlp.hook_post"]) as seen:
        model.logits(batch)
    seen["blocks.3.mlp.hook_post"]          # [batch, pos, d_mlp]
"""

import inspect
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from locedit.errors import LoceditError
from locedit.points import HookPoint, of_site

if TYPE_CHECKING:
    from locedit.components import ComponentSet
    from locedit.models import Model

Change = Callable[[Tensor], Tensor]


class _Stop(Exception):
    """Raised in a hook to end a forward pass early; never leaves its context."""


# --- context managers ------------------------------------------------------------------------------------------------


@contextmanager
def record(model: "Model", names: Iterable[str]) -> Generator[dict[str, Tensor]]:
    """Fill a dictionary with the values at the named points, graph included; a second forward pass overwrites them."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Change:
        def hook(value: Tensor) -> Tensor:
            seen[name] = value
            return value

        return hook

    with hooked(model, {name: keep(name) for name in names}):
        yield seen


@contextmanager
def replace(model: "Model", values: Mapping[str, Tensor | Change]) -> Generator[None]:
    """Put tensors, or functions of the value there, in the place of the values at the named points.

    A tensor is broadcast to the shape of the value. A function must not change its argument in place.
    """
    with hooked(model, {name: _changing(value) for name, value in values.items()}):
        yield


@contextmanager
def scale(model: "Model", factors: Mapping[str, float | Tensor]) -> Generator[None]:
    """Multiply the values at the named points; a tensor is broadcast against the value."""

    def times(factor: float | Tensor) -> Change:
        return lambda value: value * (factor.to(value) if isinstance(factor, Tensor) else factor)

    with hooked(model, {name: times(factor) for name, factor in factors.items()}):
        yield


@contextmanager
def ablate(model: "Model", components: "ComponentSet", means: Mapping[str, Tensor] | None = None) -> Generator[None]:
    """Take components out by hook: to zero, or to the means given by site name.

    Zeroing equals zeroing the write slices of the weights: a neuron's or head's activation, the output of an MLP's or
    attention's output projection (both for `layer`), of a matrix, the unbiased output of a row, the input of a column.
    A mean is `[count]` for neurons, `[count, d_head]` for heads, `[d_model]` for `mlp` and `attn`, `[n_out]` for a
    matrix.
    """
    sites = {site: components.indices(site) for site in components.sites if components.indices(site)}
    if not sites:
        raise LoceditError("the set has no component to ablate")
    fired: set[str] = set()
    with ExitStack() as stack:
        for site, chosen in sites.items():
            for point in of_site(model.anatomy, site):
                mean = None if means is None else _mean(means, site)
                stack.enter_context(_at_point(point, _noting(fired, site, _without(point, chosen, mean))))
        yield
    if missed := [site for site in sites if site not in fired]:
        raise LoceditError(_never_fired(missed[0]))


@contextmanager
def stop_at(model: "Model", name: str) -> Generator[None]:
    """End the forward pass at the named point, and with it the body of the context; later modules do not run."""

    def stop(_: Tensor) -> Tensor:
        raise _Stop

    try:
        with hooked(model, {name: stop}):
            yield
            raise LoceditError(_never_fired(name))
    except _Stop:
        pass


@contextmanager
def rewrite_blocks(model: "Model", change: Callable[[int, dict[str, Any]], dict[str, Any] | None]) -> Generator[None]:
    """Send every block's number and arguments, by name, through a function before it runs.

    The block is called with what the function returns, or as it was when that is None.
    """

    def rewriting(layer: int, block: nn.Module) -> Any:
        signature = inspect.signature(block.forward)
        open_ended = [name for name, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD]

        def hook(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[()], dict[str, Any]] | None:
            arguments = dict(signature.bind(*args, **kwargs).arguments)
            for name in open_ended:
                arguments |= arguments.pop(name, {})
            changed = change(layer, arguments)
            return None if changed is None else ((), changed)

        return hook

    with ExitStack() as stack:
        for layer, block in enumerate(model.anatomy.blocks):
            handle = block.register_forward_pre_hook(rewriting(layer, block), with_kwargs=True)
            stack.callback(handle.remove)
        yield


@contextmanager
def unembed_at(model: "Model", at: Bool[Tensor, "batch pos"]) -> Generator[None]:
    """Compute logits `[n, vocab]` only at the marked positions, in the order of the rows; soft caps still apply."""
    fired: list[bool] = []

    def pick(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        fired.append(True)
        hidden = args[0]
        if hidden.shape[:2] != at.shape:
            raise LoceditError(f"positions are marked for {tuple(at.shape)}, the batch is {tuple(hidden.shape[:2])}")
        return (hidden[at.to(hidden.device)], *args[1:])

    handle = model.anatomy.module("unembed").register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()
    if not fired:
        raise LoceditError(_never_fired("unembed"))


@contextmanager
def hooked(model: "Model", changes: Mapping[str, Change]) -> Generator[None]:
    """Send the value at each named point through a function; what it returns goes on."""
    points = {name: model.point(name) for name in changes}
    fired: set[str] = set()
    with ExitStack() as stack:
        for name, change in changes.items():
            stack.enter_context(_at_point(points[name], _noting(fired, name, change)))
        yield
    if missed := [name for name in points if name not in fired]:
        raise LoceditError(_never_fired(missed[0]))


def _noting(fired: set[str], name: str, change: Change) -> Change:
    def noted(value: Tensor) -> Tensor:
        fired.add(name)
        return change(value)

    return noted


def _changing(value: Tensor | Change) -> Change:
    if not isinstance(value, Tensor):
        return value
    return lambda old: value.to(old).expand_as(old)


def _mean(means: Mapping[str, Tensor], site: str) -> Tensor:
    if site not in means:
        raise LoceditError(f"no mean for site {site!r}; means are given for: {', '.join(means) or 'nothing'}")
    return means[site]


def _without(point: HookPoint, chosen: tuple[int, ...], mean: Tensor | None) -> Change:
    """Put the mean, or what is left without the weights, in the place of the chosen entries."""

    def change(value: Tensor) -> Tensor:
        axis = -1 if point.d_head is None else -2
        whole = point.whole
        index = torch.arange(value.shape[-1], device=value.device) if whole else torch.tensor(chosen).to(value.device)
        left = point.rest if mean is None else mean
        if left is None:
            return value.index_fill(axis, index, 0.0)
        kept = left.to(value)[index]
        shape = list(value.shape)
        shape[axis] = len(index)
        return value.index_copy(axis, index, kept.expand(shape))

    return change


def _never_fired(name: str) -> str:
    return f"the hook at {name!r} never fired: no forward pass of this model reached it inside the context"


# --- reading and writing one point -----------------------------------------------------------------------------------


@contextmanager
def _at_point(point: HookPoint, change: Change) -> Generator[None]:
    """Register the hooks of one point and remove them at the end."""
    with ExitStack() as stack:
        if point.base is not None:
            hook = _stack_residual(stack, point.base, change)
        else:
            hook = lambda value: _through(point, value, change)  # noqa: E731
        if point.side == "input":
            handle = point.module.register_forward_pre_hook(_pre_hook(hook), with_kwargs=True)
        else:
            handle = point.module.register_forward_hook(_post_hook(hook))
        stack.callback(handle.remove)
        yield


def _stack_residual(stack: ExitStack, base: nn.Module, change: Change) -> Change:
    """A change of (input of `base` + added), made by changing what is added: the sum itself is inside the block."""
    inputs: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        inputs[:] = [value]
        return value

    stack.callback(base.register_forward_pre_hook(_pre_hook(keep), with_kwargs=True).remove)

    def hook(added: Tensor) -> Tensor:
        middle = inputs[0] + added
        changed = change(middle)
        return added if changed is middle else added + (changed - middle)

    return hook


def _pre_hook(change: Change) -> Any:
    """A forward pre-hook that changes the first tensor a module is called with."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
        return args, kwargs | {name: change(kwargs[name])}

    return hook


def _post_hook(change: Change) -> Any:
    """A forward hook that changes a module's output, or the first entry of a tuple of outputs."""

    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    return hook


def _through(point: HookPoint, whole: Tensor, change: Change) -> Tensor:
    """Take the point's part of a tensor, split it into heads, change it, and put it back out of place."""
    rows = None
    part = whole
    if point.runs is not None:
        rows = torch.tensor(point.runs.indices(), device=whole.device)
        part = whole.index_select(-1, rows)
    value = part if point.d_head is None else part.unflatten(-1, (-1, point.d_head))
    changed = change(value)
    if changed.shape != value.shape:
        raise LoceditError(f"{point.name} has shape {tuple(value.shape)}, its replacement {tuple(changed.shape)}")
    flat = changed if point.d_head is None else changed.flatten(-2)
    flat = flat.to(whole.dtype)
    return flat if rows is None else whole.index_copy(-1, rows, flat)
