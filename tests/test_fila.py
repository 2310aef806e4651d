"""FILA: the factors are the optimum of the weighted problem, and the change is zero at the start."""

import math

import pytest
import torch
from torch import Tensor

from locedit import losses
from locedit.components import ComponentSet
from locedit.data.encode import Example, collate, encode
from locedit.edit.adapter import Piece, adapters_active, linear_pieces
from locedit.edit.fila import Fila, Svd, weighted_low_rank
from locedit.edit.restrict import out_axis
from locedit.errors import LoceditError
from locedit.models import Model, load
from locedit.unlearn.fila import FilaOptions, Start, importance
from tests import edits, tiny

EXACT = Svd()


def problem(rows: int = 30, columns: int = 20, *, seed: int = 0) -> tuple[Tensor, Tensor, torch.Generator]:
    """A matrix with a flat spectrum and unequal row weights, in float64."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    weights = torch.rand(rows, generator=generator, dtype=torch.float64).square() * 3 + 1e-3
    return matrix, weights, generator


def error(matrix: Tensor, weights: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """The weighted problem's objective, from its definition."""
    return (weights[:, None] * (matrix - scale * up @ down)).norm()


# --- the factors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "scale"), [(1, 2.0), (4, 0.5), (7, 1.0)])
def test_the_factors_are_the_optimum_of_the_weighted_problem(rank: int, scale: float) -> None:
    matrix, weights, generator = problem()
    down, up = weighted_low_rank(matrix, weights, rank=rank, scale=scale, svd=EXACT, generator=generator)
    assert down.shape == (rank, 20)
    assert up.shape == (30, rank)
    # Eckart-Young: no matrix of this rank comes closer than the singular values that are cut off
    tail = torch.linalg.svdvals(weights[:, None] * matrix)[rank:].square().sum().sqrt()
    best = error(matrix, weights, down, up, scale)
    torch.testing.assert_close(best, tail, rtol=1e-12, atol=0)
    # the published closed form
    u, s, vh = torch.linalg.svd(weights[:, None] * matrix, full_matrices=False)
    split = (s[:rank] / scale).sqrt()
    torch.testing.assert_close(up @ down, (u[:, :rank] * split / weights[:, None]) @ (split[:, None] * vh[:rank]))
    torch.testing.assert_close(down.norm(dim=1), split)
    # neither random factors nor the best ones moved a little come closer
    for number in range(50):
        draw = torch.Generator().manual_seed(number)
        a = torch.randn(down.shape, generator=draw, dtype=torch.float64)
        b = torch.randn(up.shape, generator=draw, dtype=torch.float64)
        assert error(matrix, weights, a, matrix @ torch.linalg.pinv(a) / scale, scale) > best
        assert error(matrix, weights, down + 1e-3 * a, up + 1e-3 * b, scale) > best
    # first-order condition, by autograd of the definition
    down, up = down.requires_grad_(), up.requires_grad_()
    error(matrix, weights, down, up, scale).backward()
    assert down.grad is not None
    assert up.grad is not None
    assert down.grad.abs().max() < 1e-10
    assert up.grad.abs().max() < 1e-10
    # and it is the weights that decide: the plain best approximation is worse here
    plain = weighted_low_rank(matrix, torch.ones(30).double(), rank=rank, scale=scale, svd=EXACT, generator=generator)
    assert error(matrix, weights, *plain, scale) > best * 1.01


def test_ranks_that_the_weighted_matrix_does_not_have_are_left_out() -> None:
    matrix, weights, generator = problem(6, 5)
    weights[[0, 2, 3, 5]] = 0.0
    down, up = weighted_low_rank(matrix, weights, rank=4, scale=2.0, svd=EXACT, generator=generator)
    assert down.shape == (2, 5)
    assert error(matrix, weights, down, up, 2.0) < 1e-12
    down, up = weighted_low_rank(matrix, torch.zeros(6).double(), rank=4, scale=2.0, svd=EXACT, generator=generator)
    assert down.shape == (0, 5)


@pytest.mark.parametrize("rank", [8, 32])
def test_randomized_svd_is_near_the_optimum_and_the_same_for_the_same_seed(rank: int) -> None:
    matrix, weights, _ = problem(384, 256)  # a flat spectrum is the worst case
    tail = float(torch.linalg.svdvals(weights[:, None] * matrix)[rank:].square().sum().sqrt())

    def factors(seed: int, **options: int) -> tuple[Tensor, Tensor]:
        svd, generator = Svd(svd="randomized", **options), torch.Generator().manual_seed(seed)
        return weighted_low_rank(matrix, weights, rank=rank, scale=2.0, svd=svd, generator=generator)

    def ratios(**options: int) -> list[float]:
        """To the optimum, for five seeds."""
        return [float(error(matrix, weights, *factors(seed, **options), 2.0)) / tail for seed in range(5)]

    default, release = ratios(), ratios(oversample=0, power_iterations=2)
    assert all(1 < ratio < 1.003 for ratio in default)
    assert max(default) < min(release)
    assert max(ratios(power_iterations=8)) < 1.0003
    assert torch.equal(factors(3)[0], factors(3)[0])
    assert not torch.equal(factors(3)[0], factors(4)[0])


# --- the importance --------------------------------------------------------------------------------------------------


def brute_force(model: Model, examples: list[Example], param: str) -> Tensor:
    """Mean over examples of the squared gradient, one backward pass for each."""
    weight = model.parameter(param)
    total = torch.zeros_like(weight)
    for example in examples:
        (gradient,) = torch.autograd.grad(losses.sequence_nll(losses.score(model, collate([example], model))), weight)
        total += gradient.square()
    return total / len(examples)


def start(model: Model, **options: object) -> Start:
    task = edits.task()
    assert task.retain is not None
    return Start(
        model=model,
        forget=encode(model, task.forget),
        retain=encode(model, task.retain),
        options=FilaOptions(**options),  # type: ignore[arg-type]
        rank=3,
        alpha=6.0,
    )


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bert"])
def test_relative_importance_equals_the_loop_over_examples(architecture: str) -> None:
    model = edits.double(architecture)
    within = edits.neurons_and_heads(model) | model.components({"blocks.2.mlp.out.matrix": [0]})
    made = start(model)
    pieces = linear_pieces(model, within)
    found = made.relative_information(pieces)
    params = list(dict.fromkeys(piece.param for piece in pieces))
    forget = {name: brute_force(model, list(made.forget), name) for name in params}
    retain = {name: brute_force(model, list(made.retain), name) for name in params}
    mean = torch.cat([value.flatten() for value in retain.values()]).mean()
    absolute = start(model, eps="release").relative_information(pieces)
    for name in params:
        torch.testing.assert_close(found[name], forget[name] / (retain[name] + 0.1 * mean), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(absolute[name], forget[name] / (retain[name] + 1e-5), rtol=1e-9, atol=1e-12)
    for piece in pieces:
        ratio = found[piece.param] if out_axis(piece.module) == 0 else found[piece.param].T  # [out, in]
        columns = piece.index is not None and piece.axis != out_axis(piece.module)
        sums = [math.sqrt(float(line.sum())) for line in (ratio.T if columns else ratio)]
        chosen = range(len(sums)) if piece.index is None else piece.index.tolist()
        expected = torch.tensor([sums[i] for i in chosen], dtype=torch.float64)
        torch.testing.assert_close(importance(piece, found[piece.param]), expected, rtol=1e-9, atol=0)


def test_importance_squared_by_batches_is_that_of_the_batch_gradient() -> None:
    model = edits.double("llama")
    within = model.components({"blocks.1.mlp.out.matrix": [0]})
    made = start(model, variant="batch_squared", group=8, eps="release")
    (found,) = made.relative_information(linear_pieces(model, within)).values()
    weight = model.parameter(linear_pieces(model, within)[0].param)

    def squared(examples: list[Example]) -> Tensor:
        scored = losses.score(model, collate(examples, model))
        return torch.autograd.grad(-losses.token_log_probs(scored).mean(), weight)[0].square()

    expected = squared(list(made.forget)) / (squared(list(made.retain)) + 1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


# --- in a model ------------------------------------------------------------------------------------------------------


def logits(model: Model) -> Tensor:
    return model.logits(collate(encode(model, edits.task().forget), model))


def some_of_everything(model: Model) -> ComponentSet:
    """Rows, columns, and a whole matrix."""
    rows = model.components({"blocks.0.mlp.out.row": [2, 3, 9, 11, 20]})
    columns = model.components({"blocks.0.mlp.out.column": [1, 7], "blocks.1.mlp.out.column": [4]})
    return edits.neurons_and_heads(model) | rows | columns | model.components({"blocks.2.mlp.out.matrix": [0]})


def held(model: Model, within: ComponentSet | None = None, **options: object) -> Fila:
    return start(model, **options)(within, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("architecture", "half"), [("gpt2", False), ("llama", True), ("gpt_neox", True), ("bert", False)]
)
def test_the_output_is_unchanged_at_the_start(architecture: str, half: bool) -> None:
    model = edits.half(architecture) if half else tiny.model(architecture)
    before = edits.bits(model.module)
    with torch.no_grad():
        plain = logits(model)
        for within in (None, some_of_everything(model)):
            factors = held(model, within)
            with factors.active():
                assert torch.equal(logits(model), plain)
            with adapters_active(model, factors.adapters()):
                assert torch.equal(logits(model), plain)
            # and the factors themselves are not zero: every piece has its A0 and B0
            assert all(min(float(a.norm()), float(b.norm())) > 0 for a, b in (acting() for acting in factors.acting))
    assert edits.same_bits(model.module, before)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox"])
def test_what_acts_is_the_difference_of_the_two_products(architecture: str) -> None:
    """s (B A - B0 A0) by hand, from factors that the test computes for every piece from the definition."""
    model = edits.double(architecture)
    within = some_of_everything(model)
    made = start(model)
    factors = held(model, within)
    ratios = made.relative_information(factors.pieces)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in factors.parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.1)
        base = {piece.param: model.parameter(piece.param).clone() for piece in factors.pieces}
        with factors.active():
            acting = logits(model)
        for i, piece in enumerate(factors.pieces):
            start_a, start_b = by_hand(base[piece.param], ratios[piece.param], piece, rank=3, scale=2.0)
            change_a, change_b = factors.parameters[2 * i : 2 * i + 2]
            change = 2.0 * ((start_b + change_b) @ (start_a + change_a) - start_b @ start_a)  # [out, in]
            add(model, piece, change)
        assert model.parameter(factors.pieces[0].param).ne(base[factors.pieces[0].param]).any()
        torch.testing.assert_close(logits(model), acting, rtol=1e-9, atol=1e-9)


def by_hand(weight: Tensor, ratio: Tensor, piece: Piece, *, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A0 and B0 by the published formula, up to signs of singular vectors, which are made those of torch's SVD."""
    if out_axis(piece.module) == 1:
        weight, ratio = weight.T, ratio.T
    columns = piece.index is not None and piece.axis != out_axis(piece.module)
    if columns:
        weight, ratio = weight.T, ratio.T
    importance = ratio.sum(1).sqrt()
    if piece.index is not None:
        weight, importance = weight[piece.index], importance[piece.index]
    u, s, vh = torch.linalg.svd(importance[:, None] * weight, full_matrices=False)
    rank = min(rank, len(s))
    split = (s[:rank] / scale).sqrt()
    first, second = split[:, None] * vh[:rank], u[:, :rank] * split / importance[:, None]
    return (second.T, first.T) if columns else (first, second)


def add(model: Model, piece: Piece, change: Tensor) -> None:
    """Add a change `[out, in]` of a piece to the model's weight."""
    weight = model.parameter(piece.param)
    change = change.T if out_axis(piece.module) == 1 else change
    if piece.index is None:
        weight.add_(change)
    else:
        assert piece.axis is not None
        weight.index_add_(piece.axis, piece.index, change)


def test_small_changes_survive_where_two_products_would_cancel() -> None:
    """A change of 1e-7 beside factors of size one: right to 1e-4 in float32, where s B A - s B0 A0 is not."""
    model = tiny.model("llama")
    factors = held(model, model.components({"blocks.1.mlp.out.matrix": [0]}))
    (piece,), (down, up) = factors.pieces, factors.parameters
    with torch.no_grad():
        start_a, start_b = factors.acting[0]()[0][: len(down)].clone(), factors.acting[0]()[1][:, len(down) :].clone()
        generator = torch.Generator().manual_seed(0)
        down.copy_(torch.randn(down.shape, generator=generator) * 1e-7)
        up.copy_(torch.randn(up.shape, generator=generator) * 1e-7)
        a, b = start_a.double() + down.double(), start_b.double() + up.double()
        expected = 2.0 * (b @ a - start_b.double() @ start_a.double())
        (adapter,) = factors.adapters()
        torch.testing.assert_close(
            (adapter.up @ adapter.down).double(), expected, rtol=0, atol=1e-4 * float(expected.abs().max())
        )
        naive = 2.0 * (start_b + up) @ (start_a + down) - 2.0 * start_b @ start_a
        assert (naive - expected).abs().max() > 1e-2 * expected.abs().max()
    assert piece.param == adapter.param


def test_matrices_that_the_forget_data_do_not_reach_are_left_out() -> None:
    model = tiny.model("llama")
    with torch.no_grad():  # nothing flows back through the second block's MLP
        model.parameter("model.layers.1.mlp.down_proj.weight").zero_()
    within = model.components({"blocks.1.mlp.in.matrix": [0], "blocks.0.mlp.in.matrix": [0]})
    model = load(model.module, tokenizer=tiny.tokenizer(), device="cpu")
    assert [piece.param for piece in held(model, model.bind(within)).pieces] == ["model.layers.0.mlp.up_proj.weight"]
    only = model.components({"blocks.1.mlp.in.matrix": [0]})
    with pytest.raises(LoceditError, match="no gradient of the retain data reaches the component set"):
        held(model, only)
    with pytest.raises(LoceditError, match="no gradient of the data to forget reaches the component set"):
        held(model, only, eps="release")


@pytest.mark.parametrize(
    ("option", "value"), [("eps", 0.0), ("oversample", -1), ("power_iterations", -1), ("group", 0), ("fisher_batch", 0)]
)
def test_options_out_of_range_are_named(option: str, value: float) -> None:
    with pytest.raises(LoceditError, match=f"{option}={value}"):
        FilaOptions(**{option: value})  # type: ignore[arg-type]
