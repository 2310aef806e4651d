"""What losses draw, keep from step to step and ask of the data: control vectors, dual variables, other answers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from locedit.data.encode import Example, encode
from locedit.data.items import Dataset, Fact, PlainText, Task
from locedit.edit.objective import Matched
from locedit.edit.regions import whole
from locedit.edit.restrict import Deltas
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.unlearn import METHODS, prepare, unlearn
from locedit.unlearn.rmu import activations, chosen_layer
from tests import edits, tiny
from tests.unlearning import FORGET, RETAIN, dataset, everything, log_probs, private, step_of

# --- rmu --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "bert"])
@pytest.mark.parametrize("positions", ["predicting", "answer", "all"])
def test_rmu_equals_its_formula(architecture: str, positions: str) -> None:
    """Hidden states as transformers gives them, one unpadded example at a time; the unedited ones of a second model."""
    model, edited, start = (edits.double(architecture) for _ in range(3))
    name = model.sites("matrix")["blocks.0.mlp.in.matrix"].slices[0].param
    deltas = Deltas(model, whole({name: model.parameter(name)}))
    with torch.no_grad():
        deltas.parameters[0].add_(0.2 * model.parameter(name))
        edited.parameter(name).mul_(1.2)
    task = everything()
    options = prepare("rmu", task, layer=1, coefficient=5.0, positions=positions, retain_weight=0.5, forget_weight=2.0)
    forget, retain = encode(model, task.forget), encode(model, task.retain)  # type: ignore[arg-type]
    step = step_of(model, start, forget, retain)
    step.held = deltas
    drawn = torch.rand(model.d_model, generator=torch.Generator().manual_seed(0))
    direction = drawn / drawn.norm()
    with torch.no_grad():
        with deltas.active():
            found = METHODS["rmu"].function(step, options)
        steered = [_moved(edited, e, positions, lambda _: 5 * direction.double()) for e in forget]
        kept = [_moved(edited, e, positions, lambda ids: _hidden(start, ids)) for e in retain]
    assert found["forget_loss"].item() == pytest.approx(2.0 * torch.stack(steered).mean().item(), rel=1e-6)
    assert found["retain_loss"].item() == pytest.approx(0.5 * torch.stack(kept).mean().item(), rel=1e-6)
    torch.testing.assert_close(step.state["control"], direction)


def _hidden(model: Model, ids: Tensor) -> Tensor:
    """After block 1."""
    inputs = {"input_ids": ids} | ({} if model.causal else {"attention_mask": torch.ones_like(ids)})
    return model.module(**inputs, output_hidden_states=True).hidden_states[2]


def _moved(model: Model, example: Example, positions: str, target: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean square over d_model and over the example's positions; a masked model has a row for each scored token."""
    rows = [(torch.tensor([example.ids]), list(example.targets))]
    if not model.causal:
        rows = [(torch.tensor([example.ids]), [at]) for at in example.targets]
        for ids, (at,) in rows:
            ids[0, at] = model.tokenizer.mask_token_id
    found: list[Tensor] = []
    for ids, targets in rows:
        squares = (_hidden(model, ids) - target(ids))[0].square().mean(-1)
        shift = 1 if positions == "predicting" and model.causal else 0
        found.append(squares[range(len(squares)) if positions == "all" else [at - shift for at in targets]])
    return torch.cat(found).mean()


def test_rmu_runs_no_block_above_its_layer() -> None:
    """The value is that of the whole run, and neither later blocks nor the unembedding are called."""
    model = tiny.model("llama")
    batch = step_of(model, model, encode(model, everything().forget), []).forget
    called: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
        for name, module in model.module.named_modules()
        if name in ("model.layers.1", "model.layers.2", "lm_head")
    ]
    with torch.no_grad():
        found = activations(model, batch, 1)
        assert called == ["model.layers.1"]
        torch.testing.assert_close(found, _hidden(model, batch.ids))
    for handle in handles:
        handle.remove()


def test_rmu_draws_one_direction_and_keeps_it() -> None:
    model, task = tiny.model("gpt2"), everything()
    options = prepare("rmu", task)
    step = step_of(model, model, encode(model, task.forget), encode(model, task.retain))  # type: ignore[arg-type]
    first = METHODS["rmu"].function(step, options)["forget_loss"]
    again = METHODS["rmu"].function(step, options)["forget_loss"]
    assert torch.equal(first, again)
    step.state.clear()
    assert not torch.equal(first, METHODS["rmu"].function(step, options)["forget_loss"])


def test_rmu_brings_activations_to_the_control_vector() -> None:
    """Trained in the block that writes there, forget activations come near it; retain activations stay."""
    model, task = tiny.model("llama"), everything()
    within = model.components({"blocks.1.mlp.out.matrix": [0]})
    edit = unlearn(model, task, "rmu", within=within, steps=25, learning_rate=4e-2, layer=1, clip=None, coefficient=8.0)
    terms = edit.history
    assert terms["forget_loss"][-1] < 0.3 * terms["forget_loss"][1]
    loose = unlearn(
        model, task, "rmu", within=within, steps=25, learning_rate=4e-2, layer=1, clip=None, coefficient=8.0,
        retain_weight=0.0,
    )  # fmt: skip
    assert "retain_loss" not in loose.history
    retain = encode(model, task.retain)  # type: ignore[arg-type]

    def moved(edit: Any) -> float:
        batch = step_of(model, model, retain, []).forget
        with torch.no_grad():
            before = activations(model, batch, 1)
            with edit.applied(model) as edited:
                return float((activations(edited, batch, 1) - before)[batch.predicting(True)].square().mean())

    assert moved(edit) < 0.5 * moved(loose)


@pytest.mark.parametrize(("layers", "wanted"), [(32, 7), (12, 3), (3, 1), (2, 0)])
def test_rmu_acts_as_deep_as_layer_7_of_32(layers: int, wanted: int) -> None:
    assert chosen_layer(layers, prepare("rmu", everything())) == wanted


def test_rmu_names_a_layer_that_is_not_there() -> None:
    with pytest.raises(LoceditError, match="rmu: layer=3, the model has layers 0 to 2"):
        unlearn(tiny.model("gpt2"), everything(), "rmu", layer=3, steps=1)


def test_rmu_outside_its_reach_says_that_nothing_can_be_trained() -> None:
    model = tiny.model("gpt2")
    with pytest.raises(LoceditError, match="rmu: no parameter of the component set influences the loss"):
        unlearn(model, everything(), "rmu", layer=0, within=model.components({"blocks.2.mlp.neuron": [1]}), steps=1)


# --- pdu --------------------------------------------------------------------------------------------------------------


def retain_losses(model: Model, start: Model, **options: Any) -> tuple[list[float], float]:
    """(the dual variable of each of five steps on a model that does not change, its retain loss)."""
    task = everything()
    chosen = prepare("pdu", task, **options)
    forget, retain = encode(model, task.forget), encode(model, task.retain)  # type: ignore[arg-type]
    step = step_of(model, start, forget, retain)
    duals: list[float] = []
    with torch.no_grad():
        loss = float(torch.stack([-log_probs(model, e).mean() for e in retain]).mean())
        for number in range(1, 6):
            step.number = number
            duals.append(float(METHODS["pdu"].function(step, chosen)["retain_loss"]) / loss)
    return duals, loss


def test_the_dual_variable_follows_its_rule() -> None:
    """dual_1 = 2; dual_{n+1} = max(0, dual_n + 0.5 (loss - epsilon)), with a loss that stays the same."""
    model = edits.double("llama")
    loss = retain_losses(model, model)[1]
    rising, _ = retain_losses(model, model, retain_weight=2.0, epsilon=loss - 1.0, dual_rate=0.5)
    assert rising == pytest.approx([2.0, 2.5, 3.0, 3.5, 4.0])
    falling, _ = retain_losses(model, model, retain_weight=2.0, epsilon=loss + 1.6, dual_rate=0.5)
    assert falling == pytest.approx([2.0, 1.2, 0.4, 0.0, 0.0], abs=1e-9)
    late, _ = retain_losses(model, model, retain_weight=2.0, epsilon=loss - 1.0, dual_rate=0.5, dual_warmup=2)
    assert late == pytest.approx([2.0, 2.0, 2.0, 2.5, 3.0])


def test_the_limit_is_a_multiple_of_the_unedited_loss() -> None:
    model, start = edits.double("llama"), edits.double("llama")
    with torch.no_grad():
        model.parameter("model.layers.1.mlp.down_proj.weight").mul_(1.5)
    loss, unedited = retain_losses(model, start)[1], retain_losses(start, start)[1]
    duals, _ = retain_losses(model, start, retain_weight=10.0, epsilon_ratio=0.9)
    assert duals[1] - duals[0] == pytest.approx(loss - 0.9 * unedited)
    assert loss != pytest.approx(unedited, rel=1e-3)


def test_the_dual_variable_is_of_optimizer_steps_not_of_batches() -> None:
    """Two half batches a step update it once, from their mean."""
    model, task = edits.double("llama"), everything()
    options = prepare("pdu", task, epsilon=0.0, dual_rate=0.5)
    forget, retain = encode(model, task.forget), encode(model, task.retain)  # type: ignore[arg-type]
    state: dict[str, Any] = {}
    parts = (retain[:2], retain[2:])
    halves = [step_of(model, model, forget, part, state=state) for part in parts]
    with torch.no_grad():
        losses = [float(torch.stack([-log_probs(model, e).mean() for e in part]).mean()) for part in parts]
        for number in (1, 2):
            for half, loss in zip(halves, losses, strict=True):
                half.number = number
                found = float(METHODS["pdu"].function(half, options)["retain_loss"])
                wanted = 1.0 if number == 1 else 1.0 + 0.5 * sum(losses) / 2
                assert found == pytest.approx(wanted * loss)


# --- other answers ----------------------------------------------------------------------------------------------------


def text_of(model: Model, example: Example) -> tuple[str, str]:
    """(prompt, answer) of an example."""
    first = example.targets[0]
    return tuple(model.tokenizer.decode(ids) for ids in (example.ids[:first], example.ids[first:]))  # type: ignore[return-value]


def drawn(
    model: Model, task: Task, name: str, **options: Any
) -> dict[str, tuple[Matched, list[list[tuple[str, str]]]]]:
    """Role -> (what the method draws from, the (prompt, answer) candidates of each forget fact)."""
    method = METHODS[name]
    assert method.others is not None
    found = method.others(model, task, prepare(name, task, **options))
    forget = encode(model, task.forget)
    return {
        role: (data, [[text_of(model, e) for e in data.candidates[example]] for example in forget])
        for role, data in found.items()
        if isinstance(data, Matched)
    }


def test_dpo_prefers_what_is_asked_for() -> None:
    """To the fact's own prompt, with the space with which its answer begins."""
    model, task = tiny.model("gpt2"), everything()
    (data, refusals) = drawn(model, task, "dpo")["preferred"]
    assert data.count == 1
    assert refusals == [[(p, " I do not know."), (p, " Ask Eva Frost.")] for p, _, _ in FORGET]
    wanted = [[" Rome"], [" cook", " baker"], [" carl@dane.org"], [" Carl in Lima"]]
    (_, others) = drawn(model, task, "dpo", preferred="alternatives")["preferred"]
    assert others == [[(p, a) for a in answers] for (p, _, _), answers in zip(FORGET, wanted, strict=True)]
    (_, new) = drawn(model, task, "dpo", preferred="new_answer")["preferred"]
    assert new == [[(p, n)] for p, _, n in FORGET]


def test_alternatives_go_by_id_or_by_prompt() -> None:
    model = tiny.model("gpt2")
    facts = [Fact(prompt="another prompt", answer=" Rome", id=f"f{i}") for i in range(3)]
    facts += [Fact(prompt=FORGET[3][0], answer=" cook", id="x"), Fact(prompt=FORGET[0][0], answer=" Lima", id="y")]
    task = everything(alternatives=dataset("alternatives", facts))
    (_, found) = drawn(model, task, "dpo", preferred="alternatives")["preferred"]
    assert [[answer for _, answer in answers] for answers in found] == [
        [" Rome", " Lima"],
        [" Rome"],
        [" Rome"],
        [" cook"],
    ]
    assert [{prompt for prompt, _ in answers} for answers in found] == [{prompt} for prompt, _, _ in FORGET]


def test_an_answer_begins_as_the_facts_own_does() -> None:
    """A prompt that ends with a space takes its answers, and so the refusals, without one."""
    model = tiny.model("gpt2")
    facts = [Fact(prompt="Answer:", answer=" Oslo", id="a"), Fact(prompt="Answer:\n", answer="Oslo", id="b")]
    (_, found) = drawn(model, everything(forget=dataset("forget", facts)), "dpo")["preferred"]
    assert [answers[0][1] for answers in found] == [" I do not know.", "I do not know."]


def test_llmu_draws_answers_of_others_never_the_own() -> None:
    model, task = tiny.model("gpt2"), everything()
    pairs = (*RETAIN[:2], ("In", " pilot"), *RETAIN[2:])
    retain = dataset("retain", [Fact(prompt=p, answer=a, id=f"r{i}") for i, (p, a) in enumerate(pairs)])
    texts = [" baker", " Lima", " pilot", " was Anna", " 555-0134"]
    (data, found) = drawn(model, everything(retain=retain), "llmu", mismatches=3)["mismatch"]
    assert data.count == 3
    assert [[a for _, a in answers] for answers in found] == [texts, texts[:2] + texts[3:], texts, texts]
    (fewer, _) = drawn(model, everything(retain=retain), "llmu", mismatches=50)["mismatch"]
    assert fewer.count == 4
    (_, plain) = drawn(
        model, everything(new=dataset("new", [PlainText(text="a cook", id="c")])), "llmu", mismatch_from="new"
    )["mismatch"]
    assert [[a for _, a in answers] for answers in plain] == [[" a cook"]] * 4
    assert METHODS["llmu"].others(model, task, prepare("llmu", task, mismatch_weight=0.0)) == {}  # type: ignore[misc]


def test_llmu_terms_are_logged_one_by_one() -> None:
    model, task = tiny.model("gpt2"), everything()
    history = unlearn(model, task, "llmu", steps=2, batch_size=3).history
    assert {"forget_loss", "mismatch_loss", "retain_loss"} <= history.keys()
    for i in (1, 2):
        parts = sum(history[term][i] for term in ("forget_loss", "mismatch_loss", "retain_loss"))
        assert history["loss"][i] == pytest.approx(parts)
    assert "mismatch_loss" not in unlearn(model, task, "llmu", steps=1, mismatch_weight=0.0).history


def test_draws_differ_from_step_to_step_and_follow_the_seed() -> None:
    """With SGD at a rate that changes nothing, only the drawn refusals differ."""
    model, task = tiny.model("gpt2"), everything()
    own = {"steps": 4, "optimizer": "sgd", "learning_rate": 1e-12, "retain_weight": 0.0}
    first, again, other = (
        unlearn(model, task, "llmu", seed=seed, mismatches=1, **own).history["mismatch_loss"][1:] for seed in (0, 0, 1)
    )
    assert first == again != other
    assert len({round(value, 4) for value in first}) > 2


# --- what methods ask of the data -------------------------------------------------------------------------------------


def bare(**changes: Any) -> Dataset:
    """The forget facts without new answers, with changes to the first."""
    facts = [dataclasses.replace(f, new_answer=None) for f in everything().forget.of(Fact, by="test")]
    return dataset("forget", [dataclasses.replace(facts[0], **changes), *facts[1:]])


def facts_with_new(*new: str) -> Dataset:
    """The first forget facts with these new answers."""
    facts = everything().forget.of(Fact, by="test")
    return dataset("forget", [dataclasses.replace(f, new_answer=n) for f, n in zip(facts, new, strict=False)])


@pytest.mark.parametrize(
    ("name", "parts", "options", "message"),
    [
        ("dpo", {"refusals": None}, {}, "dpo needs 'refusals' data, .* add refusals.jsonl"),
        ("dpo", {"alternatives": None}, {"preferred": "alternatives"}, "dpo needs 'alternatives' data"),
        (
            "dpo", {"alternatives": dataset("alternatives", [Fact(prompt="x", answer=" y", id="f1")])},
            {"preferred": "alternatives"}, "alternatives.jsonl has none with the id 'f0' or the prompt 'Anna Berg was",
        ),
        (
            "dpo", {"alternatives": dataset("alternatives", [Fact(prompt="x", answer=" Oslo", id="f0")])},
            {"preferred": "alternatives"}, "dpo needs another answer to 'f0'; alternatives.jsonl gives its own, 'Oslo'",
        ),
        (
            "dpo", {"alternatives": dataset("alternatives", [Fact(prompt="x", answer=" oslo.", id="f0")])},
            {"preferred": "alternatives"}, "dpo needs another answer to 'f0'; .* gives its own, 'oslo.'",
        ),
        ("dpo", {"forget": bare()}, {"preferred": "new_answer"}, "dpo needs the field 'new_answer', which 'f0'"),
        (
            "dpo", {"forget": facts_with_new(" Rome", "pilot ")}, {"preferred": "new_answer"},
            "dpo needs another answer to 'f1'; 'new_answer' in forget.jsonl gives its own, 'pilot'",
        ),
        (
            "injection", {"forget": facts_with_new(" Oslo", " baker")}, {},
            "injection needs another answer to 'f0'; 'new_answer' in forget.jsonl gives its own, 'Oslo'",
        ),
        (
            "dpo", {"refusals": dataset("refusals", [PlainText(text="Oslo", id="r")])}, {},
            "dpo needs another answer to 'f0'; refusals.jsonl gives its own, 'Oslo'",
        ),
        ("dpo", {"forget": private()}, {}, "dpo needs forget items of kind Fact"),
        ("injection", {"forget": bare(new_answer=" Rome")}, {}, "injection needs the field 'new_answer', which 'f1'"),
        ("injection", {"texts": None}, {"texts_weight": 1.0}, "needs 'texts' data"),
        ("unlikelihood", {"texts": None}, {"texts_weight": 1.0}, "needs 'texts' data"),
        ("llmu", {"new": None}, {"mismatch_from": "new"}, "llmu needs 'new' data"),
        ("llmu", {"retain": None}, {"retain_weight": 0.0}, "llmu needs 'retain' data"),
        ("llmu", {"retain": private()}, {}, "llmu needs facts or plain texts, these are 'private'"),
        (
            "llmu", {"new": dataset("new", [PlainText(text="pilot", id="p")])}, {"mismatch_from": "new"},
            "llmu needs another answer to 'f1'; new.jsonl gives its own, 'pilot'",
        ),
        ("kl", {"retain": None}, {}, "kl needs retain data.*--retain-weight 0"),
        ("pdu", {"retain": None}, {}, "pdu needs retain data"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said_in_one_line_without_a_model(
    name: str, parts: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(LoceditError, match=message) as raised:
        prepare(name, everything(**parts), **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["ceu", "undial"])
def test_methods_that_publish_no_retain_term_need_no_retain_data(name: str) -> None:
    edit = unlearn(tiny.model("gpt2"), everything(retain=None), name, steps=1)
    assert "retain_loss" not in edit.history


def test_what_only_the_tokens_tell_is_one_line_too() -> None:
    with pytest.raises(LoceditError, match=r"ceu: skip=1 leaves nothing of 'f0', whose answer has 1 token\(s\)"):
        unlearn(tiny.model("gpt2"), everything(), "ceu", skip=1, steps=1)
    with pytest.raises(LoceditError, match="undial: tokens='as_published' is of causal models"):
        unlearn(tiny.model("bert"), everything(), "undial", tokens="as_published", steps=1)


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.trained and not m.kinds and m.learns is None])
def test_spans_of_texts_can_be_forgotten(name: str) -> None:
    """Losses on scored tokens do not care what the tokens are of."""
    model = tiny.model("gpt2")
    own: dict[str, Any] = {"quark": {"quantiles": 1}}.get(name, {})
    edit = unlearn(model, everything(forget=private()), name, steps=1, **own)
    assert edit.history["loss"][1] is not None


def test_real_checkpointing_keeps_the_gradient_of_rmu() -> None:
    """Its forward pass ends early, inside a block that is run again in the backward pass."""
    model, task = tiny.model("llama"), everything()
    own: dict[str, Any] = {"steps": 2, "layer": 1, "learning_rate": 1e-2}
    plain, again = (unlearn(model, task, "rmu", gradient_checkpointing=on, **own) for on in (False, True))
    for first, second in zip(plain.patches, again.patches, strict=True):
        torch.testing.assert_close(first.delta, second.delta, rtol=1e-4, atol=1e-6)
