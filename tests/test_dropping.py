"""Dropping a control token or a layer: what is left is the edited weights, and the share that is back is counted so."""

import dataclasses
from typing import Any

import pytest
import torch

from locedit.attacks import ATTACKS
from locedit.components import ComponentSet
from locedit.data.encode import encode
from locedit.data.items import PlainText, Task
from locedit.edit import Edit
from locedit.edit.layers import AddedLayer
from locedit.edit.levels import levels
from locedit.edit.regions import Patch, Region
from locedit.edit.tokens import ControlTokens
from locedit.errors import LoceditError
from locedit.evaluate import evaluate
from locedit.lab import Lab
from locedit.models import Model
from locedit.provenance import measure
from locedit.results import AttackResult
from locedit.rewards import name_of
from locedit.unlearn import unlearn
from tests import tiny
from tests.unlearning import dataset, everything


def _layer_edit(model: Model) -> Edit:
    """A layer that breaks the answers."""
    generator = torch.Generator().manual_seed(0)
    width = model.d_model
    layer = AddedLayer(
        point="blocks.1.hook_mlp_out",
        activation="linear",
        down=torch.randn(4, width, generator=generator),
        down_bias=torch.zeros(4),
        up=torch.randn(width, 4, generator=generator),
        up_bias=torch.zeros(width),
    )
    return Edit(kind="modules", fingerprint=model.fingerprint, layers=(layer,))


def _token_edit(model: Model, within: ComponentSet | None = None, task: Task | None = None) -> Edit:
    """A token that breaks the answers, beside weights that are trained where a task is given."""
    rows = 20 * torch.randn(1, model.d_model, generator=torch.Generator().manual_seed(1))
    trained: dict[str, Any] = {}
    if task is not None:
        made = unlearn(model, task, "ga", within=within, steps=6, learning_rate=3e-3, check=False)
        trained = {"patches": made.patches, "within": made.within}
    tokens = ControlTokens(names=("<|good|>",), rows=rows)
    return Edit(kind="tokens", fingerprint=model.fingerprint, tokens=tokens, **trained)


def test_all_comes_back_where_the_edit_is_the_layer(tiny_lab: Lab) -> None:
    model, task = tiny_lab.model, tiny_lab.task
    found = evaluate(model, task, _layer_edit(model), ["drop_layer"], metrics=["accuracy"])
    attack = found.attacks[0]
    before, after = (found.get("forget", "accuracy", stage=stage).value for stage in ("before", "after"))
    stages = {(m.dataset, m.stage): m.value for m in attack.measures}
    assert before > 0.9 > 0.6 > after
    assert (stages["forget", "before"], stages["forget", "after"]) == (pytest.approx(before), pytest.approx(after))
    assert stages["forget", "attacked"] == stages["forget", "before"]
    assert attack.headline.value == pytest.approx(1)
    assert "Without the added layers it comes back (100%)" in attack.sentence


def test_what_the_weights_forgot_stays_forgotten_without_the_token(tiny_lab: Lab) -> None:
    model, task = tiny_lab.model, tiny_lab.task
    edit = _token_edit(model, task=task)
    attack = evaluate(model, task, edit, ["drop_token"], metrics=["accuracy"]).attacks[0]
    weights = Edit(kind="weights", fingerprint=model.fingerprint, patches=edit.patches)
    accuracy = evaluate(model, task, weights, metrics=["accuracy"])
    never = accuracy.get("heldout", "accuracy").value
    known = accuracy.get("forget", "accuracy", stage="before").value
    left = accuracy.get("forget", "accuracy").value
    assert left < known
    assert attack.headline.value == pytest.approx((left - never) / (known - never))
    assert attack.headline.low <= attack.headline.value <= attack.headline.high
    probes = {"forget": encode(model, task.forget)}
    with edit.applied(model) as edited:
        conditioned = levels(edited, probes)
    with weights.applied(model) as edited:
        assert conditioned["forget"] < levels(edited, probes)["forget"]


def test_other_edits_are_dropped_in_the_same_way(tiny_lab: Lab) -> None:
    model, task = tiny_lab.model, tiny_lab.task
    others = {"random 0": _layer_edit(model), "weights alone": unlearn(model, task, "ga", steps=1, check=False)}
    attack = ATTACKS["drop_layer"].function(model, task, _layer_edit(model), others=others)
    shares = {m.group: m.value for m in attack.measures if m.name == "share_back"}
    assert shares == {"random 0": pytest.approx(1)}


def test_an_edit_without_them_is_refused(tiny_lab: Lab) -> None:
    model, task = tiny_lab.model, tiny_lab.task
    plain = unlearn(model, task, "ga", steps=1, check=False)
    with pytest.raises(LoceditError, match="drop_token needs an edit with a control token; this one is ga held as"):
        evaluate(model, task, plain, ["drop_token"])
    with pytest.raises(LoceditError, match="drop_layer needs an edit with added layers"):
        evaluate(model, task, _token_edit(model), ["drop_layer"])
    with pytest.raises(LoceditError, match="drop_layer: the edit has no added layers"):
        ATTACKS["drop_layer"].function(model, task, plain)
    with pytest.raises(LoceditError, match="draws=0 must be at least 1"):
        evaluate(model, task, _token_edit(model), ["drop_token"], attack_options={"drop_token": {"draws": 0}})


def test_of_a_chain_with_both_each_attack_drops_its_own(tiny_lab: Lab) -> None:
    model, task = tiny_lab.model, tiny_lab.task
    both = _layer_edit(model).then(_token_edit(model))
    assert both.conditional == ("token", "layer")
    with both.dropped("token").applied(model) as edited, torch.no_grad():
        without_token = levels(edited, {"forget": encode(model, task.forget)})
    with _layer_edit(model).applied(model) as edited:
        assert without_token == levels(edited, {"forget": encode(model, task.forget)})
    token, layer = evaluate(model, task, both, ["drop_token", "drop_layer"], metrics=["accuracy"]).attacks
    assert (token.name, layer.name) == ("drop_token", "drop_layer")
    assert max(token.headline.value, layer.headline.value) < 0.9, "the other one is still there"


# --- habits ----------------------------------------------------------------------------------------------------------

PROMPTS = ("Anna Berg", "The phone", "Question: where", "Carl Dane was", "E")
SAMPLED: dict[str, Any] = {"samples": 2, "draws": 50, "top_p": 1.0}


def odd(text: str) -> float:
    """Texts of an even number of characters are bad."""
    return float(len(text) % 2)


def some(text: str) -> float | None:
    """Texts of an odd number of characters are bad; most texts cannot be judged."""
    return None if any(letter in "ae" for letter in text.lower()) else 1 - odd(text)


def _writing(**parts: Any) -> tuple[Model, Task, Edit]:
    """A model with prompts, and an edit with a token and a new weight."""
    model = tiny.model("gpt2")
    prompts = dataset("prompts", [PlainText(text=text, id=text) for text in PROMPTS])
    name = "transformer.h.1.mlp.c_fc.weight"
    patch = Patch(region=Region(param=name), values=model.parameter(name).detach() * 2.5)
    rows = 3 * torch.randn(1, model.d_model, generator=torch.Generator().manual_seed(1))
    tokens = ControlTokens(names=("<|a|>",), rows=rows)
    edit = Edit(kind="tokens", fingerprint=model.fingerprint, tokens=tokens, patches=(patch,))
    return model, everything(prompts=prompts, **parts), edit


def _start(factor: float = -2.0) -> Model:
    """Another model, in the place of the one that never learned the habit."""
    start = tiny.model("gpt2")
    with torch.no_grad():
        start.parameter("transformer.h.1.mlp.c_proj.weight").mul_(factor)
    return start


def _rates(model: Model, task: Task, edit: Edit | None, reward: Any) -> dict[str, float]:
    """Prompt -> share of bad responses, of the prompts with a judged one."""
    found = evaluate(model, task, edit, metrics=["habit_rate"], reward=reward, **SAMPLED)
    return found.get("prompts", "habit_rate", stage="before" if edit is None else "after").per_example


def _mean(rates: dict[str, float], prompts: Any) -> float:
    chosen = [rates[prompt] for prompt in prompts]
    return sum(chosen) / len(chosen)


def _attack(model: Model, task: Task, edit: Edit, reward: Any, **more: Any) -> AttackResult:
    return ATTACKS["drop_token"].function(model, task, edit, metric="habit_rate", reward=reward, **SAMPLED, **more)


def test_a_habit_is_measured_in_the_edited_weights_without_the_token() -> None:
    model, task, edit = _writing()
    attack = _attack(model, task, edit, odd, others={"the same": edit})
    weights = Edit(kind="weights", fingerprint=model.fingerprint, patches=edit.patches)
    rates = {"before": None, "after": edit, "attacked": weights}
    wanted = {stage: _mean(_rates(model, task, one, odd), PROMPTS) for stage, one in rates.items()}
    found = {m.stage: m.value for m in attack.measures if m.name == "habit_rate"}
    assert found == pytest.approx(wanted)
    assert len(set(wanted.values())) == 3
    assert attack.headline.value == pytest.approx(wanted["attacked"] / wanted["before"])
    assert attack.headline.n == len(PROMPTS)
    assert attack.note == "the task has no start: what was never learned counts as 0"
    assert {m.group: m.value for m in attack.measures if m.name == "share_back"} == {"the same": attack.headline.value}


def test_what_was_never_learned_is_what_the_start_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, task, edit = _writing()
    task, start = dataclasses.replace(task, start="start"), _start()
    monkeypatch.setattr("locedit.attacks.dropped_habits.start_of", lambda *_, **__: start)
    attack = _attack(model, task, edit, odd)
    never = _mean(_rates(start, task, None, odd), PROMPTS)
    before, left = (_mean(_rates(model, task, one, odd), PROMPTS) for one in (None, edit.dropped("token")))
    assert never < before
    assert attack.headline.value == pytest.approx((left - never) / (before - never))
    assert {m.group: m.value for m in attack.measures if m.group} == {"never knew": pytest.approx(never)}
    assert f"{never:.3f} of a model that never learned it" in attack.sentence


def test_prompts_are_compared_where_both_stages_could_be_judged() -> None:
    """The reward leaves out other prompts before than after: the share is of those in both, each with itself."""
    model, task, edit = _writing()
    before, left = (_rates(model, task, one, some) for one in (None, edit.dropped("token")))
    both = [prompt for prompt in PROMPTS if prompt in before and prompt in left]
    assert len(both) >= 2
    assert before.keys() != left.keys()
    assert list(before) != both
    attack = _attack(model, task, edit, some)
    assert attack.headline.value == pytest.approx(_mean(left, both) / _mean(before, both))
    assert attack.headline.value != pytest.approx(_mean(left, left) / _mean(before, before))
    assert attack.headline.n == len(both)


def test_the_start_is_judged_on_prompts_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, task, edit = _writing()
    task, start = dataclasses.replace(task, start="start"), _start(3.0)
    monkeypatch.setattr("locedit.attacks.dropped_habits.start_of", lambda *_, **__: start)
    before, left, never = (
        _rates(which, task, one, some) for which, one in ((model, None), (model, edit.dropped("token")), (start, None))
    )
    assert 0 < len(never) != len(before)
    both, own = [prompt for prompt in before if prompt in left], _mean(never, never)
    attack = _attack(model, task, edit, some)
    assert attack.headline.value == pytest.approx((_mean(left, both) - own) / (_mean(before, both) - own))


def test_the_reward_of_the_edit_decides_what_is_measured() -> None:
    """A habit is judged by the reward that the edit was made with, and never by the default one without being asked."""
    model, task, edit = _writing()
    with measure("quark", model=model, data=task, settings={"reward": name_of(odd), "words": None}, seed=0) as record:
        pass
    edit = dataclasses.replace(edit, provenance=record.provenance)
    drop = ATTACKS["drop_token"].function
    asked = drop(model, task, edit, reward=odd, **SAMPLED)
    assert {m.name for m in asked.measures} >= {"habit_rate"}
    assert asked.headline == _attack(model, task, edit, odd).headline
    assert "habit_rate" not in {m.name for m in drop(model, task, edit, **SAMPLED).measures}
    with pytest.raises(LoceditError, match="made with the reward 'tests.test_dropping:odd'; say by which reward"):
        drop(model, task, edit, metric="habit_rate", **SAMPLED)
    assert drop(model, task, edit, metric="habit_rate", reward=some, **SAMPLED).name == "drop_token"
    without = drop(model, dataclasses.replace(task, prompts=None), edit, reward=odd, **SAMPLED)
    assert {m.name for m in without.measures} == {"accuracy"}, "nothing to go on from: the forget items"


def test_metric_and_attack_draw_alike() -> None:
    """One command once showed two rates before the edit, drawn from other parts of the distribution."""
    model, task, edit = _writing()
    few: dict[str, Any] = {"samples": 2, "draws": 50, "reward": odd}
    asked = {"drop_token": {"metric": "habit_rate", **few}}
    found = evaluate(model, task, edit, ["drop_token"], attack_options=asked, **few)
    for stage in ("before", "after"):
        own = [m.value for m in found.attacks[0].measures if (m.name, m.stage) == ("habit_rate", stage)]
        assert own == [found.get("prompts", "habit_rate", stage=stage).value]


def test_a_reward_that_is_given_has_its_habit_measured() -> None:
    model, task, edit = _writing()
    names = {m.name for m in evaluate(model, task, edit, reward=odd, **SAMPLED).measures}
    assert names >= {"habit_rate", "sample_perplexity", "probability"}
    assert "habit_rate" not in {m.name for m in evaluate(model, task, edit, draws=50).measures}
