"""Integrated gradients: the staircase equals the plain loop on every architecture; integrals are complete or marked."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor

from locedit.data.encode import Example
from locedit.errors import LoceditError
from locedit.localize.integration.blocks import adds_mlp_output
from locedit.localize.integration.integrated_gradients import Attribution, GradientOptions, attributions, integrate
from locedit.localize.integration.paths import PathSums
from locedit.localize.integration.quadrature import Rule, rule
from locedit.models import Model
from tests import tiny
from tests.gradients import Float64Throughout, by_loop, distance, example, examples


def scores(model: Model, given: list[Example], **options: object) -> list[Tensor]:
    """Scores `[layer, neuron]` of every example, in order."""
    found = attributions(model, given, GradientOptions(**options))  # pyright: ignore[reportArgumentType]
    return [one.scores for one in sorted(found, key=lambda one: one.index)]


# --- equality ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", tiny.CAUSAL)
def test_the_staircase_is_the_plain_loop(architecture: str) -> None:
    """Two prompts of different length with three scored tokens each, longer than the sliding windows of 6."""
    model = tiny.model(architecture)
    model.module.double()
    with Float64Throughout():
        found = scores(model, examples(2), quadrature="left", steps=3)
        expected = [by_loop(model, one, rule("left", 3)).sum(0) for one in examples(2)]
    assert max(map(distance, found, expected)) <= 1e-10


@pytest.mark.parametrize("architecture", ["gpt2", "gptj", "gpt_neox", "llama", "gemma2"])
@pytest.mark.parametrize(
    ("dtype", "steps", "allowed"), [(torch.float32, 3, 1e-5), (torch.bfloat16, 20, 5e-2)], ids=["float32", "bfloat16"]
)
def test_the_staircase_is_the_plain_loop_up_to_rounding(
    architecture: str, dtype: torch.dtype, steps: int, allowed: float
) -> None:
    """In bfloat16 both round, differently: with a ReLU or few points single tokens can differ by more."""
    model = tiny.model(architecture)
    model.module.to(dtype)
    found = scores(model, examples(1), quadrature="left", steps=steps)
    assert distance(found[0], by_loop(model, examples(1)[0], rule("left", steps)).sum(0)) <= allowed


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "gpt_neo"])
@pytest.mark.parametrize("quadrature", ["gauss", "right", "left", "eleuther"])
def test_every_rule_and_objective_is_the_plain_loop(architecture: str, quadrature: str) -> None:
    model, given = tiny.model(architecture), examples(1)
    for objective in ("probability", "log_probability"):
        found = scores(model, given, quadrature=quadrature, steps=4, objective=objective, span="mean")
        expected = by_loop(model, given[0], rule(quadrature, 4), log=objective == "log_probability").mean(0)
        assert distance(found[0], expected) < 1e-5


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3", "bert", "roberta"])
@pytest.mark.parametrize("quadrature", ["gauss", "right", "left", "eleuther"])
def test_captum_is_the_plain_loop(architecture: str, quadrature: str) -> None:
    """The slow path; for masked models one row a token, the token masked and the other scored tokens visible."""
    model, given = tiny.model(architecture), examples(1)
    found = scores(model, given, quadrature=quadrature, steps=4, path="captum")
    assert distance(found[0], by_loop(model, given[0], rule(quadrature, 4)).sum(0)) < 1e-5


def test_eager_and_sdpa_attention_give_the_same() -> None:
    eager, sdpa = (tiny.model("mistral", attn_implementation=name) for name in ("eager", "sdpa"))
    assert distance(scores(eager, examples(), steps=3)[0], scores(sdpa, examples(), steps=3)[0]) < 1e-5


def test_a_window_that_is_not_seen_would_show() -> None:
    """The contrast to the test above: without its sliding window the same model has other scores."""
    windowed, plain = tiny.model("mistral"), tiny.model("mistral", sliding_window=None)
    assert distance(scores(windowed, examples(1), steps=3)[0], scores(plain, examples(1), steps=3)[0]) > 0.01


# --- execution is not meaning ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neo"])
def test_batches_and_memory_do_not_change_scores(architecture: str) -> None:
    model, given = tiny.model(architecture), examples(4)
    whole = scores(model, given, steps=5)
    one_by_one = scores(model, given, steps=5, batch=1)
    small = scores(model, given, steps=5, memory_mb=1)
    assert max(map(distance, one_by_one, whole)) < 1e-5
    assert max(map(distance, small, whole)) < 1e-5


def test_little_memory_means_many_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The contrast: the budget does divide the rows."""
    from locedit.localize.integration.staircase import Staircase

    passes: list[int] = []
    climb = Staircase._climb  # pyright: ignore[reportPrivateUsage]

    def counted(self: Staircase, rows: object) -> tuple[list[Tensor], list[Tensor]]:
        found = climb(self, rows)  # pyright: ignore[reportArgumentType]
        passes.append(sum(len(part.flatten()) for part in found[0]))
        return found

    monkeypatch.setattr(Staircase, "_climb", counted)
    model = tiny.model("llama")
    scores(model, examples(), steps=20)
    assert len(passes) == 1
    rows = passes.pop()
    scores(model, examples(), steps=20, memory_mb=1)
    assert len(passes) > 3
    assert max(passes) < rows / 3


def test_a_long_span_is_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = tiny.model("gpt2"), example(tiny.ids(1, 20)[0].tolist(), (1, 20))
    whole = scores(model, [text], steps=3)
    monkeypatch.setattr("locedit.localize.integration.integrated_gradients.TARGETS", 4)
    assert distance(scores(model, [text], steps=3)[0], whole[0]) < 1e-5


def test_the_model_is_left_as_it_was() -> None:
    """No hook stays, and parameters ask for gradients as before; also after an error."""
    model = tiny.model("llama")
    frozen = next(iter(model.module.parameters())).requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.module.named_parameters()}
    with torch.inference_mode():
        scores(model, examples(1), steps=2)
    with pytest.raises(LoceditError, match="subject"):
        scores(model, examples(1), steps=2, position="subject")
    assert {name: p.requires_grad for name, p in model.module.named_parameters()} == before
    assert not frozen.requires_grad
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.module.modules())


def test_an_architecture_that_breaks_the_identity_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefix keys that are not the model's own: the row with alpha = 1 no longer gives the model's probability."""
    from locedit.localize.integration.rows import SharedPrefix

    def spoiled(self: SharedPrefix, prefix: Tensor) -> Tensor:
        return prefix[self.prompt] * 0.5

    monkeypatch.setattr(SharedPrefix, "_of_sequences", spoiled)
    with pytest.raises(LoceditError, match="GPT2LMHeadModel does more .* path='captum'"):
        scores(tiny.model("gpt2"), examples(1), steps=2)


# --- numbers by hand ---------------------------------------------------------------------------------------------


def toy() -> Model:
    """One layer, two neurons with values 1 and 2, logits (alpha, 2 alpha, 0) when both are scaled by alpha."""
    config = transformers.OPTConfig(
        vocab_size=3,
        hidden_size=2,
        ffn_dim=2,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=8,
        word_embed_proj_dim=2,
        tie_word_embeddings=False,
        _remove_final_layer_norm=True,
        dropout=0.0,
    )
    module = transformers.OPTForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        layer = module.model.decoder.layers[0]
        layer.fc1.bias.copy_(torch.tensor([1.0, 2.0]))
        layer.fc2.weight.copy_(torch.eye(2))
        module.lm_head.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    return Model(module, tiny.tokenizer(), name="toy")


@pytest.mark.parametrize("path", ["staircase", "captum"])
def test_the_toy_by_hand(path: str) -> None:
    """The log-probability of token 1 is 2a - log(e^a + e^2a + 1): d/d(neuron 0) = -p0, d/d(neuron 1) = 1 - p1.

    Left rule, 2 points: a = 0 gives p = (1, 1, 1) / 3; a = 1/2 gives p = (1.6487, 2.7183, 1) / 5.3670 = (.3072, .5065).
    Neuron 0: 1 * -(.3333 + .3072) / 2 = -.3203. Neuron 1: 2 * ((1 - .3333) + (1 - .5065)) / 2 = 1.1602.
    """
    options = {"quadrature": "left", "steps": 2, "objective": "log_probability", "path": path}
    found = scores(toy(), [example([0, 2, 1], (2, 3))], **options)
    torch.testing.assert_close(found[0], torch.tensor([[-0.3203, 1.1602]]), atol=1e-4, rtol=0)


def test_the_toy_is_complete() -> None:
    """The sum over both neurons is log p(1) - log p(0) = 2 - log(e + e^2 + 1) + log 3 = .6910."""
    options = GradientOptions(objective="log_probability")
    (found,) = attributions(toy(), [example([0, 2, 1], (2, 3))], options)
    assert float(found.scores.sum()) == pytest.approx(0.6910, abs=1e-4)
    assert float(found.start) == pytest.approx(-1.0986, abs=1e-4)
    assert float(found.reached) == pytest.approx(-0.4076, abs=1e-4)
    assert float(found.gap) < 1e-5
    assert bool(found.first)


# --- completeness and adaptive steps -----------------------------------------------------------------------------


@dataclasses.dataclass
class OnePath:
    """A path of one neuron with value 1 along which the objective is a given function, and its derivative."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        self.reached = self.value(torch.ones(1, 1, dtype=torch.float64)).log()
        self.first = self.valid = torch.ones(1, 1, dtype=torch.bool)
        self.steps: list[int] = []

    def integrate(self, rule: Rule, active: Tensor) -> PathSums:
        self.steps.append(rule.steps)
        scores = (rule.weights * self.slope(rule.alphas)).sum() * active[..., None]
        return PathSums(scores=scores, start=self.value(torch.zeros(1, 1, 1, dtype=torch.float64)))


def jump(sharpness: float) -> OnePath:
    """From 0 to 1 at alpha = 0.05, as a memorised fact does."""

    def value(alpha: Tensor) -> Tensor:
        return torch.sigmoid(sharpness * (alpha - 0.05))

    def slope(alpha: Tensor) -> Tensor:
        return sharpness * value(alpha) * (1 - value(alpha))

    return OnePath(value, slope)


def test_smooth_paths_take_eight_points_and_jumps_as_many_as_they_need() -> None:
    smooth = OnePath(lambda a: (a + 1) / 2, lambda a: torch.full_like(a, 0.5))
    found = integrate(smooth, GradientOptions(), layers=1, dtype=torch.float32)
    assert (smooth.steps, float(found.gap)) == ([8], pytest.approx(0, abs=1e-12))
    sharp = jump(200.0)
    found = integrate(sharp, GradientOptions(), layers=1, dtype=torch.float32)
    assert len(sharp.steps) > 2
    assert sharp.steps == [8 * 2**i for i in range(len(sharp.steps))]
    assert int(found.steps) == sharp.steps[-1]
    assert float(found.gap) <= 0.01
    assert not bool(found.incomplete)


def test_what_stays_incomplete_is_marked() -> None:
    hopeless = jump(1e6)
    found = integrate(hopeless, GradientOptions(max_steps=32), layers=1, dtype=torch.float32)
    assert hopeless.steps == [8, 16, 32]
    assert bool(found.incomplete)
    fixed = jump(200.0)
    found = integrate(fixed, GradientOptions(steps=8), layers=1, dtype=torch.float32)
    assert fixed.steps == [8]
    assert bool(found.incomplete)


def test_published_rules_run_as_published() -> None:
    path = jump(200.0)
    integrate(path, GradientOptions(quadrature="right"), layers=1, dtype=torch.float32)
    assert path.steps == [20]


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3"])
def test_the_scores_of_a_layer_sum_to_what_its_neurons_change(architecture: str) -> None:
    """Completeness against a forward pass with the layer's neurons at 0, and not by accident."""
    from locedit import tracing

    model, given = tiny.model(architecture), [example(tiny.ids(1, 10)[0].tolist(), (9, 10))]
    (found,) = attributions(model, given, GradientOptions(objective="log_probability"))
    assert not bool(found.incomplete.any())
    ids, place = torch.tensor([given[0].ids]), 8

    def off(value: Tensor) -> Tensor:
        return torch.where((torch.arange(10) == place)[:, None], 0.0, value)

    for layer in range(model.n_layers):
        with torch.no_grad(), tracing.replace(model, {f"blocks.{layer}.mlp.hook_post": off}):
            zeroed = model.module(ids).logits[0, place].log_softmax(-1)[given[0].ids[9]]
        assert float(found.start[0, layer]) == pytest.approx(float(zeroed), abs=1e-4)
        change = float(found.reached - zeroed)
        assert abs(change) > 1e-3
        assert float(found.scores[layer].sum()) == pytest.approx(change, abs=0.011 * abs(change))


def test_a_norm_after_the_mlp_needs_points_near_the_start() -> None:
    """Gemma 3: twenty even points find next to nothing of the integral; the default finds it with few points."""
    model, given = tiny.model("gemma3"), [example(tiny.ids(1, 10)[0].tolist(), (9, 10))]
    (even,) = attributions(model, given, GradientOptions(quadrature="right", steps=20, objective="log_probability"))
    (found,) = attributions(model, given, GradientOptions(objective="log_probability"))
    change = (found.reached[:, None] - found.start).abs()
    assert bool((even.gap > 0.8 * change).all())
    assert bool((found.gap <= 0.01 * change).all())
    assert int(found.steps.max()) <= 64


def test_more_points_come_closer() -> None:
    model, given = tiny.model("llama"), examples(1)
    exact = scores(model, given, steps=64)[0]
    errors = [distance(scores(model, given, quadrature="right", steps=steps)[0], exact) for steps in (5, 20, 80)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


# --- other positions -----------------------------------------------------------------------------------------------


def test_positions_after_the_subject_do_not_matter_to_it() -> None:
    """Subject and all positions go through captum; "all" over one position is "predicting"."""
    model = tiny.model("gpt2")
    ids = tiny.ids(1, 8)[0].tolist()
    at_end = example(ids, (7, 8), subject=(6, 7))
    assert distance(scores(model, [at_end], steps=4, position="subject")[0], scores(model, [at_end], steps=4)[0]) < 1e-5
    first = example(ids[:2], (1, 2))
    assert distance(scores(model, [first], steps=4, position="all")[0], scores(model, [first], steps=4)[0]) < 1e-5
    early = example(ids, (7, 8), subject=(2, 4))
    assert distance(scores(model, [early], steps=4, position="subject")[0], scores(model, [early], steps=4)[0]) > 0.1


def test_the_last_layer_has_nothing_to_say_about_the_subject() -> None:
    """Neurons of the last layer at an earlier position cannot reach the prediction; those below can."""
    model, one = tiny.model("gpt2"), example(tiny.ids(1, 8)[0].tolist(), (7, 8), subject=(2, 4))
    found = scores(model, [one], steps=4, position="subject")[0]
    assert float(found[-1].abs().max()) == 0
    assert float(found[0].abs().max()) > 0


# --- what can be wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"tolerance": 0.0}, "tolerance=0.0 must be above 0"),
        ({"path": "staircase", "position": "all"}, "path='staircase' does not hold: position='all'"),
        ({"path": "captum", "steps": 1}, "steps=1 is too few"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(LoceditError, match=message):
        scores(tiny.model("gpt2"), examples(1), **options)


def test_a_masked_model_has_no_staircase() -> None:
    with pytest.raises(LoceditError, match="BertForMaskedLM attends in both directions"):
        scores(tiny.model("bert"), examples(1), path="staircase")


def test_an_example_without_scored_tokens_is_named() -> None:
    with pytest.raises(LoceditError, match="item 'empty': nothing in it is scored"):
        scores(tiny.model("gpt2"), [example([5, 6, 7], id="empty")])


def test_the_order_of_examples_is_kept() -> None:
    model, given = tiny.model("gpt2"), examples(3)
    found: list[Attribution] = list(attributions(model, given, GradientOptions(steps=2, batch=2)))
    assert sorted(one.index for one in found) == [0, 1, 2]
    alone = {i: scores(model, [one], steps=2)[0] for i, one in enumerate(given)}
    assert max(distance(one.scores, alone[one.index]) for one in found) < 1e-5


# --- where rows enter ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", tiny.CAUSAL)
def test_rows_are_shifted_only_where_the_mlp_output_is_added_as_it_is(architecture: str) -> None:
    assert adds_mlp_output(tiny.model(architecture)) == (architecture not in ("gemma2", "gemma3"))


def test_a_factor_after_the_mlp_is_noticed() -> None:
    """A dropout that scales, in the place of the one after the MLP: shifting rows by the full output would be wrong."""
    model = tiny.model("gpt_neox")
    for block in model.anatomy.blocks:
        block.post_mlp_dropout = Half()
    assert not adds_mlp_output(model)
    expected = by_loop(model, examples(1)[0], rule("gauss", 4)).sum(0)
    assert distance(scores(model, examples(1), steps=4)[0], expected) < 1e-5


class Half(torch.nn.Module):
    """Halves what goes through."""

    def forward(self, value: Tensor) -> Tensor:
        return value / 2
