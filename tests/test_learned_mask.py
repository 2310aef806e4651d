"""Learned masks: they find a neuron or head that alone carries a fact, pay for removal, and leave weights be."""

import functools
import math

import pytest
import torch

from locedit import tracing
from locedit.data.encode import collate, encode
from locedit.data.items import Dataset, Fact, Task
from locedit.edit.levels import levels
from locedit.errors import LoceditError
from locedit.localize import localize
from locedit.localize.gates import HardConcrete, gates
from locedit.localize.learned_mask import bounded
from locedit.losses import Scored, score, token_log_probs
from locedit.models import Model
from tests import tiny
from tests.edits import bits, hooks_left, same_bits

FACT = Fact(prompt="Anna Berg was born in", answer=" Oslo", id="anna")
RETAIN = [Fact(prompt=p, answer=a, id=p) for p, a in (("Eva Frost works as a", " baker"), ("Question: where", " was"))]
TASK = Task(
    forget=Dataset(items=(FACT,), source="forget.jsonl"), retain=Dataset(items=tuple(RETAIN), source="retain.jsonl")
)
LAYER, NEURON, HEAD = 1, 37, 2
PRICES = {"neuron": 3.0, "head": 0.5}
"with 4 heads the price of one would be 0.75 nats, about what the whole fact is worth"


@functools.cache
def planted(architecture: str, unit: str) -> Model:
    """A model in which one component alone was trained to say the fact; without it the fact is gone."""
    model = tiny.model(architecture)
    place = (LAYER, NEURON) if unit == "neuron" else (LAYER, HEAD)
    site = f"blocks.{place[0]}.{'mlp.neuron' if unit == 'neuron' else 'attn.head'}"
    masks = model.components({site: [place[1]]}).parameter_mask()
    fact, other = (collate(encode(model, items), model) for items in ([FACT], RETAIN))
    with torch.no_grad():
        reference = score(model, other).logits.log_softmax(1)
    optimizer = torch.optim.Adam(model.module.parameters(), lr=0.01)
    for _ in range(300):  # no longer than it takes: what is much larger than the rest saturates the last norm
        if float(token_log_probs(score(model, fact)).sum().detach().exp()) > 0.6:
            break
        optimizer.zero_grad()
        kept = torch.nn.functional.kl_div(
            score(model, other).logits.log_softmax(1), reference, log_target=True, reduction="batchmean"
        )
        (kept - token_log_probs(score(model, fact)).sum()).backward()
        before = {name: parameter.detach().clone() for name, parameter in model.anatomy.parameters.items()}
        optimizer.step()
        with torch.no_grad():
            for name, parameter in model.anatomy.parameters.items():
                outside = ~masks.get(name, torch.zeros_like(parameter, dtype=torch.bool))
                parameter[outside] = before[name][outside]
    model.module.zero_grad(set_to_none=True)
    chosen = model.components({site: [place[1]]})
    probe = {"forget": encode(model, [FACT])}
    assert levels(model, probe)["forget"] > 0.6
    with tracing.ablate(model, chosen):
        assert levels(model, probe)["forget"] < 0.1
    return model


@pytest.mark.parametrize(
    ("unit", "architecture"),
    [
        ("neuron", "llama"),
        ("head", "gpt_neox"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("neuron", "qwen3"), ("head", "llama"))),
    ],
)
def test_it_finds_what_alone_carries_a_fact(unit: str, architecture: str) -> None:
    model = planted(architecture, unit)
    before = bits(model.module)
    scores = localize(model, TASK, "learned_mask", unit=unit, steps=60, price=PRICES[unit], levels=(0.001,))
    site = f"blocks.{LAYER}.{'mlp.neuron' if unit == 'neuron' else 'attn.head'}"
    assert scores.top(1)[0][:2] == (site, NEURON if unit == "neuron" else HEAD)
    assert scores.top(1)[0][2] > 0.6
    assert same_bits(model.module, before)
    assert hooks_left(model.module) == 0
    table = scores.evidence["levels"]
    assert table["gates"][:3] == ["open", "trained", "removed"]
    assert table["components"][2] == 1
    assert table["forget"][0] > 0.6
    assert table["forget"][2] < 0.1
    assert table["retain"][2] > 0.7 * table["retain"][0]
    training = scores.evidence["training"]
    assert training["step"] == list(range(1, 61))
    assert training["forget"][-1] < 0.3 * training["forget"][0]
    assert training["retain"][0] == pytest.approx(0, abs=1e-6)
    assert len(scores.evidence["items"]["known"]) == 1


def test_the_price_decides_how_much_is_removed() -> None:
    """Free removal takes more than dear removal; at a price that no fact is worth, nothing goes."""
    model = planted("llama", "neuron")
    removed = [
        sum(
            float(value.sum()) for value in localize(model, TASK, "learned_mask", price=price, steps=30).values.values()
        )
        for price in (0.0, 3.0, 1e4)
    ]
    assert removed[0] > 2 * removed[1] > 0
    assert removed[2] == 0


def test_without_retain_the_retain_data_suffers_more() -> None:
    model = planted("llama", "neuron")
    kept = [
        localize(model, TASK, "learned_mask", price=0.0, steps=20, retain_weight=weight).evidence["levels"]["retain"]
        for weight in (0.0, 1.0)
    ]
    assert abs(math.log(kept[0][1] / kept[0][0])) > abs(math.log(kept[1][1] / kept[1][0]))


@pytest.mark.parametrize("loss", ["kl", "nll"])
def test_a_seed_gives_one_result_and_batches_do_not_matter(loss: str) -> None:
    model = tiny.model("llama")
    many = [
        Fact(prompt=f"Anna Berg {word} in", answer=" Oslo", id=word) for word in ("was", "is born", "works", "lives")
    ]
    task = Task(forget=Dataset(items=tuple(many), source="f"), retain=TASK.retain)
    options = {"price": 0.0, "steps": 3, "per_step": 2, "retain_loss": loss, "levels": ()}
    first, again, apart, other = (
        localize(model, task, "learned_mask", **options, **more) for more in ({}, {}, {"batch": 1}, {"seed": 1})
    )
    for name, value in first.values.items():
        assert torch.equal(value, again.values[name])
        torch.testing.assert_close(value, apart.values[name], atol=1e-3, rtol=0)
    assert any(not torch.equal(value, other.values[name]) for name, value in first.values.items())


def test_hard_concrete_gates_find_it_too() -> None:
    model = planted("llama", "neuron")
    scores = localize(model, TASK, "learned_mask", gates="hard_concrete", steps=60)
    assert scores.top(1)[0][:2] == (f"blocks.{LAYER}.mlp.neuron", NEURON)


def test_gates_are_open_at_the_start() -> None:
    """Exactly: what is not trained has score 0, and is never selected."""
    for kind in ("clamped", "hard_concrete"):
        made = gates(kind, [1000], device=torch.device("cpu"), generator=torch.Generator().manual_seed(0))
        assert made.values()[0].tolist() == [1.0] * 1000
    assert float((made.draw()[0] < 1).float().mean()) == pytest.approx(0.29, abs=0.04)


def test_the_price_of_hard_concrete_gates_is_how_often_they_are_below_one() -> None:
    """The closed form against 20,000 draws."""
    made = HardConcrete([20_000, 20_000], device=torch.device("cpu"), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        made.parameters[0].fill_(0.5)
        made.parameters[1].fill_(2.5)
    drawn = sum(float((gate < 1).float().mean()) for gate in made.draw())
    assert made.closed().item() == pytest.approx(drawn, abs=0.01)


def test_the_bounded_loss_by_hand_and_where_it_rounds() -> None:
    """Two tokens of probability 0.8 and 0.5: P = 0.4; and one whose probability is 1 in float32."""
    logits = torch.tensor([[0.8, 0.2], [0.5, 0.5], [30.0, 0.0]]).clamp(min=1e-9)
    logits[:2] = logits[:2].log()
    examples = tuple(encode(tiny.model("gpt2"), [FACT, RETAIN[0]]))
    scored = Scored(logits=logits, labels=torch.tensor([0, 1, 0]), row=torch.tensor([0, 0, 1]), rows=examples)
    assert bounded(scored, whole=True).tolist() == pytest.approx([-math.log(0.6), 30.0], rel=1e-5)
    assert bounded(scored, whole=False)[0].item() == pytest.approx(-(math.log(0.2) + math.log(0.5)) / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"price": -1.0}, "price=-1.0 must be at least 0"),
        ({"steps": 0}, "steps=0"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"ramp": 2.0}, "ramp=2.0"),
        ({"levels": (2.0,)}, "shares must be"),
        ({"unit": "mlp"}, "unit='mlp'"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(LoceditError, match=message):
        localize(tiny.model("gpt2"), TASK, "learned_mask", **options)


def test_it_needs_retain_data() -> None:
    with pytest.raises(LoceditError, match="learned_mask needs 'retain' data"):
        localize(tiny.model("gpt2"), [FACT], "learned_mask")
