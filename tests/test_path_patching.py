"""Path patching: all paths together are full patching, and single ones equal a loop with a run for each sender."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from locedit.data.encode import Span
from locedit.errors import LoceditError
from locedit.localize.lookup.path_patching import Node, Sender, path_patch, refuse
from locedit.localize.patching.noise import Noise
from locedit.localize.patching.pairs import Pair, PairBatch, batch_of
from locedit.models import Model
from tests import tiny

LAYERS, HEADS = tiny.N_LAYERS, tiny.N_HEADS
ALL_HEADS = tuple(Node("head", layer, head) for layer in range(LAYERS) for head in range(HEADS))
ALL_MLPS = tuple(Node("mlp", layer) for layer in range(LAYERS))


def double(architecture: str, **overrides: Any) -> Model:
    model = tiny.model(architecture, **overrides)
    model.module.double()
    return model


def pairs(*, noise: Noise | None = None) -> list[Pair]:
    """Three pairs of different lengths that differ in a "subject" of two tokens before the measured position."""
    found: list[Pair] = []
    for number, length in enumerate((6, 9, 7)):
        clean = tiny.ids(1, length, seed=number)[0].tolist()
        other = tiny.ids(1, 2, seed=10 + number)[0].tolist()
        corrupt = clean if noise else [*clean[:2], *other, *clean[4:]]
        place = Span(start=2, end=4, label="subject")
        found.append(
            Pair(
                id=str(number),
                clean=tuple(clean),
                corrupt=tuple(corrupt),
                at=length - 1 - number % 2,
                answer=10 + number,
                wrong=20 + number,
                subject=place,
                noise=noise,
            )
        )
    return found


def whole(logits: Tensor, item: Tensor) -> Tensor:  # noqa: ARG001
    return logits


def run(model: Model, batch: PairBatch, side: str) -> Tensor:
    with torch.no_grad():
        return model.logits(getattr(batch, side), at=batch.at)


# --- all paths together ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", tiny.CAUSAL)
def test_all_heads_with_free_mlps_are_the_clean_run(architecture: str) -> None:
    model, batch = double(architecture), batch_of(pairs())
    clean, corrupt = run(model, batch, "clean"), run(model, batch, "corrupt")
    assert (clean - corrupt).abs().max() > 0.1
    found = path_patch(model, batch, [ALL_HEADS, ()], receiver=LAYERS, mlps="free", measure=whole, rows=99)
    torch.testing.assert_close(found[0], clean, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(found[1], corrupt, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("architecture", tiny.CAUSAL)
def test_everything_below_the_receiver_is_full_patching(architecture: str) -> None:
    model, batch = double(architecture), batch_of(pairs())
    senders = [(Node("embed"), *ALL_HEADS, *ALL_MLPS), ()]
    for receiver in (1, 2, LAYERS):
        found = path_patch(model, batch, senders, receiver=receiver, mlps="frozen", measure=whole, rows=99)
        torch.testing.assert_close(found[0], run(model, batch, "clean"), atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(found[1], run(model, batch, "corrupt"), atol=1e-9, rtol=1e-9)


def test_noise_on_the_embeddings_is_the_corrupt_run() -> None:
    model, batch = double("llama"), batch_of(pairs(noise=Noise(std=1.0, seed=3)))
    assert torch.equal(batch.clean.ids, batch.corrupt.ids)
    both = [(Node("embed"), *ALL_MLPS, *ALL_HEADS), (Node("embed"),), ()]
    found = path_patch(model, batch, both, receiver=2, mlps="frozen", measure=whole, rows=99)
    clean = run(model, batch, "clean")
    torch.testing.assert_close(found[0], clean, atol=1e-9, rtol=1e-9)
    assert (found[2] - clean).abs().amax(-1).min() > 0.1
    assert (found[1] - found[2]).abs().amax(-1).min() > 1e-3


# --- against a run for each sender -----------------------------------------------------------------------------------


def projection(model: Model, node: Node) -> nn.Module:
    return model.linear(node.layer, "attn.o" if node.kind == "head" else "mlp.out")


@contextmanager
def plain_hooks(
    before: dict[nn.Module, Callable[[Tensor], Tensor | None]], after: dict[nn.Module, Any]
) -> Generator[None]:
    """Plain torch hooks: functions of a module's input, and of its output; None changes nothing."""

    def on_input(module: nn.Module, args: tuple[Any, ...]) -> Any:
        new = before[module](args[0])
        return None if new is None else (new, *args[1:])

    handles = [module.register_forward_pre_hook(on_input) for module in before]
    handles += [m.register_forward_hook(lambda module, _, output: after[module](output)) for m in after]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def recorded(model: Model, batch: PairBatch, side: str) -> dict[nn.Module, Tensor]:
    """Inputs of the output projections of attention, and outputs of those of MLPs."""
    kept: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module) -> Callable[[Tensor], None]:
        return lambda value: kept.update({module: value})

    before = {projection(model, Node("head", layer)): None for layer in range(LAYERS)}
    after = {projection(model, Node("mlp", layer)): None for layer in range(LAYERS)}
    with plain_hooks({m: keep(m) for m in before}, {m: keep(m) for m in after}):
        run(model, batch, side)
    return kept


def one_run(model: Model, batch: PairBatch, sender: Sender, *, receiver: int, frozen: bool) -> Tensor:
    """The definition: a corrupt run in which all heads (and MLPs) are held, which is read before the receiver; then a
    corrupt run with what was read put there."""
    clean, corrupt = recorded(model, batch, "clean"), recorded(model, batch, "corrupt")
    before: dict[nn.Module, Any] = {}
    after: dict[nn.Module, Any] = {}
    for layer in range(LAYERS):
        module, width = projection(model, Node("head", layer)), model.d_head
        held = corrupt[module].clone()
        for node in sender:
            if node.kind == "head" and node.layer == layer:
                part = slice(node.head * width, (node.head + 1) * width)
                held[..., part] = clean[module][..., part]
        before[module] = lambda _, held=held: held
        module = projection(model, Node("mlp", layer))
        if Node("mlp", layer) in sender:
            after[module] = lambda _, held=clean[module]: held
        elif frozen:
            after[module] = lambda _, held=corrupt[module]: held
    last = receiver == LAYERS
    module = model.anatomy.module(f"blocks.{LAYERS - 1 if last else receiver}")
    read: list[Any] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        read.append(args[0] if args else kwargs["hidden_states"])

    with plain_hooks(before, after):
        if last:
            return run(model, batch, "corrupt")
        handle = module.register_forward_pre_hook(note, with_kwargs=True)
        run(model, batch, "corrupt")
        handle.remove()

    def put(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return ((read[0], *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": read[0]})

    handle = module.register_forward_pre_hook(put, with_kwargs=True)
    result = run(model, batch, "corrupt")
    handle.remove()
    return result


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox", "gpt_neo", "phi3"])
@pytest.mark.parametrize(("receiver", "mlps"), [(LAYERS, "free"), (LAYERS, "frozen"), (2, "frozen"), (2, "free")])
def test_each_sender_equals_a_run_of_its_own(architecture: str, receiver: int, mlps: str) -> None:
    model, batch = double(architecture), batch_of(pairs())
    senders: list[Sender] = [(Node("head", 0, 1),), (Node("head", 1, 3), Node("mlp", 1)), *((mlp,) for mlp in ALL_MLPS)]
    found = path_patch(model, batch, senders, receiver=receiver, mlps=mlps, measure=whole, rows=4)  # type: ignore[arg-type]
    assert (found - run(model, batch, "corrupt")).abs().max() > 0.01
    for sender, value in zip(senders, found, strict=True):
        expected = one_run(model, batch, sender, receiver=receiver, frozen=mlps == "frozen")
        torch.testing.assert_close(value, expected, atol=1e-9, rtol=1e-9)


def test_nodes_at_or_above_the_receiver_change_exactly_nothing() -> None:
    model, batch = tiny.model("gemma2"), batch_of(pairs())
    senders: list[Sender] = [(), *((mlp,) for mlp in ALL_MLPS)]
    found = path_patch(model, batch, senders, receiver=1, mlps="frozen", measure=whole, rows=99)
    assert torch.equal(found[2], found[0])
    assert torch.equal(found[3], found[0])
    assert not torch.equal(found[1], found[0])


# --- cost ------------------------------------------------------------------------------------------------------------


def test_many_senders_are_one_forward_and_portions_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = double("llama"), batch_of(pairs())
    calls: list[int] = []
    forward = model.module.forward
    monkeypatch.setattr(model.module, "forward", lambda *a, **k: (calls.append(1), forward(*a, **k))[1])
    senders: list[Sender] = [(head,) for head in ALL_HEADS]
    at_once = path_patch(model, batch, senders, receiver=LAYERS, mlps="free", measure=whole, rows=999)
    assert len(calls) == 3  # clean, corrupt, and all heads on all items together
    for rows in (1, 5):
        apart = path_patch(model, batch, senders, receiver=LAYERS, mlps="free", measure=whole, rows=rows)
        torch.testing.assert_close(apart, at_once, atol=1e-10, rtol=1e-10)


# --- what cannot be done ---------------------------------------------------------------------------------------------


def test_models_without_skip_paths_are_refused_in_one_line() -> None:
    for architecture, more in (("bert", {}), ("opt", {"do_layer_norm_before": False})):
        with pytest.raises(LoceditError, match=r"normalises the stream after every sum .*; use by='probe'$"):
            refuse(tiny.model(architecture, **more))
    for architecture in tiny.CAUSAL:
        refuse(tiny.model(architecture))


@pytest.mark.parametrize("rows", [4, 7, 14])
@pytest.mark.parametrize("mlps", ["free", "frozen"])
def test_what_has_no_path_to_the_receiver_is_the_corrupt_run_to_the_last_bit(mlps: Any, rows: int) -> None:
    """In float32 the same row gives other last bits in a pass of another size."""
    model, batch = tiny.model("gpt2"), batch_of(pairs())
    senders: list[Sender] = [(Node("mlp", 0),), (Node("mlp", 1),), (Node("mlp", 2),), (Node("head", 2, 1),), ()]
    found = path_patch(model, batch, senders, receiver=1, mlps=mlps, measure=whole, rows=rows)
    assert not torch.equal(found[0], found[-1])
    for above in found[1:-1]:
        assert torch.equal(above, found[-1])
