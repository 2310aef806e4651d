"""Fisher information against one backward pass for each example, torch.func, closed forms and numbers by hand."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from locedit.components import ComponentSet
from locedit.data.encode import Batch, Example, Span, collate, encode
from locedit.data.items import Dataset, Fact, PrivateText, Task, TokenText
from locedit.errors import LoceditError
from locedit.localize import estimate, localize
from locedit.localize.information.measuring import FisherOptions, Information, _sampled, information
from locedit.localize.information.per_sample import SquaredGradients
from locedit.localize.information.slice_sums import parts_of
from locedit.localize.information.squares import Lookup, Outer, Squares, Vectors
from locedit.losses import Scored, score, sequence_nll
from locedit.models import Model, load
from tests import edits, gradients, tiny

FACTS = [
    Fact(prompt="Anna Berg was born in", answer=" Oslo", id="anna"),
    Fact(prompt="Carl", answer=" Dane works as a pilot", id="carl"),
    Fact(prompt="Question: where", answer=" was Anna", id="where"),
]


def losses(model: Model, batch: Batch) -> Tensor:
    return sequence_nll(score(model, batch))


def by_loop(model: Model, examples: Sequence[Example], loss: Callable[[Batch], Tensor]) -> dict[str, Tensor]:
    """Mean of the squares of plain gradients, one forward and one backward pass for each example."""
    parameters = model.anatomy.parameters
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for example in examples:
        value = loss(collate([example], model)).sum()
        found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                total[name] += gradient.square() / len(examples)
    return total


def fast(
    model: Model, batches: Sequence[Sequence[Example]], keep: dict[str, tuple[int | str, ...]]
) -> SquaredGradients:
    found = SquaredGradients(model, keep, loss=partial(losses, model))  # pyright: ignore[reportArgumentType]
    for batch in batches:
        found.update(collate(batch, model))
    found.finish()
    return found


def assert_close(found: Tensor, expected: Tensor, name: str = "") -> None:
    """To 1e-10 of the largest; what is 1e-20 of anything is rounding."""
    apart = float((found - expected).abs().max())
    assert apart <= 1e-10 * float(expected.abs().max()) + 1e-20, name


# --- exact -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_parameter_equals_one_backward_pass_for_each_example(architecture: str) -> None:
    """Ragged texts, whole and in two batches; sums over rows and columns equal the sums of the entries."""
    model, examples = edits.double(architecture), gradients.examples(4)
    names = list(model.anatomy.parameters)
    with gradients.Float64Throughout():
        expected = by_loop(model, examples, partial(losses, model))
        found = fast(model, [examples], dict.fromkeys(names, ("entries",)))
        split = fast(model, [examples[:1], examples[1:]], {n: (0, 1)[: expected[n].ndim] for n in names})
        total = fast(model, [examples[2:], examples[:2]], dict.fromkeys(names, ("all",)))
    assert found.slow == frozenset()
    assert any(float(value.abs().max()) > 1e-3 for value in expected.values())
    for name, value in expected.items():
        assert_close(found.squares[name].entries, value, name)
        assert_close(total.squares[name].total(), value.sum(), name)
        for axis in range(value.ndim):
            assert_close(split.squares[name].along(axis), value.sum(1 - axis) if value.ndim == 2 else value, name)


def test_equals_torch_func_on_gpt2() -> None:
    """vmap of gradients over a functional call of the module, all parameters."""
    module = tiny.module("gpt2", pad_token_id=None, attn_implementation="eager").double()
    model = load(module, tokenizer=tiny.tokenizer(), device="cpu")
    ids = tiny.ids(3, 10)
    examples = [gradients.example(row, (1, 10), id=str(i)) for i, row in enumerate(ids.tolist())]
    weights = {name: p.detach() for name, p in model.module.named_parameters()}

    def loss(some: dict[str, Tensor], row: Tensor) -> Tensor:
        logits = torch.func.functional_call(model.module, some, (row[None],), {"use_cache": False}).logits[0]
        return nn.functional.cross_entropy(logits[:-1], row[1:])

    expected = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, ids)
    found = fast(model, [examples], dict.fromkeys(weights, ("entries",)))
    for name, gradient in expected.items():
        assert_close(found.squares[name].entries, gradient.square().mean(0), name)


def test_the_bias_of_the_logits_has_a_closed_form() -> None:
    """With one scored token the gradient is p - onehot, so F = mean over the examples of its square."""
    model = edits.double("phi")
    examples = [gradients.example(row, (7, 8), id=str(i)) for i, row in enumerate(tiny.ids(3, 8).tolist())]
    found = fast(model, [examples], {"lm_head.bias": ("entries",)}).squares["lm_head.bias"].entries
    rows = []
    for example in examples:
        p = model.logits(collate([example], model))[0, 6].softmax(0).detach()
        p[example.ids[7]] -= 1
        rows.append(p.square())
    assert_close(found, torch.stack(rows).mean(0))


def test_a_tied_matrix_is_joined_before_it_is_squared() -> None:
    """The squares of its two uses alone do not add up to those of their sum."""
    model, examples = edits.double("gpt2"), gradients.examples(2)
    name = "transformer.wte.weight"
    found = fast(model, [examples], {name: ("entries",)}).squares[name].entries
    apart = load(tiny.module("gpt2", tie_word_embeddings=False).double(), tokenizer=tiny.tokenizer(), device="cpu")
    apart.core.load_state_dict(model.core.state_dict())
    assert apart.core.lm_head.weight is not apart.core.transformer.wte.weight
    both = (name, "lm_head.weight")
    uses = fast(apart, [examples], dict.fromkeys(both, ("entries",))).squares
    used = torch.tensor(sorted({token for example in examples for token in example.ids}))
    unused = torch.ones(len(found), dtype=torch.bool).index_fill_(0, used, False)
    added = sum(uses[n].entries for n in both)
    assert_close(found[unused], added[unused])
    assert float((found - added)[used].abs().max()) > 0.01 * float(found.max())


def test_a_module_called_twice_is_joined_before_it_is_squared() -> None:
    module = tiny.module("gpt2").double()
    module.transformer.h[1] = module.transformer.h[0]
    model = load(module, tokenizer=tiny.tokenizer(), device="cpu")
    examples = gradients.examples(3)
    names = [name for name in model.anatomy.parameters if name.startswith("transformer.h.0")]
    expected = by_loop(model, examples, partial(losses, model))
    found = fast(model, [examples], dict.fromkeys(names, ("entries",)))
    sums = fast(model, [examples], {name: (0,) for name in names})
    assert found.slow == frozenset()
    for name in names:
        assert_close(found.squares[name].entries, expected[name], name)
        assert_close(sums.squares[name].along(0), found.squares[name].along(0), name)


class Doubled(nn.Linear):
    """Twice what a Linear is: its calls do not say so."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Parted(nn.Module):
    """A linear map that gets some positions of several examples at a time, as a list of experts does."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.inner = nn.Linear(n_in, n_out)

    def forward(self, input: Tensor) -> Tensor:
        flat = input.flatten(0, 1)
        return torch.cat([self.inner(flat[:5]), self.inner(flat[5:])]).view(*input.shape[:2], -1)


@pytest.mark.parametrize("odd", [Doubled, Parted])
def test_what_calls_do_not_say_is_found_out_and_done_one_by_one(odd: type[nn.Module]) -> None:
    module = tiny.module("gptj").double()
    place = module.transformer.h[1].mlp
    torch.manual_seed(0)
    place.fc_out = odd(place.fc_out.in_features, place.fc_out.out_features).double()
    model = load(module, tokenizer=tiny.tokenizer(), device="cpu")
    examples = gradients.examples(2)
    found = fast(model, [examples], dict.fromkeys(model.anatomy.parameters, ("entries",)))
    assert found.slow == {name for name in model.anatomy.parameters if "h.1.mlp.fc_out" in name}
    assert len(found.slow) == 2
    for name, value in by_loop(model, examples, partial(losses, model)).items():
        assert_close(found.squares[name].entries, value, name)


def mixture() -> Model:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=3, vocab_size=tiny.VOCAB, pad_token_id=0)
    config._experts_implementation = "eager"  # the default one knows no float64
    torch.manual_seed(0)
    module = MixtralForCausalLM(config)
    tiny.randomise(module, seed=0)
    return load(module.eval().double(), tokenizer=tiny.tokenizer(), device="cpu")


def test_experts_are_exact_too() -> None:
    model, examples = mixture(), gradients.examples(3)
    expected = by_loop(model, examples, partial(losses, model))
    found = fast(model, [examples], dict.fromkeys(model.anatomy.parameters, ("entries",)))
    kinds = {name.split(".mlp.")[1] for name in found.slow or ()}
    assert kinds == {"gate.weight", "experts.gate_up_proj", "experts.down_proj"}
    scores = localize(model, FACTS, "fisher", unit="matrix")
    assert scores.evidence["one_by_one"] == {"parameter": sorted(found.slow or ())}
    assert "one_by_one" not in localize(tiny.model("llama"), FACTS, "fisher").evidence
    for name, value in expected.items():
        assert_close(found.squares[name].entries, value, name)
    with pytest.raises(LoceditError, match="no dense neuron"):
        localize(model, FACTS, "fisher")


@pytest.mark.parametrize("architecture", ["gemma", "qwen3", "opt", "bert"])
def test_half_precision_is_followed_too(architecture: str) -> None:
    """Nothing is taken for unreadable because of rounding, and the sums are near those of float32."""
    model, plain = edits.half(architecture), tiny.model(architecture)
    plain.core.load_state_dict(model.core.state_dict())
    keep = parts_of(model.sites("matrix").values())
    runs = [SquaredGradients(m, keep, loss=partial(losses, m)) for m in (model, plain)]
    for m, run in zip((model, plain), runs, strict=True):
        run.update(collate(gradients.examples(2), m))
        assert run.slow == frozenset()
    totals = [torch.stack([squares.total() for squares in run.squares.values()]) for run in runs]
    assert all(squares.total().dtype == torch.float32 for squares in runs[0].squares.values())
    assert float((totals[0] - totals[1]).abs().max() / totals[1].max()) < 0.1


# --- squares ---------------------------------------------------------------------------------------------------------


def kept(*parts: int | str) -> Squares:
    return Squares((2, 3), parts, dtype=torch.float64, device=torch.device("cpu"))  # pyright: ignore[reportArgumentType]


def by_hand() -> Outer:
    """Two positions: (1, 2) x (1, 0, 1) + (0, 1) x (2, 1, 0) = [[1, 0, 1], [4, 1, 2]]; squares 1 0 1, 16 1 4."""
    left = torch.tensor([[[1.0, 2.0], [0.0, 1.0]]], dtype=torch.float64)
    right = torch.tensor([[[1.0, 0.0, 1.0], [2.0, 1.0, 0.0]]], dtype=torch.float64)
    return Outer(left=left, right=right, lengths=[2])


def test_squares_worked_by_hand() -> None:
    whole, sums, one = kept("entries"), kept(0, 1), kept("all")
    for squares in (whole, sums, one):
        squares.add([by_hand()])
        squares.add([by_hand()])
        squares.divide(2)
        assert float(squares.total()) == 23
    assert whole.entries.tolist() == [[1, 0, 1], [16, 1, 4]]
    for squares in (whole, sums):
        assert squares.along(0).tolist() == [2, 21]
        assert squares.along(1).tolist() == [17, 1, 5]


def test_pieces_join_before_they_are_squared_by_hand() -> None:
    """The embedding's rows (1, 1, 1) and (0, 1, 0) are added to row 0: [[2, 2, 2], [4, 1, 2]]."""
    values = torch.tensor([[[1.0, 1, 1], [0, 1, 0]]], dtype=torch.float64)
    lookup = Lookup(index=torch.tensor([[0, 0]]), values=values)
    alone, joined = kept("entries", 0), kept("entries")
    alone.add([lookup])
    assert alone.entries.tolist() == [[1, 4, 1], [0, 0, 0]]
    joined.add([by_hand(), lookup])
    assert joined.entries.tolist() == [[4, 4, 4], [16, 1, 4]]
    rows = kept(0, 1)
    rows.add([lookup])
    assert (rows.along(0).tolist(), rows.along(1).tolist()) == ([6, 0], [1, 4, 1])
    bias = Squares((2,), ["all"], dtype=torch.float64, device=torch.device("cpu"))
    bias.add([Vectors(values=torch.tensor([[1.0, 2.0], [3.0, 0.0]], dtype=torch.float64))])
    assert bias.entries.tolist() == [10, 4]


@pytest.mark.parametrize("parts", [(0,), (1,), (0, 1), ("all",)])
def test_gram_matrices_give_what_gradients_give(parts: tuple[int | str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged; by Gram matrices where the texts are short, in chunks too, and by gradients where they are long."""
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 2, 4]
    left, right = (torch.randn(3, 5, n, generator=generator, dtype=torch.float64) for n in (40, 30))
    for example, length in enumerate(lengths):
        left[example, length:] = 0
    piece = Outer(left=left, right=right, lengths=lengths)
    expected = torch.stack([left[e].T @ right[e] for e in range(3)]).square().sum(0)
    found = [Squares((40, 30), parts, dtype=torch.float64, device=torch.device("cpu")) for _ in range(3)]  # pyright: ignore[reportArgumentType]
    assert found[0]._shorter(piece)
    found[0].add([piece])
    monkeypatch.setattr("locedit.localize.information.squares.GRAM", 30)
    found[1].add([piece])
    found[2]._add_one_by_one([piece])
    for squares in found:
        assert_close(squares.total(), expected.sum())
        for axis in parts:
            if isinstance(axis, int):
                assert_close(squares.along(axis), expected.sum(1 - axis))
    long = replace(piece, left=left.repeat(1, 9, 1), right=right.repeat(1, 9, 1))
    assert not found[0]._shorter(long)


# --- units -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny.model("llama")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("unit", ["neuron", "head", "row", "column", "matrix"])
def test_a_component_is_the_sum_of_its_weights(architecture: str, unit: str) -> None:
    """Against the weight unit: one component through its own set's mask, and all of a site together."""
    model = tiny.model(architecture)
    weights = localize(model, FACTS, "fisher", unit="weight")
    by_parameter = {
        site.slices[0].param: weights.values[name].double().view(site.slices[0].shape)
        for name, site in weights.sites.items()
    }
    scores = localize(model, FACTS, "fisher", unit=unit)
    for name in list(scores.values)[:5] + list(scores.values)[-1:]:
        chosen = range(4) if unit == "head" else [scores.sites[name].count - 1]
        found = ComponentSet.of(scores.sites, {name: chosen})
        expected = sum(float(by_parameter[p][mask].sum()) for p, mask in found.parameter_mask("train").items())
        assert float(scores.values[name][list(chosen)].sum()) == pytest.approx(expected, rel=1e-4)
    if unit in ("row", "column", "matrix"):
        biases = sum(float(v.sum()) for p, v in by_parameter.items() if v.ndim == 1)
        total = sum(float(value.sum()) for value in by_parameter.values())
        summed = sum(float(value.sum()) for value in scores.values.values())
        assert summed == pytest.approx(total, rel=1e-4)
        assert biases > 0


def test_layers_hold_what_their_parts_hold(model: Model) -> None:
    units = {unit: localize(model, FACTS, "fisher", unit=unit).values for unit in ("layer", "mlp", "attn", "neuron")}
    for layer in range(model.n_layers):
        block = f"blocks.{layer}"
        assert float(units["neuron"][f"{block}.mlp.neuron"].sum()) == pytest.approx(float(units["mlp"][f"{block}.mlp"]))
        norms = float(units["layer"][f"{block}.layer"] - units["mlp"][f"{block}.mlp"] - units["attn"][f"{block}.attn"])
        assert norms > 0


def test_mean_divides_by_the_number_of_weights(model: Model) -> None:
    """A neuron of a gated MLP has three rows of d_model; matrices of other sizes change places."""
    total, mean = (localize(model, FACTS, "fisher", reduce=reduce) for reduce in ("sum", "mean"))
    site = "blocks.1.mlp.neuron"
    torch.testing.assert_close(mean.values[site] * 3 * model.d_model, total.values[site])
    assert mean.evidence["sites"] == total.evidence["sites"]
    first = [localize(model, FACTS, "fisher", unit="matrix", reduce=r).top(1)[0][0] for r in ("sum", "mean")]
    assert first[0] != first[1]


def test_single_weights_are_selected_and_saved(model: Model, tmp_path: Path) -> None:
    scores = localize(model, FACTS, "fisher", unit="weight")
    assert len(scores) == sum(p.numel() for p in model.core.parameters())
    chosen = scores.select(fraction=0.01)
    assert len(chosen) == chosen.parameters() == round(0.01 * len(scores))
    chosen.save(tmp_path / "set.json")
    assert ComponentSet.load(tmp_path / "set.json") == chosen
    values = torch.cat(list(scores.values.values()))
    inside = torch.cat([scores.values[name][mask] for name, mask in chosen.masks.items()])
    assert torch.equal(inside.sort().values, values.sort().values[-len(chosen) :])
    assert len(scores.select(top=7)) == 7


# --- data and options ------------------------------------------------------------------------------------------------


def measured(model: Model, facts: Sequence[Fact] = FACTS, **options: object) -> Information:
    data = Dataset(items=tuple(facts), source="facts")
    settings = FisherOptions(**options)  # pyright: ignore[reportArgumentType]
    return information(model, data, settings, keep=parts_of(model.sites("matrix").values()), what="test")


@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
@pytest.mark.parametrize("labels", ["true", "sampled"])
def test_the_size_of_batches_does_not_matter(architecture: str, labels: str) -> None:
    model = edits.double(architecture)
    runs = [measured(model, labels=labels, **size) for size in ({"batch": 1}, {"batch": 16}, {"memory_mb": 1})]
    for other in runs[1:]:
        assert other.items["id"] == ["anna", "carl", "where"]
        assert other.items["loss"] == pytest.approx(runs[0].items["loss"], rel=1e-12)
        for name, squares in runs[0].squares.items():
            assert_close(other.squares[name].total(), squares.total(), name)


def test_the_loss_is_a_mean_or_a_sum_over_tokens() -> None:
    """With n tokens the sum's gradient is n times the mean's, so its square n^2 times."""
    model = edits.double("gpt2")
    for fact in FACTS:
        mean, total = (measured(model, [fact], loss=loss) for loss in ("mean", "sum"))
        tokens = mean.items["tokens"][0]
        for name, squares in mean.squares.items():
            torch.testing.assert_close(squares.total() * tokens**2, total.squares[name].total())
    assert tokens > 1


def test_sampled_labels_are_draws_of_the_model() -> None:
    """Frequencies near the probabilities (5 standard errors); a seed gives one draw, another gives another."""
    p, count = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64), 4000
    row = Example(id="a", ids=(0,) * (count + 1), spans=(Span(start=1, end=count + 1, label=""),), kind="plain")
    labels, where = torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.long)
    scored = Scored(logits=p.log().expand(count, -1), labels=labels, row=where, rows=(row,))
    drawn = _sampled(scored, 0).labels
    found = torch.bincount(drawn, minlength=4) / count
    assert bool(((found - p).abs() < 5 * (p * (1 - p) / count).sqrt()).all())
    assert torch.equal(drawn, _sampled(scored, 0).labels)
    assert not torch.equal(drawn, _sampled(scored, 1).labels)


def test_the_released_square_is_that_of_the_plain_gradient(model: Model) -> None:
    """Two groups of unequal numbers of tokens: the square of each gradient of the mean, weighted by its tokens."""
    examples = encode(model, FACTS)
    expected: dict[str, Tensor] = {}
    parameters = model.anatomy.parameters
    tokens = [sum(len(e.targets) for e in group) for group in (examples[:2], examples[2:])]
    assert tokens[0] != tokens[1]
    for group, count in zip((examples[:2], examples[2:]), tokens, strict=True):
        scored = score(model, collate(group, model))
        loss = nn.functional.cross_entropy(scored.logits, scored.labels)
        for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            expected[name] = expected.get(name, torch.tensor(0.0)) + count * gradient.square() / sum(tokens)
    released = measured(model, variant="batch_squared", group=2)
    exact = measured(model)
    for name, value in expected.items():
        torch.testing.assert_close(released.squares[name].total(), value.sum(), rtol=1e-4, atol=1e-8)
    ratio = sum(float(s.total()) for s in released.squares.values()) / sum(
        float(s.total()) for s in exact.squares.values()
    )
    assert ratio < 0.9
    one = [measured(model, FACTS[:1], variant=variant, group=1) for variant in ("per_sample", "batch_squared")]
    for name, squares in one[0].squares.items():
        torch.testing.assert_close(squares.total(), one[1].squares[name].total(), rtol=1e-4, atol=1e-8)


# --- relative --------------------------------------------------------------------------------------------------------


def two_tokens() -> Task:
    """Texts with two scored tokens each, so that the sum's loss is twice the mean's."""
    items = [TokenText(ids=tuple(row), span=(8, 10), id=str(i)) for i, row in enumerate(tiny.ids(4, 12).tolist())]
    parts = {"forget": items[:2], "retain": items[2:]}
    return Task(**{role: Dataset(items=tuple(some), source=role) for role, some in parts.items()})


def test_relative_eps_does_not_see_the_scale_of_the_loss_and_the_released_one_does(model: Model) -> None:
    task, site = two_tokens(), "blocks.0.mlp.neuron"
    for ratio in ("weights", "components"):
        one, two = (localize(model, task, "relative_fisher", loss=loss, ratio=ratio) for loss in ("mean", "sum"))
        torch.testing.assert_close(one.values[site], two.values[site], rtol=1e-4, atol=0.0)
        one, two = (
            localize(model, task, "relative_fisher", loss=loss, ratio=ratio, eps="release") for loss in ("mean", "sum")
        )
        assert float((one.values[site] / two.values[site] - 1).abs().max()) > 0.01


@pytest.mark.parametrize("ratio", ["weights", "components"])
def test_relative_is_forget_over_retain(model: Model, ratio: str) -> None:
    """From the two runs of fisher; the sum of ratios and the ratio of sums are not the same, but for single weights."""
    task = edits.task()
    assert task.retain is not None
    forget, retain = (localize(model, data, "fisher", unit="weight") for data in (task.forget, task.retain))
    mean = float(torch.cat(list(retain.values.values())).double().mean())
    found = localize(model, task, "relative_fisher", unit="weight", ratio=ratio, eps=0.3)
    for name, value in found.values.items():
        expected = forget.values[name] / (retain.values[name] + 0.3 * mean)
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-6 * float(expected.max()))
    sites = found.evidence["sites"]
    assert sites["eps"][0] == pytest.approx(0.3 * mean, rel=1e-4)
    name = "blocks.1.mlp.out.weight"
    place = sites["site"].index(name)
    assert sites["below_eps"][place] == pytest.approx(
        float((retain.values[name] < 0.3 * mean).float().mean()), abs=2e-3
    )
    assert sites["mean_forget"][place] == pytest.approx(float(forget.values[name].mean()), rel=1e-4)
    assert sites["mean_retain"][place] == pytest.approx(float(retain.values[name].mean()), rel=1e-4)
    rows = localize(model, task, "relative_fisher", unit="row", ratio=ratio, eps=0.3).values["blocks.1.mlp.out.row"]
    summed = found.values[name].view(model.d_model, -1).sum(1)
    if ratio == "weights":
        torch.testing.assert_close(rows, summed, rtol=1e-3, atol=1e-4)
    else:
        top = forget.values[name].view(model.d_model, -1).mean(1)
        bottom = retain.values[name].view(model.d_model, -1).mean(1) + 0.3 * mean
        torch.testing.assert_close(rows, top / bottom * model.d_mlp, rtol=1e-3, atol=1e-4)
        assert float((rows / summed - 1).abs().max()) > 0.1


def test_a_large_eps_ranks_like_forget_alone(model: Model) -> None:
    task, site = edits.task(), "blocks.0.mlp.neuron"
    plain = localize(model, task, "fisher").values[site].argsort()
    orders = {e: localize(model, task, "relative_fisher", eps=e).values[site].argsort() for e in (1e6, 1e-3)}
    assert torch.equal(orders[1e6], plain)
    assert not torch.equal(orders[1e-3], plain)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("relative_fisher", {}, "relative_fisher needs 'retain' data"),
        ("relative_fisher", {"eps": 0.0}, "eps=0.0 must be above 0, or 'release'"),
        ("relative_fisher", {"eps": "released"}, "relative_fisher: eps='released' is not float or 'release'"),
        ("fisher", {"group": 0}, "group=0 must be at least 1"),
        ("fisher", {"variant": "batch_squared", "labels": "sampled"}, "goes with loss='mean' and labels='true'"),
        ("fisher", {"unit": "neurons"}, "did you mean 'neuron'"),
    ],
)
def test_wrong_options_are_one_line(name: str, options: dict[str, object], message: str, model: Model) -> None:
    with pytest.raises(LoceditError, match=message):
        localize(model, FACTS, name, **options)


# --- manners ---------------------------------------------------------------------------------------------------------


def test_the_module_is_left_as_it_was(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """After success and after a failure in the backward pass: hooks, gradients and what asks for them."""
    weight = model.parameter("lm_head.weight")
    weight.grad = torch.ones_like(weight)
    state = [p.requires_grad for p in model.core.parameters()]
    assert any(state)

    def fails(self: Squares, pieces: object) -> None:  # noqa: ARG001
        raise RuntimeError("stop")

    for variant in ("per_sample", "batch_squared"):
        localize(model, FACTS, "fisher", unit="matrix", variant=variant)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stop"):
        patch.setattr(Squares, "add", fails)
        localize(model, FACTS, "fisher", unit="matrix")
    assert edits.hooks_left(model.module) == 0
    assert [p.requires_grad for p in model.core.parameters()] == state
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert all(p.grad is None for p in model.core.parameters() if p is not weight)
    assert all(not p._post_accumulate_grad_hooks for p in model.core.parameters())  # pyright: ignore[reportPrivateUsage]
    weight.grad = None


def test_single_weights_cost_the_models_size_and_the_estimate_says_so(model: Model) -> None:
    size = 4 * sum(p.numel() for p in model.core.parameters())
    cost = {unit: estimate(model, edits.task(), "fisher", unit=unit).bytes for unit in ("neuron", "weight")}
    assert cost["weight"] > cost["neuron"] + size
    relative = estimate(model, edits.task(), "relative_fisher", unit="weight").bytes
    assert relative > cost["weight"] + 0.9 * size
    assert estimate(model, edits.task(), "fisher", batch=1).bytes < cost["neuron"]


def test_it_runs_where_gradients_are_off(model: Model) -> None:
    with torch.inference_mode():
        inside = localize(model, FACTS, "fisher")
    outside = localize(model, FACTS, "fisher")
    for name, value in outside.values.items():
        torch.testing.assert_close(inside.values[name], value)


STORIES = Path(os.environ.get("LOCEDIT_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data")) / "stories260K"


@pytest.mark.skipif(not STORIES.exists(), reason="the story model is not there")
def test_the_weights_of_a_real_model_are_selected_and_saved(tmp_path: Path) -> None:
    """The best hundredth of its 260,032 weights holds far more of the information than a hundredth."""
    model = load(STORIES, device="cpu")
    text = "Once upon a time, there was a little girl named Lily. She lived at 12 Rose Street with her mom."
    private = PrivateText(text=text, spans=((text.index("12 Rose"), text.index(" with"), "address"),), id="lily")
    scores = localize(model, [private], "fisher", unit="weight")
    chosen = scores.select(fraction=0.01)
    assert len(chosen) == 2600
    assert len(scores.select(top=1000) & chosen) == 1000
    chosen.save(tmp_path / "set.json")
    assert ComponentSet.load(tmp_path / "set.json") == chosen
    total = sum(float(value.sum()) for value in scores.values.values())
    held = sum(float(scores.values[name][mask].sum()) for name, mask in chosen.masks.items())
    assert held > 0.2 * total
