"""Fusing layers in closed form is least squares on the data that it never sees again."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from locedit import tracing
from locedit.data.encode import Example, collate, encode
from locedit.edit import Edit
from locedit.edit.fusion import average, fuse, fused_map
from locedit.edit.grams import gram, grams
from locedit.edit.layers import Activation, AddedLayer
from locedit.edit.tokens import conditioned
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.unlearn import unlearn
from locedit.unlearn.requests import requests_by
from tests import edits, tiny

N, OUT = 6, 4


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(tokens: Sequence[int] = (9, 12, 7)) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and weights of three requests."""
    return [drawn(t, N, seed=t) for t in tokens], [drawn(N, OUT, seed=100 + t) for t in tokens]


def squares(xs: Sequence[Tensor]) -> list[Tensor]:
    return [x.T @ x for x in xs]


@pytest.mark.parametrize("eps", [0.0, 0.3])
@pytest.mark.parametrize("tokens", [(9, 12, 7), (2, 1, 2)])
def test_it_is_least_squares_on_the_stacked_systems(tokens: tuple[int, ...], eps: float) -> None:
    """The ridge is one more system, sqrt(eps) I W = sqrt(eps) W_mean; with too few tokens it must be there."""
    xs, ws = problem(tokens)
    eps = eps if sum(tokens) > N else 0.3
    left = torch.cat([*xs, eps**0.5 * torch.eye(N, dtype=torch.float64)])
    right = torch.cat([*(x @ w for x, w in zip(xs, ws, strict=True)), eps**0.5 * torch.stack(ws).mean(0)])
    wanted = torch.linalg.lstsq(left, right).solution
    torch.testing.assert_close(fused_map(squares(xs), ws, eps=eps), wanted, rtol=1e-11, atol=1e-11)


def test_adding_nothing_on_other_inputs_is_one_more_system() -> None:
    xs, ws = problem()
    kept = drawn(5, N, seed=7)
    right = torch.cat([*(x @ w for x, w in zip(xs, ws, strict=True)), torch.zeros(5, OUT, dtype=torch.float64)])
    wanted = torch.linalg.lstsq(torch.cat([*xs, kept]), right).solution
    found = fused_map(squares(xs), ws, still=kept.T @ kept)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


def test_equal_weights_stay_whatever_the_data() -> None:
    xs, ws = problem((2, 1, 1))
    assert torch.equal(fused_map(squares(xs)[:2], [ws[0], ws[0]], eps=1e-9), ws[0])


def test_independent_row_spaces_keep_every_output() -> None:
    """Each request's inputs span directions of their own; averaging loses every one of them."""
    basis = torch.linalg.qr(drawn(N, N, seed=3)).Q
    xs = [drawn(8, 2, seed=i) @ basis[2 * i : 2 * i + 2] for i in range(3)]
    ws = problem()[1]
    found = fused_map(squares(xs), ws, eps=1e-13)
    mean = torch.stack(ws).mean(0)
    for x, w in zip(xs, ws, strict=True):
        torch.testing.assert_close(x @ found, x @ w, rtol=1e-9, atol=1e-9)
        assert (x @ mean - x @ w).abs().max() > 0.1


def test_order_scale_and_endless_ridge() -> None:
    xs, ws = problem()
    found = fused_map(squares(xs), ws, eps=0.1)
    torch.testing.assert_close(fused_map(squares(xs[::-1]), ws[::-1], eps=0.1), found, rtol=1e-11, atol=1e-11)
    scaled = fused_map(squares([3 * xs[0], *xs[1:]]), ws)
    weight = torch.cat([torch.full((len(xs[0]), 1), 9.0), torch.ones(len(xs[1]) + len(xs[2]), 1)]).double()
    stacked = torch.cat(xs)
    normal = stacked.T @ (weight * stacked)
    wanted = torch.linalg.solve(normal, stacked.T @ (weight * torch.cat([x @ w for x, w in zip(xs, ws, strict=True)])))
    torch.testing.assert_close(scaled, wanted, rtol=1e-9, atol=1e-9)
    assert (scaled - fused_map(squares(xs), ws)).abs().max() > 1e-2
    torch.testing.assert_close(fused_map(squares(xs), ws, eps=1e14), torch.stack(ws).mean(0), rtol=0, atol=1e-10)


# --- layers ----------------------------------------------------------------------------------------------------------


def layer(seed: int, *, rank: int = 3, **fields: Any) -> AddedLayer:
    """A layer of width 5, with Gram matrices of enough tokens."""
    shapes = {"down": (rank, 5), "down_bias": (rank,), "up": (5, rank), "up_bias": (5,)}
    parts: dict[str, Any] = {name: drawn(*shape, seed=seed) for name, shape in shapes.items()}
    parts |= {"grams": (gram(drawn(20, 5, seed=seed + 1)), gram(drawn(20, rank, seed=seed + 2)))}
    parts |= {"retain_gram": gram(drawn(20, rank, seed=seed + 3))}
    parts |= {"point": "blocks.0.hook_mlp_out", "activation": "relu"}
    return AddedLayer(**(parts | fields))


def edit(seed: int, **fields: Any) -> Edit:
    return Edit(kind="modules", fingerprint="m", layers=(layer(seed, **fields),))


def folded(one: Edit, name: str) -> Tensor:
    (added,) = one.layers
    return torch.cat([getattr(added, name).T, getattr(added, f"{name}_bias")[None]])


def test_both_maps_are_fused_with_their_biases() -> None:
    """Each as a map of [x, 1]; the Gram matrices add up, so that fusing step by step is fusing at once."""
    made = [edit(10), edit(20), edit(30)]
    at_once = fuse(made, ridge=1e-14)
    for number, name in enumerate(("down", "up")):
        own = [e.layers[0].grams[number] for e in made if e.layers[0].grams]
        wanted = fused_map(own, [folded(e, name) for e in made])
        torch.testing.assert_close(folded(at_once, name), wanted, rtol=1e-9, atol=1e-9)
        mean = torch.stack([folded(e, name) for e in made]).mean(0)
        torch.testing.assert_close(folded(average(made), name), mean)
        torch.testing.assert_close(folded(fuse(made, ridge=1e15), name), mean, rtol=1e-9, atol=1e-9)
        by_step = fuse([fuse(made[:2], ridge=1e-14), made[2]], ridge=1e-14)
        torch.testing.assert_close(folded(by_step, name), folded(at_once, name), rtol=1e-8, atol=1e-8)
    assert at_once.outcome["fused"] == [e.digest for e in made]
    assert (at_once.outcome["fusion"], average(made).outcome["fusion"]) == ("closed", "average")


def test_retained_data_pull_the_layer_to_nothing() -> None:
    """With an endless weight W2 is zero; without, the matrices are not looked at."""
    made = [edit(10), edit(20)]
    assert folded(fuse(made, retain=1e12), "up").abs().max() < 1e-9
    torch.testing.assert_close(folded(fuse(made, retain=1e12), "down"), folded(fuse(made), "down"))
    assert folded(fuse(made), "up").abs().max() > 0.1
    assert torch.equal(folded(fuse([edit(10, retain_gram=None), edit(20)]), "up"), folded(fuse(made), "up"))


def test_layers_without_biases_get_none() -> None:
    """Least squares of the inputs alone; with one bias among the layers, the fused ones have some."""
    none = {"down_bias": torch.zeros(3).double(), "up_bias": torch.zeros(5).double()}
    made = [edit(10, **none), edit(20, **none)]
    (fused,) = fuse(made, ridge=1e-14, retain=0.5).layers
    assert not fused.down_bias.any()
    assert not fused.up_bias.any()
    for number, found in enumerate((fused.down, fused.up)):
        own = [one.layers[0] for one in made]
        squares = [one.grams[number][:-1, :-1] for one in own if one.grams]
        still = sum(one.retain_gram[:-1, :-1] for one in own if one.retain_gram is not None) * 0.5 if number else None
        wanted = fused_map(squares, [(one.up if number else one.down).T for one in own], still=still)  # type: ignore[arg-type]
        torch.testing.assert_close(found.T, wanted, rtol=1e-9, atol=1e-9)
    (mixed,) = fuse([made[0], edit(20)]).layers
    assert mixed.down_bias.all()
    assert mixed.up_bias.all()


def test_retained_data_of_fused_layers_add_up() -> None:
    made = [edit(10), edit(20)]
    (fused,) = fuse(made).layers
    first, second = (one.layers[0].retain_gram for one in made)
    assert first is not None
    assert second is not None
    assert fused.retain_gram is not None
    torch.testing.assert_close(fused.retain_gram, first + second)
    assert fuse([edit(10), edit(20, retain_gram=None)]).layers[0].retain_gram is None


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ([], "there is no edit"),
        ([edit(1), Edit(kind="weights", fingerprint="m")], "not an edit of kind 'weights'"),
        ([edit(1), dataclasses.replace(edit(2), fingerprint="other")], "edit 2 has other models than the first"),
        ([edit(1), edit(2, point="blocks.1.hook_mlp_out")], "edit 2 has other places than the first"),
        ([edit(1), edit(2), edit(3, index=torch.tensor([0, 1, 2, 3, 4]))], "edit 3 has other places"),
        ([edit(1), edit(2, rank=2)], "edit 2 has other ranks than the first"),
        ([edit(1), edit(2, activation="linear")], "edit 2 has other activations than the first"),
        ([edit(1), edit(2, start="another")], "edit 2 has other initial values than the first"),
        ([edit(1), edit(2, grams=None)], "no Gram matrices; make it with keep_grams=true"),
        ([edit(1), edit(2, retain_gram=None)], "no Gram matrices of retained data"),
    ],
)
def test_what_cannot_be_fused_is_said_in_one_line(others: list[Edit], words: str) -> None:
    with pytest.raises(LoceditError, match=words) as raised:
        fuse(others, retain=1.0)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("given", "words"), [({"ridge": 0.0}, "ridge=0.0"), ({"retain": -1.0}, "retain=-1.0")])
def test_weights_of_the_fusion_are_checked(given: dict[str, float], words: str) -> None:
    with pytest.raises(LoceditError, match=words):
        fuse([edit(1)], **given)


# --- on a model ------------------------------------------------------------------------------------------------------


def trained(model: Model, activation: Activation = "relu", **options: Any) -> list[Edit]:
    """Layers of two requests at two places, one on some neurons."""
    within = model.components({"blocks.0.mlp": [0]}) | model.components({"blocks.1.mlp.neuron": [2, 3, 50]})
    common: dict[str, Any] = {"steps": 6, "rank": 3, "activation": activation, "within": within, "check": False}
    requests = requests_by(edits.task(), "owner").values()
    return [unlearn(model, task, "eul", **(common | options)) for task in requests]


def inputs_by_hand(model: Model, made: Edit, examples: Sequence[Example]) -> list[tuple[Tensor, Tensor]]:
    """For each layer what its two maps get at every token of the examples, one unpadded text after the other."""
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in made.layers]
    points = [one.point for one in made.layers]
    for example in examples:
        with torch.no_grad(), tracing.record(model, points) as seen, made.applied(model) as edited:
            edited.logits(collate([example], edited))
        for number, one in enumerate(made.layers):
            value = seen[one.point][0]  # before the layer, which was entered later
            x = value if one.index is None else value[:, one.index]
            hidden = torch.einsum("pn,rn->pr", x.to(one.down.dtype), one.down) + one.down_bias
            found[number].append((x.double(), hidden.clamp(min=0).double()))
    return [tuple(torch.cat(part) for part in zip(*rows, strict=True)) for rows in found]  # type: ignore[misc]


def with_one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)


def test_fused_layers_are_least_squares_on_the_requests_own_tokens() -> None:
    """From the tokens themselves, stacked, against the fused edit: both maps of both layers."""
    model = edits.double("gpt2")
    made = trained(model)
    fused = fuse(made, ridge=1e-3)
    tasks = list(requests_by(edits.task(), "owner").values())
    seen = [inputs_by_hand(model, one, encode(model, t.forget)) for one, t in zip(made, tasks, strict=True)]
    for at, layer in enumerate(fused.layers):
        for which, name in enumerate(("down", "up")):
            xs = [with_one(own[at][which]) for own in seen]
            ws = [torch.cat([getattr(e.layers[at], name).T, getattr(e.layers[at], f"{name}_bias")[None]]) for e in made]
            eps = 1e-3 * float(sum((x**2).sum() for x in xs)) / xs[0].shape[1]
            identity = eps**0.5 * torch.eye(xs[0].shape[1], dtype=torch.float64)
            left = torch.cat([*xs, identity])
            right = torch.cat([*(x @ w for x, w in zip(xs, ws, strict=True)), identity @ torch.stack(ws).mean(0)])
            wanted = torch.linalg.lstsq(left, right).solution
            found = torch.cat([getattr(layer, name).T, getattr(layer, f"{name}_bias")[None]])
            torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9)
            assert (found - torch.stack(ws).mean(0)).abs().max() > 1e-3


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_padding_and_batches_do_not_change_the_gram_matrices(architecture: str) -> None:
    model = edits.double(architecture)
    (one, _) = trained(model)
    retain = edits.task().retain
    assert retain is not None
    examples = encode(model, retain)
    assert len({len(example.ids) for example in examples}) > 1
    together, alone = (grams(model, one.layers, examples, size=size) for size in (32, 1))
    for pair, other in zip(together, alone, strict=True):
        for first, second in zip(pair, other, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-10)
    rows = sum(1 if model.causal else len(e.targets) for e in examples)
    tokens = sum(len(e.ids) * (1 if model.causal else len(e.targets)) for e in examples)
    assert together[0][0][-1, -1] == tokens > rows
    assert edits.hooks_left(model.module) == 0


def test_the_matrices_are_summed_in_float64_for_a_float32_model() -> None:
    """Products of float32 numbers are exact there; a sum of float32 products is not."""
    x = drawn(300, 7, seed=1).float()
    exact = torch.cat([x.double(), torch.ones(300, 1).double()], dim=1)
    assert gram(x).dtype == torch.float64
    assert torch.equal(gram(x), exact.T @ exact)
    assert not torch.equal((x.T @ x).double(), (exact.T @ exact)[:-1, :-1])
    model = tiny.model("gpt2")
    (one, _) = trained(model)
    assert {part.dtype for pair in grams(model, one.layers, encode(model, edits.task().forget)) for part in pair} == {
        torch.float64
    }


def test_the_retain_matrix_is_over_the_retained_data() -> None:
    model = tiny.model("gpt2")
    made, retain = trained(model), edits.task().retain
    assert retain is not None
    texts = encode(model, retain)
    for one, own in zip(made, requests_by(edits.task(), "owner").values(), strict=True):
        wanted = grams(model, one.layers, texts)
        for layer, (_, up) in zip(one.layers, wanted, strict=True):
            assert layer.retain_gram is not None
            assert layer.grams is not None
            torch.testing.assert_close(layer.retain_gram, up)
            assert layer.retain_gram[-1, -1] == sum(len(text.ids) for text in texts)
            assert layer.grams[1][-1, -1] == sum(len(text.ids) for text in encode(model, own.forget))


def test_a_control_token_is_one_more_input() -> None:
    model = edits.double("gpt2")
    (one, _) = trained(model)
    examples = encode(model, edits.task().forget)
    plain = grams(model, one.layers, examples)
    with conditioned(model, torch.randn(1, model.d_model, generator=torch.Generator().manual_seed(0)), 0):
        behind = grams(model, one.layers, examples)
    assert behind[0][0][-1, -1] == plain[0][0][-1, -1] + len(examples)


def test_fusing_an_edit_with_itself_changes_nothing() -> None:
    model = tiny.model("llama")
    first, second = trained(model)
    assert fuse([first, first]).layers[0].down.equal(first.layers[0].down)
    batch = collate(encode(model, edits.task().forget), model)
    with torch.no_grad():
        with first.applied(model) as edited:
            wanted = edited.logits(batch)
        with fuse([first] * 3).applied(model) as edited:
            torch.testing.assert_close(edited.logits(batch), wanted, rtol=2e-5, atol=2e-5)
        with fuse([first, second]).applied(model) as edited:
            assert (edited.logits(batch) - wanted).abs().max() > 1e-2
