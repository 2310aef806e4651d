"""The unlearning depth score by hand: hooks of one's own, formulas on made-up costs, and the two ends of the scale."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from locedit.attacks.depth import DepthOptions, Depths, depth
from locedit.data.encode import Example, encode
from locedit.data.items import Fact, Task
from locedit.edit import Edit
from locedit.edit.regions import Patch, Region
from locedit.errors import LoceditError
from locedit.evaluate import evaluate
from locedit.lab import Lab
from locedit.models import Model, load
from locedit.results import AttackResult
from tests import tiny
from tests.struck import forgotten, share, untouched
from tests.unlearning import dataset, log_probs

PEOPLE = (
    ("Anna Berg was born in", " Oslo", "Anna"),
    ("Carl Dane works as a", " pilot", "Carl"),
    ("Question: where was Eva Frost born? Answer:", " Berg in Oslo", "Eva"),
    ("The e-mail is", " eva@frost.org", "Eva"),
)
FACTS = [Fact(prompt=p, answer=a, id=str(at), owner=o) for at, (p, a, o) in enumerate(PEOPLE)]
PLAIN: dict[str, Any] = {"shallow": False, "draws": 50}


def moved(model: Model, *, size: float, seed: int) -> Model:
    """The same model with noise on every matrix of its blocks."""
    module = copy.deepcopy(model.module)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".h." in name and parameter.ndim > 1:
                parameter.add_(size * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return load(module, tokenizer=model.tokenizer, device="cpu")


def edit_to(model: Model, other: Model) -> Edit:
    """The edit that makes one model of the other."""
    names = [n for n in model.anatomy.parameters if not torch.equal(model.parameter(n), other.parameter(n))]
    chosen = names or list(model.anatomy.parameters)[:1]
    patches = tuple(Patch(region=Region(param=n), values=other.parameter(n).detach().clone()) for n in chosen)
    return Edit(kind="weights", fingerprint=model.fingerprint, patches=patches)


def saved(model: Model, folder: Path) -> str:
    model.module.save_pretrained(folder)  # type: ignore[operator]
    model.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny.model("gpt2")


@pytest.fixture(scope="module")
def retain(model: Model) -> Model:
    return moved(model, size=0.5, seed=1)


@pytest.fixture(scope="module")
def folder(retain: Model, tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(retain, tmp_path_factory.mktemp("retain"))


TASK = Task(forget=dataset("forget", FACTS))


# --- the formula ------------------------------------------------------------------------------------------------------


def test_ratios_are_clipped_and_layers_that_cost_little_do_not_count() -> None:
    lost = torch.tensor([[0.04, 0.5], [1.0, 0.05], [2.0, 1.5]], dtype=torch.float64)
    other = torch.tensor([[9.0, 1.0], [-3.0, 9.0], [1.0, 0.3]], dtype=torch.float64)
    depths = Depths(lost=lost, least=0.05)
    assert depths.counts.tolist() == [[False, True], [True, False], [True, True]]
    assert depths.share(other).tolist() == [[0.0, 1.0], [0.0, 0.0], [0.5, pytest.approx(0.2)]]
    assert depths.score(other).tolist() == pytest.approx([(1 * 0 + 2 * 0.5) / 3, (0.5 * 1 + 1.5 * 0.2) / 2])
    assert depths.score(lost).tolist() == [1.0, 1.0]
    assert depths.score(torch.zeros_like(lost)).tolist() == [0.0, 0.0]
    nowhere = Depths(lost=torch.full((3, 1), 0.05, dtype=torch.float64), least=0.05)
    assert math.isnan(float(nowhere.score(torch.ones(3, 1).double())))


# --- against hooks of one's own ---------------------------------------------------------------------------------------


def streams(model: Model, example: Example) -> list[Tensor]:
    """[pos, d_model] after every block of one text alone."""
    seen: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda *given: seen.append(stream_of(given[2])[0].clone()))
        for block in model.anatomy.blocks
    ]
    with torch.no_grad():
        model.module(torch.tensor([example.ids]))
    for hook in hooks:
        hook.remove()
    return seen


def stream_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def cost(model: Model, example: Example, layer: int, states: Tensor, places: list[int]) -> float:
    """Nats a token that the answer loses in the model with other states after a layer, at some places."""

    def put(_: Any, __: Any, output: Any) -> Any:
        changed = stream_of(output).clone()
        changed[0, places] = states[places]
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    with torch.no_grad():
        whole = log_probs(model, example).mean()
        hook = model.anatomy.blocks[layer].register_forward_hook(put)
        patched = log_probs(model, example).mean()
        hook.remove()
    return float(whole - patched)


def by_hand(model: Model, retain: Model, edited: Model) -> list[float]:
    """The score of every fact that the retain model says less of."""
    found: list[float] = []
    for example in encode(model, FACTS):
        places = [target - 1 for target in example.targets]
        states = [streams(other, example) for other in (retain, edited)]
        total = weight = 0.0
        for layer in range(model.n_layers):
            d1, d2 = (cost(model, example, layer, own[layer], places) for own in states)
            if d1 > 0.05:
                total += d1 * min(max(d2 / d1, 0.0), 1.0)
                weight += d1
        if weight > 0:
            found.append(total / weight)
    return found


def test_it_is_the_score_by_hand_at_the_positions_that_predict(model: Model, retain: Model, folder: str) -> None:
    other = moved(model, size=0.2, seed=2)
    edit = edit_to(model, other)
    with untouched(model):
        found = depth(model, TASK, edit, retain_model=folder, **PLAIN)
    scores = by_hand(model, retain, other)
    mean = sum(scores) / len(scores)
    assert found.headline.n == len(scores) >= 3
    assert found.headline.value == pytest.approx(1 - mean, abs=1e-4)
    assert 0.1 < found.headline.value < 0.9
    first = encode(model, FACTS)[0]
    own = streams(retain, first)[0]
    assert len(first.targets) == 1
    assert cost(model, first, 0, own, [*first.targets]) == 0, "from the answer's own position nothing is predicted"
    assert cost(model, first, 0, own, [first.targets[0] - 1]) != 0
    assert f"unlearning depth score {mean:.2f}" in found.sentence
    again = depth(model, Task(forget=dataset("forget", FACTS[::-1])), edit, retain_model=folder, **PLAIN)
    assert again.headline.value == pytest.approx(found.headline.value, abs=1e-6)


def test_the_ends_of_the_scale(model: Model, retain: Model, folder: str) -> None:
    nothing, everything = edit_to(model, model), edit_to(model, retain)
    found = depth(model, TASK, everything, others={"nothing": nothing}, retain_model=folder, **PLAIN)
    assert found.headline.value == pytest.approx(0, abs=1e-6)
    assert share(found, "other: nothing") == pytest.approx(1, abs=1e-6)
    curves = {curve.name: curve for curve in found.curves}
    assert set(curves) == {"found", "nothing", "retain model"}
    assert curves["nothing"].columns["recovered"] == pytest.approx([1.0] * len(curves["nothing"].x), abs=1e-5)
    assert curves["found"].columns["recovered"] == pytest.approx(curves["retain model"].columns["recovered"], abs=1e-5)
    back = depth(model, TASK, nothing, retain_model=folder, **PLAIN)
    assert "still carry 100% of what the retain model's lack" in back.sentence


def test_where_no_layer_counts_there_is_no_number(model: Model, folder: str) -> None:
    found = depth(model, TASK, edit_to(model, model), retain_model=folder, least=1e6, **PLAIN)
    assert math.isnan(found.headline.value)
    assert found.headline.n == 0
    assert "No unlearning depth score can be given" in found.sentence
    assert "nan" not in found.sentence
    assert "at no layer do 4 items differ from the retain model" in found.note
    assert all(curve.x == () for curve in found.curves)


# --- on a lab ---------------------------------------------------------------------------------------------------------


def test_suppression_in_the_last_mlp_is_shallow_and_the_retain_model_itself_is_deep(
    tiny_lab: Lab, tmp_path: Path
) -> None:
    model = tiny_lab.model
    retain = moved(model, size=2.0, seed=3)
    where = saved(retain, tmp_path / "retain")
    with untouched(model):
        found: AttackResult = depth(model, tiny_lab.task, edit_to(model, retain), retain_model=where, draws=50)
    assert found.headline.value == pytest.approx(0, abs=1e-6)
    assert share(found, "shallow") >= 0.3, "half of what counts lies in the last of two layers, which it changes"
    ordinary = evaluate(
        model,
        tiny_lab.task,
        forgotten(tiny_lab),
        ["depth"],
        metrics=["accuracy"],
        attack_options={"depth": {"retain_model": where, "draws": 50}},
    ).attacks[0]
    assert 0 < ordinary.headline.value < 1
    assert ordinary.headline.low <= ordinary.headline.value <= ordinary.headline.high


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "depth needs the option retain_model: a folder or a hub id"),
        ({"retain_model": "no/such/folder"}, "retain_model='no/such/folder'"),
        ({"retain_model": "x", "least": 0.0}, r"least=0\.0 must be above 0"),
        ({"retain_model": "x", "draws": 0}, "draws=0 must be at least 1"),
    ],
)
def test_wrong_options_give_one_line(model: Model, given: dict[str, Any], words: str) -> None:
    with pytest.raises(LoceditError, match=words) as caught:
        depth(model, TASK, edit_to(model, model), **given)
    assert "\n" not in str(caught.value)


def test_a_retain_model_of_another_shape_is_refused(model: Model, tmp_path: Path) -> None:
    where = saved(tiny.model("gpt2", n_layer=2), tmp_path / "small")
    with pytest.raises(LoceditError, match="has 2 layers of width 48, .* 3 of 48: its states cannot be put into it"):
        depth(model, TASK, edit_to(model, model), retain_model=where)


def test_the_published_threshold_is_the_default() -> None:
    assert DepthOptions().least == 0.05
