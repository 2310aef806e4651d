"""Quantization as an attack: what stays within the cells comes back bit for bit, what was never known does not."""

import copy

import pytest
import torch
from torch import Tensor

from locedit.attacks import ATTACKS
from locedit.attacks.aim import Aim, ItemOptions, aimed
from locedit.attacks.quantization import QuantizationOptions, quantization
from locedit.attacks.shared import Shared
from locedit.attacks.within_cells import MARGIN, cells, within_cells
from locedit.data.encode import encode
from locedit.edit import Edit, levels
from locedit.errors import LoceditError
from locedit.evaluate import evaluate
from locedit.lab import Lab
from locedit.models import Model, load
from locedit.quantization import SCHEMES, linear_weights, quantized, rounded
from locedit.results import AttackResult
from locedit.unlearn import unlearn
from tests.struck import level, share, state, untouched
from tests.test_quantization import BOTH, matrix


def _aim(model: Model, lab: Lab) -> Aim:
    return aimed(model, lab.task, ItemOptions(), by="test", learns=False, shared=Shared(), narrow=None)


def _probability(model: Model, lab: Lab) -> float:
    return levels(model, {"forget": encode(model, lab.task.forget)})["forget"]


def _with_outliers(lab: Lab) -> Model:
    """The same function with one large weight in every row of the last matrices, on an input that is always 0.

    Large models have such outliers; the cells of int8 are as wide as the largest weight of a row makes them.
    """
    module = copy.deepcopy(lab.model.module)
    with torch.no_grad():
        for block in module.transformer.h:
            neuron = int(block.mlp.c_proj.weight.norm(dim=1).argmin())
            block.mlp.c_fc.weight[:, neuron] = 0.0
            block.mlp.c_fc.bias[neuron] = -50.0
            block.mlp.c_proj.weight[neuron] = 30 * block.mlp.c_proj.weight.abs().max()
    return load(module, tokenizer=lab.model.tokenizer, device="cpu")


def _forgotten(model: Model, lab: Lab) -> Edit:
    """An ordinary edit that leaves less than is guessed of items never known."""
    return unlearn(model, lab.task, "npo", steps=60, learning_rate=1e-3, retain_weight=1.0, until=0.1, check=False)


@pytest.fixture(scope="module")
def edit(tiny_lab: Lab) -> Edit:
    return _forgotten(tiny_lab.model, tiny_lab)


@pytest.fixture(scope="module")
def hidden(tiny_lab: Lab) -> Edit:
    """The control of NF4."""
    edits, note = within_cells(_aim(tiny_lab.model, tiny_lab), ItemOptions(), ["nf4"], level=0.1)
    assert not note
    return edits["nf4"]


@pytest.fixture(scope="module")
def found(tiny_lab: Lab, edit: Edit) -> AttackResult:
    with untouched(tiny_lab.model):
        return quantization(tiny_lab.model, tiny_lab.task, edit, schemes=("nf4",), draws=100)


# --- cells ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_any_weights_within_their_cells_are_rounded_to_the_same_bits(name: str, dtype: torch.dtype) -> None:
    weight = matrix(8, 208).to(dtype)
    low, high = cells(weight, SCHEMES[name])
    expected = rounded(weight, SCHEMES[name])
    assert bool(((low <= weight) & (weight <= high)).all())
    generator = torch.Generator().manual_seed(0)
    for share_of_cell in (torch.zeros(8, 208), torch.ones(8, 208), torch.rand(8, 208, generator=generator)):
        inside = torch.lerp(low.double(), high.double(), share_of_cell.double()).to(dtype)
        assert torch.equal(rounded(inside, SCHEMES[name]), expected)
        assert not torch.equal(inside, weight)
    width = (high - low).double()
    assert not torch.equal(rounded((weight + 1.2 * width).to(dtype), SCHEMES[name]), expected)


@pytest.mark.parametrize("name", BOTH)
def test_cells_are_as_wide_as_they_can_be(name: str) -> None:
    """A step over the margin is a step into the next cell; a weight that is the absmax of its group does not move."""
    weight = matrix(4, 128)
    low, high = cells(weight, SCHEMES[name])
    scheme = SCHEMES[name]
    groups = scheme.groups(weight)
    largest = (groups.abs() == groups.abs().amax(1, keepdim=True)).flatten().view(weight.shape)
    assert torch.equal(low[largest], weight[largest])
    assert torch.equal(high[largest], weight[largest])
    room = high > low
    assert float(room.double().mean()) > 0.9
    beyond = high + 1.3 * MARGIN / (1 - 2 * MARGIN) * (high - low) + 1e-3 * (high - low)
    over = rounded(torch.where(largest, weight, beyond), scheme) != rounded(weight, scheme)
    assert float(over[room & (high > weight)].double().mean()) > 0.8


# --- the control ------------------------------------------------------------------------------------------------------


def _same_bits_when_quantized(model: Model, edit: Edit, scheme: str) -> None:
    with quantized(model, scheme):
        unedited = state(model)
    with edit.applied(model) as edited, quantized(edited, scheme):
        now: dict[str, Tensor] = state(edited)
    assert all(torch.equal(now[name], unedited[name]) for name in unedited)


def test_the_control_of_nf4_is_the_quantized_unedited_model_bit_for_bit(tiny_lab: Lab, hidden: Edit) -> None:
    model = tiny_lab.model
    with untouched(model):
        _same_bits_when_quantized(model, hidden, "nf4")
        with hidden.applied(model):
            assert _probability(model, tiny_lab) <= 0.1
            with quantized(model, "nf4"):
                assert _probability(model, tiny_lab) >= 0.9
            with quantized(model, "int8"):
                assert _probability(model, tiny_lab) <= 0.2, "int8 is too fine to undo it"
    assert {patch.region.param for patch in hidden.patches} == set(linear_weights(model))


def test_the_control_of_int8_is_the_quantized_unedited_model_bit_for_bit(tiny_lab: Lab) -> None:
    model = _with_outliers(tiny_lab)
    edits, note = within_cells(_aim(model, tiny_lab), ItemOptions(), ["int8"], level=0.2)
    assert not note
    with untouched(model):
        _same_bits_when_quantized(model, edits["int8"], "int8")
        with edits["int8"].applied(model):
            assert _probability(model, tiny_lab) <= 0.2
            with quantized(model, "int8"):
                assert _probability(model, tiny_lab) >= 0.9


def test_a_control_in_half_precision_stays_in_its_cells_after_rounding(tiny_lab: Lab) -> None:
    module = copy.deepcopy(tiny_lab.model.module).to(torch.bfloat16)
    model = load(module, tokenizer=tiny_lab.model.tokenizer, device="cpu")
    edits, _ = within_cells(_aim(model, tiny_lab), ItemOptions(shallow_steps=60), ["nf4"], level=0.3)
    _same_bits_when_quantized(model, edits["nf4"], "nf4")
    with edits["nf4"].applied(model):
        assert _probability(model, tiny_lab) <= 0.3


# --- the attack -------------------------------------------------------------------------------------------------------


def test_what_is_hidden_within_the_cells_comes_back_and_an_ordinary_edit_does_not(found: AttackResult) -> None:
    assert share(found, "shallow: an edit within the nf4 cells") >= 0.9
    assert level(found, "forget", "after") < 0.3 < 0.9 < level(found, "forget", "before")
    assert level(found, "heldout", group="never knew") < 0.5
    never = level(found, "heldout", group="never knew")
    back = (level(found, "forget") - never) / (level(found, "forget", "before") - never)
    assert found.headline.value == pytest.approx(back)
    assert back < 0.3
    assert found.sentence.startswith("With quantized weights, ")


def test_an_edit_that_only_hides_is_found_out(tiny_lab: Lab, hidden: Edit) -> None:
    result = quantization(tiny_lab.model, tiny_lab.task, hidden, shallow=False, draws=100)
    assert level(result, "forget", "after") < 0.3
    assert result.headline.value >= 0.9
    assert result.settings["doses"] == ["4", "4"]
    assert "With quantized weights (bits 4), it comes back" in result.sentence
    curve = next(curve for curve in result.curves if curve.name == "found")
    assert curve.x == (32, 8, 4)
    assert curve.columns["recovered"][0] == curve.columns["recovered"][1] < curve.columns["recovered"][2]


@pytest.mark.slow
def test_a_scheme_whose_cells_are_too_narrow_to_hide_anything_is_named(tiny_lab: Lab, edit: Edit) -> None:
    model, task = tiny_lab.model, tiny_lab.task
    few = {"shallow_steps": 120, "draws": 100}
    both = quantization(model, task, edit, **few)
    assert "no edit within the int8 cells was found that hides the answers" in both.note
    shallow = [curve for curve in both.curves if curve.role == "shallow"]
    assert {curve.name for curve in shallow} == {"an edit within the nf4 cells"}
    assert {curve.x for curve in shallow} == {(4,)}, "at 8 bits it says nothing"
    assert share(both, "shallow") >= 0.9
    alone = quantization(model, task, edit, schemes=("int8",), **few)
    assert "no edit within the int8 cells" in alone.note
    assert "there is no edit made to come back" in alone.note
    assert all(curve.role != "shallow" for curve in alone.curves)


@pytest.mark.slow
def test_int8_brings_back_its_control_where_weights_have_outliers(tiny_lab: Lab) -> None:
    model = _with_outliers(tiny_lab)
    edit = _forgotten(model, tiny_lab)
    result = quantization(model, tiny_lab.task, edit, schemes=("int8", "nf4"), draws=100)
    assert share(result, "shallow: an edit within the int8 or nf4 cells") >= 0.9
    shallow = [curve for curve in result.curves if curve.role == "shallow"]
    assert all(curve.x == (8, 4) and min(curve.columns["recovered"]) > 0.7 for curve in shallow)


@pytest.mark.slow
def test_what_is_held_beside_the_weights_is_said_to_stay_as_it_is(tiny_lab: Lab, found: AttackResult) -> None:
    edit = unlearn(tiny_lab.model, tiny_lab.task, "npo", steps=1, hold="adapter", check=False)
    options = {"controls": False, "draws": 20, "schemes": ("nf4",)}
    made = quantization(tiny_lab.model, tiny_lab.task, edit, **options)
    assert "what the edit holds beside the weights (adapter) stays in full precision" in made.note
    assert "full precision" not in found.note


def test_both_backends_give_the_same_result(tiny_lab: Lab, edit: Edit, found: AttackResult) -> None:
    pytest.importorskip("bitsandbytes")
    again = quantization(tiny_lab.model, tiny_lab.task, edit, schemes=("nf4",), draws=100, backend="bitsandbytes")
    assert again.settings["backend"] == "bitsandbytes"
    assert found.settings["backend"] == "torch", "on a CPU the same bits are had without the library"
    assert again.measures == found.measures
    assert again.curves == found.curves


def test_it_runs_from_evaluate_and_says_what_it_takes(tiny_lab: Lab, edit: Edit) -> None:
    options = {"quantization": {"schemes": ("nf4",), "shallow": False, "draws": 50}}
    result = evaluate(
        tiny_lab.model, tiny_lab.task, edit, ["quantization"], metrics=["accuracy"], attack_options=options
    )
    assert result.attacks[0].name == "quantization"
    assert ATTACKS["quantization"].access == "weights"


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"schemes": ("int4",)}, "quantization scheme 'int4'"),
        ({"schemes": ()}, r"schemes=\(\) must be one or more"),
        ({"schemes": ("nf4", "int8")}, "from the most bits to the fewest"),
        ({"schemes": ("nf4", "nf4")}, "each once"),
        ({"backend": "gptq"}, "backend"),
    ],
)
def test_wrong_options_give_one_line(tiny_lab: Lab, edit: Edit, wrong: dict[str, object], match: str) -> None:
    with pytest.raises(LoceditError, match=match) as caught:
        quantization(tiny_lab.model, tiny_lab.task, edit, **wrong)
    assert "\n" not in str(caught.value)


def test_the_defaults_try_both_schemes() -> None:
    assert QuantizationOptions().schemes == BOTH
