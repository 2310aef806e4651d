"""Quark: quantiles and pool against counts by hand, its terms against formulas, and what its edit is."""

import dataclasses
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from locedit import losses
from locedit.cli import main
from locedit.data.encode import collate, encode
from locedit.data.items import ContrastPair, PlainText, PrivateText
from locedit.edit import Edit
from locedit.edit.checkpoint import checkpoints
from locedit.edit.levels import levels
from locedit.edit.token_rows import TokenRows, drawn_rows
from locedit.edit.tokens import conditioned
from locedit.errors import LoceditError
from locedit.generation import end_tokens
from locedit.losses import Scored
from locedit.models import Model
from locedit.provenance import plain
from locedit.results import Evaluation
from locedit.rewards import bad_words
from locedit.sampling import Sampling, prompts_of, sample
from locedit.unlearn import prepare, unlearn
from locedit.unlearn.quark import Quark, entropy, terms
from locedit.unlearn.quark import adapted as adapted_weight
from locedit.unlearn.quark_options import QuarkOptions
from locedit.unlearn.quark_pool import Pool, next_batch, quantile_labels
from locedit.unlearn.requests import requests_by, unlearn_requests
from tests import tiny
from tests.edits import bits, same_bits
from tests.gradients import example
from tests.unlearning import dataset, everything

SHORT: dict[str, Any] = {
    "steps": 6,
    "batch_size": 4,
    "quantiles": 2,
    "samples_per_prompt": 4,
    "max_new_tokens": 4,
    "sample_interval": 2,
    "learning_rate": 1e-2,
    "eval_every": 0,
}


def length(text: str) -> float:
    """A reward that any text has."""
    return float(len(text))


def doubled(text: str) -> float:
    """The same order as `length`, other values."""
    return 2 * length(text) ** 3 + 7


def task() -> Any:
    prompts = [PlainText(text=text, id=text) for text in ("Anna Berg", "The phone", "Question: where")]
    return everything(prompts=dataset("prompts", prompts))


def made(model: Model, *, reward: Any = length, **options: Any) -> Edit:
    return unlearn(model, task(), "quark", check=False, **(SHORT | {"reward": reward} | options))


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny.model("gpt2")


# --- pool and quantiles ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "sizes"),
    [(10, (2, 2, 2, 2, 2)), (12, (2, 2, 2, 2, 4)), (13, (2, 2, 2, 2, 5)), (101, (20, 20, 20, 20, 21))],
)
def test_quantiles_are_equal_and_the_worst_takes_the_rest(count: int, sizes: tuple[int, ...]) -> None:
    rewards = torch.rand(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    labels = quantile_labels(rewards, 5)
    assert tuple(torch.bincount(labels, minlength=5).tolist()) == sizes
    for k in range(4):
        assert rewards[labels == k].min() >= rewards[labels == k + 1].max()


def test_of_equal_rewards_the_earlier_is_better() -> None:
    assert quantile_labels(torch.tensor([0.5, 1.0, 0.5, 0.5, 0.5]), 5).tolist() == [1, 0, 2, 3, 4]


def test_labels_belong_to_samples_and_not_to_places() -> None:
    rewards = torch.randperm(37, generator=torch.Generator().manual_seed(1)).double()
    order = torch.randperm(37, generator=torch.Generator().manual_seed(2))
    assert torch.equal(quantile_labels(rewards, 5)[order], quantile_labels(rewards[order], 5))


def test_a_monotone_change_of_the_rewards_leaves_the_labels() -> None:
    rewards = torch.rand(50, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = quantile_labels(rewards, 5)
    assert torch.equal(quantile_labels(rewards.exp() * 1e3 - 5, 5), expected)
    assert not torch.equal(quantile_labels(-rewards, 5), expected)


def test_fewer_samples_than_quantiles() -> None:
    with pytest.raises(LoceditError, match="4 samples with a reward cannot be sorted into quantiles=5"):
        quantile_labels(torch.rand(4), 5)


def test_the_pool_keeps_tokens_in_order_and_leaves_out_what_has_no_reward() -> None:
    pool = Pool()
    pool.add([example([1, 2]), example([3]), example([4])], [(5, 6), (7,), (8, 9)], [0.1, None, 0.3])
    pool.add([example([1, 2])], [(9, 9, 9)], [0.2], refresh=1)
    assert [pool.example(at).ids for at in range(len(pool))] == [(1, 2, 5, 6), (4, 8, 9), (1, 2, 9, 9, 9)]
    assert [pool.example(at).targets for at in range(3)] == [(2, 3), (1, 2), (2, 3, 4)]
    assert pool.labels(3).tolist() == [2, 0, 1]
    again = Pool(dict(pool.state))
    assert [again.example(at) for at in range(3)] == [pool.example(at) for at in range(3)]
    pool.forget_before(1)
    assert [pool.example(at).ids for at in range(len(pool))] == [(1, 2, 9, 9, 9)]
    assert len(again) == 3


def test_adding_samples_only_ranks_anew() -> None:
    """What was written before is there as it was, and stays in its order among the old ones."""
    rng, pool = random.Random(0), Pool()
    prompts, said = [example([1])] * 20, [(at,) for at in range(20)]
    pool.add(prompts, said, [rng.random() for _ in range(20)])
    before, labels = [pool.example(at) for at in range(20)], pool.labels(4)
    pool.add(prompts, said, [0.4 + rng.random() for _ in range(20)], refresh=1)
    assert [pool.example(at) for at in range(20)] == before
    later = pool.labels(4)
    assert not torch.equal(later[:20], labels)
    for one in range(20):
        for other in range(20):
            assert labels[one] >= labels[other] or later[one] <= later[other]


def test_batches_take_every_sample_before_any_comes_again() -> None:
    state: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(0)
    drawn = [at for _ in range(4) for at in next_batch(state, 3, 12, generator=generator)]
    assert sorted(drawn) == list(range(12))
    assert len(next_batch({}, 64, 5, generator=generator)) == 5


# --- the terms -------------------------------------------------------------------------------------------------------


def logits(seed: int, rows: int = 5) -> Scored:
    values = torch.randn(rows, 11, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    examples = tuple(example([1, 2], id=str(at)) for at in range(2))
    row = torch.tensor([0, 0, 0, 1, 1])[:rows]
    return Scored(logits=values, labels=torch.arange(rows), row=row, rows=examples)


@pytest.mark.parametrize("kl", ["policy_ref", "ref_policy"])
@pytest.mark.parametrize("average", ["example", "token"])
def test_the_terms_are_the_formulas(kl: Any, average: Any) -> None:
    ours, theirs = logits(0), logits(1)
    options = QuarkOptions(kl=kl, average=average, kl_weight=0.3, entropy_weight=0.2)
    found = terms(ours, theirs, {}, options)
    p, q = ours.logits.softmax(1), theirs.logits.softmax(1)
    left, right = (p, q) if kl == "policy_ref" else (q, p)
    per_token = {
        "response_nll": -p.log()[range(5), range(5)],
        "kl": 0.3 * (left * (left / right).log()).sum(1),
        "minus_entropy": 0.2 * (p * p.log()).sum(1),
    }
    for name, values in per_token.items():
        mean = values.mean() if average == "token" else (values[:3].mean() + values[3:].mean()) / 2
        assert torch.allclose(found[name], mean), name
    assert found.keys() == per_token.keys()


def test_kl_is_never_negative_and_zero_of_the_same() -> None:
    options = QuarkOptions(kl_weight=1.0, entropy_weight=0.0)
    for seed in range(20):
        assert float(terms(logits(seed), logits(seed + 1), {}, options)["kl"]) > 0
        assert abs(float(terms(logits(seed), logits(seed), {}, options)["kl"])) < 1e-15
    even = torch.zeros(1, 8)
    assert torch.allclose(entropy(even), torch.tensor([8.0]).log())


def test_the_adaptive_weights_move_towards_their_targets() -> None:
    """By hand: 100 samples of a horizon of 1000, and an error that is cut at 0.2."""
    assert adapted_weight(0.5, 1.1, share=0.1, clip=0.2, sign=1) == pytest.approx(0.5 * 1.01)
    assert adapted_weight(0.5, 9.0, share=0.1, clip=0.2, sign=1) == pytest.approx(0.5 * 1.02)
    assert adapted_weight(0.5, 0.0, share=0.1, clip=0.2, sign=1) == pytest.approx(0.5 * 0.98)
    assert adapted_weight(0.5, 9.0, share=0.1, clip=0.2, sign=-1) == pytest.approx(0.5 * 0.98)
    assert adapted_weight(0.5, 1.0, share=0.1, clip=0.2, sign=-1) == 0.5
    ours, theirs = logits(0), logits(1)
    divergence = losses.per_example(ours, losses.kl(theirs.logits, ours.logits), reduction="sum").mean()
    for target, sign in ((float(divergence) * 0.9, 1), (float(divergence) * 1.1, -1)):
        state: dict[str, Any] = {}
        terms(ours, theirs, state, QuarkOptions(adaptive=True, kl_target=target, horizon=10.0, batch_size=2))
        moved = state["weights"]["kl_weight"] / QuarkOptions().kl_weight - 1
        assert moved == pytest.approx((float(divergence) / target - 1) * 2 / 10)
        assert moved * sign > 0


def test_the_weight_of_entropy_follows_the_nats_of_whole_responses() -> None:
    """Summed over a response, not its mean, against a target of its own; responses too surprising lower it."""
    ours, theirs = logits(0), logits(1)
    nll = -ours.logits.log_softmax(1)[range(5), range(5)]
    summed = float(nll[:3].sum() + nll[3:].sum()) / 2
    for factor, sign in ((0.9, -1), (1.1, 1)):
        state: dict[str, Any] = {}
        options = QuarkOptions(adaptive=True, entropy_target=summed * factor, horizon=10.0, batch_size=2)
        terms(ours, theirs, state, options)
        moved = state["weights"]["entropy_weight"] / options.entropy_weight - 1
        assert moved == pytest.approx(-(1 / factor - 1) * 2 / 10)
        assert moved * sign > 0


def test_adapted_weights_are_those_of_the_next_batch() -> None:
    ours, theirs, state = logits(0), logits(1), dict[str, Any]()
    options = QuarkOptions(adaptive=True, kl_target=1e-3, entropy_target=1e-3, horizon=10.0, batch_size=2)
    first, second = (terms(ours, theirs, state, options) for _ in range(2))
    assert float(second["kl"] / first["kl"]) == pytest.approx(1 + 0.2 * 2 / 10)
    assert float(second["minus_entropy"] / first["minus_entropy"]) == pytest.approx(1 - 0.2 * 2 / 10)
    assert torch.equal(first["response_nll"], second["response_nll"])


# --- the edit --------------------------------------------------------------------------------------------------------


def test_rows_alone_leave_the_model_without_a_token_as_it_is(model: Model) -> None:
    before = bits(model.module)
    edit = made(model, train="rows")
    assert same_bits(model.module, before)
    assert (edit.kind, len(edit), edit.conditional) == ("tokens", 2 * model.d_model, ("token",))
    edit.verify(model)
    batch = collate([example([5, 9, 3, 7])], model)
    with torch.no_grad():
        plain = model.logits(batch)
        with edit.applied(model) as edited:
            assert not torch.equal(edited.logits(batch), plain)
        with edit.dropped().applied(model) as edited:
            assert torch.equal(edited.logits(batch), plain)


def test_inside_a_set_with_the_rows(model: Model) -> None:
    """Outside the set every bit is as before; the rows are trained beside it."""
    within = model.components({"blocks.0.mlp.neuron": [1, 5, 40], "blocks.1.mlp.neuron": [0, 7]})
    edit, rows = made(model, within=within), made(model, train="rows")
    assert edit.tokens is not None
    assert rows.tokens is not None
    assert len(edit) == within.parameters("train") + 2 * model.d_model
    edit.verify(model)
    before = bits(model.module)
    with edit.dropped().applied(model):
        assert not same_bits(model.module, before)
    assert same_bits(model.module, before)
    assert edit.tokens.names == ("<|reward_0|>", "<|reward_1|>")
    assert edit.tokens.used == 0


def test_the_order_of_the_rewards_is_all_that_counts(model: Model) -> None:
    one, other, reverse = (made(model, reward=reward) for reward in (length, doubled, lambda text: -length(text)))
    assert [p.values.tolist() for p in one.patches] == [p.values.tolist() for p in other.patches]
    assert [p.values.tolist() for p in one.patches] != [p.values.tolist() for p in reverse.patches]
    assert one.history["sample_reward"] != other.history["sample_reward"]


def test_a_constant_reward_is_a_plain_conditional_language_model(model: Model) -> None:
    """Earlier samples are better, and nothing of the loss depends on the reward."""
    one, other = (made(model, reward=reward, sample_interval=9) for reward in (lambda _: 1.0, lambda _: -3.0))
    assert [p.values.tolist() for p in one.patches] == [p.values.tolist() for p in other.patches]
    assert one.history["response_nll"][-1] < one.history["response_nll"][1]


def test_what_is_learned_is_conditional_on_the_token(model: Model) -> None:
    """Long texts are likelier behind the token of the long ones: the rows part ways."""
    edit = made(model, steps=30, samples_per_prompt=8, sample_interval=99, entropy_weight=0.0, kl_weight=0.0)
    assert edit.tokens is not None
    rows = edit.tokens.rows
    worst = dataclasses.replace(edit, tokens=dataclasses.replace(edit.tokens, used=1))
    batch = collate([example([5, 9, 3, 7])], model)
    with torch.no_grad():
        with edit.applied(model) as edited:
            best_logits = edited.logits(batch)
        with worst.applied(model) as edited:
            assert not torch.allclose(edited.logits(batch), best_logits, atol=1e-2)
    assert not torch.allclose(rows[0], rows[1], atol=1e-2)


def test_the_history_says_what_was_written(model: Model) -> None:
    edit = made(model, adaptive=True)
    rounds = [value is not None for value in edit.history["sample_reward"]]
    assert rounds == [False, True, False, True, False, True, False]
    assert [pool for pool in edit.history["pool"] if pool] == [12.0, 24.0, 36.0]
    kept = made(model, keep_refreshes=1, prompts_per_refresh=2)
    assert [pool for pool in kept.history["pool"] if pool] == [8.0, 8.0, 8.0]
    for name, start in (("kl_weight", 0.05), ("entropy_weight", 0.06)):
        assert edit.history[name][:2] == [None, start]
        assert edit.history[name][2] != start
        assert name not in kept.history


def test_levels_are_of_the_unedited_model_before_and_of_the_edit_after(model: Model) -> None:
    """No untrained token is in front of what is measured first; the best one is in front of what is measured last."""
    edit = made(model)
    probes = {"forget": encode(model, task().forget), "retain": encode(model, task().retain)}
    plain = levels(model, probes)
    assert edit.tokens is not None
    worst = dataclasses.replace(edit, tokens=dataclasses.replace(edit.tokens, used=1))
    with edit.applied(model) as edited:
        after = levels(edited, probes)
    with worst.applied(model) as edited:
        assert levels(edited, probes) != after
    for name in probes:
        assert (edit.history[name][0], edit.history[name][-1]) == (plain[name], after[name])
    rows = made(model, train="rows")
    with rows.applied(model) as edited:
        assert rows.history["forget"][-1] == levels(edited, probes)["forget"]


def test_the_state_before_training_has_no_token(model: Model, tmp_path: Path) -> None:
    edit = made(model, until=1.0)
    assert edit.history["step"] == [0]
    edit.save(tmp_path / "edit")
    batch = collate([example([5, 9, 3, 7])], model)
    with torch.no_grad():
        plain = model.logits(batch)
        with Edit.load(tmp_path / "edit").applied(model) as edited:
            assert edited.prefix == 0
            assert torch.equal(edited.logits(batch), plain)
    with pytest.raises(LoceditError, match="no control token of this edit is in use"):
        edit.export(model, tmp_path / "out")


def test_the_reference_sees_no_token(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first step the weights are the model's, and all of the KL is what the untrained tokens do."""
    drawn: list[tuple[Pool, list[int], torch.Tensor]] = []

    def spy(state: dict[str, Any], *rest: Any, **more: Any) -> list[int]:
        numbers = next_batch(state, *rest, **more)
        drawn.append((Pool(state["pool"]), numbers, state["labels"][numbers]))
        return numbers

    monkeypatch.setattr("locedit.unlearn.quark.next_batch", spy)
    edit = made(model, steps=1, batch_size=12, learning_rate=1e-9, kl_weight=1.0)
    assert edit.tokens is not None
    ((pool, numbers, labels),) = drawn
    found: list[torch.Tensor] = []
    for number, label in zip(numbers, labels.tolist(), strict=True):
        text = collate([pool.example(number)], model)
        at = [target - 1 for target in pool.example(number).targets]
        with torch.no_grad():
            plain = model.logits(text)[0, at].log_softmax(-1)
            with conditioned(model, edit.tokens.rows, label):
                ours = model.logits(text)[0, at].log_softmax(-1)
        found.append((ours.exp() * (ours - plain)).sum(-1).mean())
    assert edit.history["kl"][1] == pytest.approx(float(torch.stack(found).mean()), rel=1e-4)
    assert edit.history["kl"][1] > 0.1


def test_a_new_round_starts_the_order_anew(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what is left of the old order would be learned before anything new."""
    left: list[bool] = []

    def spy(state: dict[str, Any], *rest: Any, **more: Any) -> list[int]:
        left.append(state["waiting"] is not None)
        return next_batch(state, *rest, **more)

    monkeypatch.setattr("locedit.unlearn.quark.next_batch", spy)
    made(model)
    assert left == [False, True] * 3


def test_what_is_drawn_for_a_round(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Different prompts, each as often as asked, written as asked."""
    seen: list[tuple[list[str], Sampling]] = []

    def spy(where: Model, prompts: Any, how: Sampling, *rest: Any, **more: Any) -> Any:
        seen.append(([prompt.id for prompt in prompts], how))
        return sample(where, prompts, how, *rest, **more)

    monkeypatch.setattr("locedit.unlearn.quark.sample", spy)
    made(model, prompts_per_refresh=2, temperature=0.7, top_p=0.8)
    assert len({frozenset(names) for names, _ in seen}) > 1, "others in other rounds"
    for names, how in seen:
        assert sorted(Counter(names).values()) == [4, 4]
        assert how == Sampling(max_new_tokens=4, min_new_tokens=3, temperature=0.7, top_p=0.8)


def test_rows_start_like_those_that_there_are() -> None:
    """Each dimension has the mean and the spread that it has among the rows."""
    generator = torch.Generator().manual_seed(0)
    known = torch.randn(50, 4, generator=generator) * torch.tensor([0.1, 1.0, 5.0, 0.5]) + torch.tensor([9, -3, 0, 1])
    drawn = drawn_rows(known, 20_000, generator=generator)
    torch.testing.assert_close(drawn.std(0), known.std(0), rtol=0.03, atol=0)
    assert ((drawn.mean(0) - known.mean(0)).abs() < 0.05 * known.std(0)).all()


def test_rows_decay_towards_what_they_were(model: Model) -> None:
    held = TokenRows(model, ["<|a|>", "<|b|>"], None, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        held.rows.add_(1.0)
    held.decay(0.25, towards="base")
    torch.testing.assert_close(held.rows.detach(), held.start + 0.75)
    held.decay(0.25, towards="weights")
    torch.testing.assert_close(held.rows.detach(), 0.75 * (held.start + 0.75))


class Killed(Exception):
    """In the place of a kill."""


@pytest.mark.parametrize("at", [3, 4])
def test_a_killed_training_ends_with_the_same_bits(
    at: int, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before a round of writing and after one: pool, order and weights come from the checkpoint."""
    expected = made(model, adaptive=True)
    run = Quark.__call__

    def dies(self: Quark, step: Any) -> Any:
        if step.number == at:
            raise Killed
        return run(self, step)

    with monkeypatch.context() as patch, pytest.raises(Killed), checkpoints(tmp_path / "state", cost=1.0):
        patch.setattr(Quark, "__call__", dies)
        made(model, adaptive=True)
    with checkpoints(tmp_path / "state", cost=1.0):
        found = made(model, adaptive=True)
    assert found.history == expected.history
    for name, tensor in expected.tensors().items():
        assert torch.equal(found.tensors()[name], tensor), name


def test_each_text_is_learned_behind_the_token_of_its_quantile(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[Pool, list[int]]] = []

    def spy(state: dict[str, Any], *rest: Any, **more: Any) -> list[int]:
        numbers = next_batch(state, *rest, **more)
        drawn.append((Pool(state["pool"]), numbers))
        return numbers

    monkeypatch.setattr("locedit.unlearn.quark.next_batch", spy)
    edit = made(model, steps=1, batch_size=12, learning_rate=1e-9)
    assert edit.tokens is not None
    ((pool, numbers),) = drawn
    batch = collate([pool.example(number) for number in numbers], model)
    own = quantile_labels(pool.rewards, 2)[numbers]
    assert len(set(own.tolist())) == 2

    def nll(used: torch.Tensor) -> float:
        assert edit.tokens is not None
        with torch.no_grad(), conditioned(model, edit.tokens.rows, used):
            return float(losses.sequence_nll(losses.score(model, batch)).mean())

    assert edit.history["response_nll"][1] == pytest.approx(nll(own), abs=1e-4)
    assert abs(nll(own) - nll(1 - own)) > 1e-2


def test_the_first_round_has_no_token_and_later_ones_have_the_best(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []

    def logits(texts: Any) -> torch.Tensor:
        with torch.no_grad():
            return model.logits(collate(texts, model))

    def spy(where: Model, texts: Any, *rest: Any, **more: Any) -> Any:
        seen.append(logits(texts[:3]))
        return sample(where, texts, *rest, **more)

    texts = prompts_of(model, task().prompts, by="test")[:1] * 3
    early = made(model, steps=2, schedule="constant")
    monkeypatch.setattr("locedit.unlearn.quark.sample", spy)
    made(model, steps=3, schedule="constant")
    with early.applied(model):
        then = logits(texts)
    assert torch.equal(seen[0], logits(texts))
    torch.testing.assert_close(seen[1], then, rtol=0, atol=1e-4)
    assert (seen[1] - seen[0]).abs().max() > 0.1


def test_recomputed_blocks_write_the_same() -> None:
    """A block that recomputes drops the keys of earlier tokens, so it must not where the model writes."""
    model = tiny.model("llama")
    assert made(model, gradient_checkpointing=True).history == made(model).history


def test_a_sequence_of_requests_goes_on_with_a_reward_of_ones_own(model: Model, tmp_path: Path) -> None:
    requests = requests_by(dataclasses.replace(task(), forget=task().forget.where(owner=("Anna", "Carl"))), "owner")
    options = {**SHORT, "steps": 2, "reward": length}
    first, again = (
        unlearn_requests(model, requests, "quark", folder=tmp_path / "out", check=False, **options) for _ in range(2)
    )
    assert first.edit.digest == again.edit.digest
    with first.edit.applied(model) as edited:
        assert edited.prefix == 2, "each has a token"
    assert plain({"reward": length}) == {"reward": f"{__name__}:length"}, "no address, which differs between processes"


def test_a_failing_reward_is_not_swallowed(model: Model) -> None:
    def broken(text: str) -> float:
        raise RuntimeError(f"no judge of {len(text)} characters")

    with pytest.raises(Exception, match="no judge"):
        made(model, reward=broken)


def test_prompts_come_from_the_task_or_from_what_is_forgotten(model: Model) -> None:
    for prompts, words in ((task().prompts, "those of the task"), (None, "those of the forget items")):
        edit = unlearn(
            model, everything(prompts=prompts), "quark", check=False, **(SHORT | {"steps": 1, "reward": length})
        )
        assert edit.provenance is not None
        assert str(edit.provenance.settings["prompts"]).startswith(words)
        assert edit.provenance.settings["reward"] == "tests.test_quark:length"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantiles": 99}, "12 samples with a reward cannot be sorted into quantiles=99"),
        ({"quantiles": 0}, "quantiles=0 must be at least 1"),
        ({"min_new_tokens": 9}, "min_new_tokens=9 must be from 0 to max_new_tokens=4"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0"),
        ({"kl": "both"}, "kl='both'"),
        ({"adaptive": True, "horizon": 0.8}, "horizon=0.8 must be above batch_size [*] adaptive_clip = 0.8"),
        ({"reward": "bad_word"}, "did you mean 'bad_words'"),
        ({"reward": "bad_words"}, "reward='bad_words' needs words"),
        ({"words": ("a",)}, "is of reward bad_words; the reward is"),
        ({"hold": "weights"}, "quark cannot be held as 'weights'"),
    ],
)
def test_wrong_options_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LoceditError, match=message) as raised:
        prepare("quark", task(), **(SHORT | {"reward": length} | options))
    assert "\n" not in str(raised.value)


def test_what_it_cannot_go_on_from() -> None:
    pairs = dataset("forget", [ContrastPair(advantaged="He is a cook.", disadvantaged="She is a cook.", id="c")])
    with pytest.raises(LoceditError, match="items of kind 'contrast' .* have no prompt"):
        prepare("quark", everything(forget=pairs, prompts=None), **(SHORT | {"quantiles": 1}))
    text = dataset("forget", [PrivateText(text="555 is it", spans=((0, 3, "phone"),), id="p")])
    with pytest.raises(LoceditError, match="item 'p' of forget.jsonl has no text to go on from"):
        prepare("quark", everything(forget=text, prompts=None), **(SHORT | {"quantiles": 1}))


def test_rows_alone_have_no_set(model: Model) -> None:
    within = model.components({"blocks.0.mlp.neuron": [1]})
    with pytest.raises(LoceditError, match="changes no weight, so there is no set"):
        made(model, train="rows", within=within)


def test_a_reward_of_no_text_at_all(model: Model) -> None:
    with pytest.raises(LoceditError, match="0 samples with a reward cannot be sorted"):
        made(model, reward=lambda _: None)


def test_samples_are_judged_by_what_is_written(model: Model) -> None:
    """The reward sees the response alone, without prompt and end token."""
    seen: list[str] = []

    def judge(text: str) -> float | None:
        seen.append(text)
        return bad_words(["x"])(text) or 0.0

    made(model, reward=judge, steps=1)
    assert len(seen) == 12
    assert not any(text.startswith("Anna Berg") or "</s>" in text for text in seen)
    ending = tiny.model("phi")
    with torch.no_grad():
        ending.parameter("lm_head.bias")[list(end_tokens(ending))] = 20.0
    made(ending, reward=judge, steps=1, max_new_tokens=9)
    assert not any("</s>" in text for text in seen)
    assert "</s>" in ending.tokenizer.decode(list(end_tokens(ending)))


@pytest.mark.slow
def test_the_habit_goes_and_hangs_on_the_token(tmp_path: Path) -> None:
    """From the command line on the habit lab: fewer bad responses at about the same perplexity, more with no token."""
    lab = tmp_path / "lab"
    assert main(["lab", "habit", "--out", str(lab)]) == 0
    model, task, words = str(lab / "model"), str(lab / "habit"), str(lab / "habit" / "bad_words.txt")
    judged = ["--reward", "bad_words", "--words", words]
    asked = ["--method", "quark", "--steps", "150", "--eval-every", "0", "--entropy-weight", "0"]
    assert main(["edit", model, task, *asked, *judged, "--out", str(tmp_path / "run")]) == 0
    edit = Edit.load(tmp_path / "run" / "edit")
    rewards = [reward for reward in edit.history["sample_reward"] if reward is not None]
    assert rewards[-1] > rewards[0] + 0.02
    edit.dropped().save(tmp_path / "dropped")
    metrics = ["--metrics", "habit_rate,sample_perplexity", "--samples", "2", "--top-p", "1.0", *judged]
    found: dict[tuple[str, str, str], float] = {}
    for name, folder in (("token", tmp_path / "run" / "edit"), ("dropped", tmp_path / "dropped")):
        out = tmp_path / name
        given = ["evaluate", model, f"{task}/test.toml", "--edit", str(folder), *metrics, "--out", str(out)]
        assert main(given) == 0
        measures = Evaluation.load(out / "evaluation" / "evaluation.json").measures
        found |= {(name, measure.name, measure.stage): measure.value for measure in measures}
    before = found["token", "habit_rate", "before"]
    assert found["token", "habit_rate", "after"] < 0.2 * before
    perplexity = found["token", "sample_perplexity", "before"]
    assert found["token", "sample_perplexity", "after"] < 1.1 * perplexity
    assert found["dropped", "habit_rate", "after"] > 2 * found["token", "habit_rate", "after"]
