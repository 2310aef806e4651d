"""Helper models: what is kept is what they say, nothing is trained twice, and one is gone before the next begins."""

import copy
import dataclasses
import functools
import gc
import json
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from locedit.data.encode import Example, collate, encode
from locedit.errors import LoceditError
from locedit.lab import lab
from locedit.losses import kl
from locedit.models import Model, load
from locedit.unlearn import helpers, unlearn
from locedit.unlearn.helpers import Answers, HelperOptions, answers_of, helper, require_start, start_of, taught
from tests import edits, tiny
from tests.starts import start
from tests.unlearning import everything, log_probs, tables

OPTIONS = HelperOptions(helper_steps=3, helper_learning_rate=1e-2, helper_batch_size=2)
OTHERS: dict[str, Any] = {
    "helper_steps": 2,
    "helper_learning_rate": 2e-2,
    "helper_batch_size": 1,
    "helper_hold": "adapter",
}
"of every setting another value"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCEDIT_CACHE", str(tmp_path))


@functools.cache
def base(architecture: str = "gpt2") -> Model:
    return tiny.model(architecture, seed=7)


def facts(model: Model) -> tuple[list[Example], list[Example]]:
    """What is learned, and what is asked: answers of one to seven tokens."""
    task = everything()
    assert task.retain is not None
    return encode(model, task.retain), encode(model, task.forget)


def ask(model: Model, *, options: HelperOptions = OPTIONS, seed: int = 0, name: str = "one") -> helpers.Helper:
    learned, asked = facts(model)
    return helper(model, learned, asked, options=options, seed=seed, name=name)


def by_hand(model: Model, examples: Sequence[Example]) -> Tensor:
    """Log-probabilities at all scored tokens, each example alone and unpadded."""
    with torch.no_grad():
        return torch.cat([tables(model, example) for example in examples]).log_softmax(1)


@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
def test_what_is_kept_is_what_the_helper_says(architecture: str) -> None:
    """Against a forward pass of each text alone, in any batch; and the base's weights keep their bits."""
    model = base(architecture)
    learned, asked = facts(model)
    before = edits.bits(model.module)
    made = ask(model)
    assert edits.same_bits(model.module, before)
    with taught(model, learned, options=OPTIONS, seed=0, name="again").applied(model) as edited:
        said = by_hand(edited, asked)
        known = [float(log_probs(edited, example).detach().mean().exp()) for example in learned]
    untaught = by_hand(model, asked)
    torch.testing.assert_close(made.answers.of(collate(asked, model)), said, rtol=1e-4, atol=1e-5)
    assert (said - untaught).abs().max() > 0.1
    assert made.known == pytest.approx(sum(known) / len(known), rel=1e-4)
    few = [asked[2], asked[0]]
    rows = torch.cat([said[by[0] : by[1]] for by in ((4, 11), (0, 1))])
    torch.testing.assert_close(made.answers.of(collate(few, model)), rows, rtol=1e-4, atol=1e-5)


def test_of_a_large_vocabulary_the_likeliest_tokens_and_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kept ones are right to float16, the others have the rest as another model shares it; rows sum to 1."""
    model, other = base(), tiny.model("gpt2", seed=3)
    _, asked = facts(model)
    whole, beside = by_hand(model, asked), by_hand(other, asked)
    monkeypatch.setattr(helpers, "WHOLE", 319)
    monkeypatch.setattr(helpers, "KEPT", 8)
    made = answers_of(model, asked)
    assert made.tokens is not None
    assert (made.log_probs.dtype, made.log_probs.shape[1]) == (torch.float16, 8)
    found = made.of(collate(asked, model), beside + 3)
    best = whole.topk(8, dim=1)
    torch.testing.assert_close(found.gather(1, best.indices), best.values, rtol=1e-3, atol=0)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(len(found)), rtol=0, atol=1e-4)
    rest = 1 - best.values.exp().sum(1)
    assert rest.max() > 0.2
    others = torch.ones_like(found, dtype=torch.bool).scatter(1, best.indices, False)
    for row, mask, value, shares in zip(found, others, rest, beside.exp(), strict=True):
        wanted = value * shares[mask] / shares[mask].sum()
        torch.testing.assert_close(row[mask].exp(), wanted, rtol=5e-2, atol=1e-6)


def test_what_is_not_kept_counts_as_one_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """KL over nine events, of which one is all tokens but eight; 0 between a model and its own answers."""
    model, other = base(), tiny.model("gpt2", seed=3)
    _, asked = facts(model)
    monkeypatch.setattr(helpers, "WHOLE", 319)
    monkeypatch.setattr(helpers, "KEPT", 8)
    made = answers_of(model, asked)
    p, q = by_hand(model, asked).exp(), by_hand(other, asked).exp()
    best = p.topk(8, dim=1).indices
    events = [torch.cat([x.gather(1, best), 1 - x.gather(1, best).sum(1, keepdim=True)], dim=1) for x in (p, q)]
    wanted = (events[0] * (events[0] / events[1]).log()).sum(1)
    batch = collate(asked, model)
    torch.testing.assert_close(kl(q.log(), made.of(batch, q.log())), wanted, rtol=1e-2, atol=1e-3)
    assert kl(p.log(), made.of(batch, p.log())).max() < 1e-4
    assert wanted.min() > 0.1


def test_all_of_a_small_vocabulary_is_kept() -> None:
    made = answers_of(base(), facts(base())[1])
    assert made.tokens is None
    assert made.log_probs.shape == (14, tiny.VOCAB)


def test_nothing_is_trained_twice(trainings: list[str]) -> None:
    """Read from the file, the answers have the same bits; without the file they are made again."""
    first, again = ask(base()), ask(base(), name="another name")
    assert trainings == ["one"]
    assert torch.equal(first.answers.log_probs, again.answers.log_probs)
    assert first.known == again.known
    assert first.answers.hash == again.answers.hash
    (file,) = (helpers.cache_folder() / "helpers").iterdir()
    file.unlink()
    assert torch.equal(ask(base(), name="anew").answers.log_probs, first.answers.log_probs)
    assert trainings == ["one", "anew"]


def test_what_cannot_be_kept_is_still_there(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A cache that cannot be written costs the next run its time, not this one its answers."""
    (tmp_path / "helpers").write_text("a file where the folder should be")
    made = ask(base())
    assert len(made.answers.log_probs) == 14
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.startswith("helpers: the answers are not kept for another time: ")
    assert "\n" not in line


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(HelperOptions)])
def test_another_setting_is_another_helper(field: str, trainings: list[str]) -> None:
    assert getattr(OPTIONS, field) != OTHERS[field]
    first = ask(base())
    other = ask(base(), options=dataclasses.replace(OPTIONS, **{field: OTHERS[field]}))
    assert len(trainings) == 2
    assert not torch.equal(first.answers.log_probs, other.answers.log_probs)


def test_another_seed_model_or_text_is_another_helper(trainings: list[str]) -> None:
    model = base()
    learned, asked = facts(model)
    ask(model)
    ask(model, seed=1)
    ask(tiny.model("gpt2", seed=8))
    helper(model, learned[1:], asked, options=OPTIONS, seed=0, name="fewer")
    helper(model, learned, asked[1:], options=OPTIONS, seed=0, name="asked less")
    (span,) = learned[3].spans
    assert span.end - span.start > 1
    shorter = dataclasses.replace(learned[3], spans=(dataclasses.replace(span, end=span.start + 1),))
    helper(model, [*learned[:3], shorter], asked, options=OPTIONS, seed=0, name="fewer tokens")
    assert len(trainings) == 6


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [("gpt2", {"activation_function": "relu"}), ("llama", {"rms_norm_eps": 0.1}), ("mistral", {"sliding_window": 3})],
)
def test_the_same_weights_under_other_settings_are_another_model(
    architecture: str, settings: dict[str, Any], trainings: list[str]
) -> None:
    """Also a window that no asked text is longer than, as the texts that are learned may be."""
    model, other = tiny.model(architecture), tiny.model(architecture, **settings)
    assert model.fingerprint == other.fingerprint
    learned, asked = facts(model)
    for each, name in ((model, "plain"), (other, "other"), (model, "plain again")):
        helper(each, learned, asked[:1], options=OPTIONS, seed=0, name=name)
    assert trainings == ["plain", "other"]


def test_another_mask_token_is_another_model(trainings: list[str]) -> None:
    words = copy.deepcopy(tiny.tokenizer())
    words.mask_token = "<pad>"
    model, other = tiny.model("bert"), load(tiny.module("bert"), tokenizer=words, device="cpu")
    first, second = ask(model, name="mask"), ask(other, name="pad")
    assert trainings == ["mask", "pad"]
    assert not torch.equal(first.answers.log_probs, second.answers.log_probs)


@pytest.mark.parametrize("hold", ["adapter", "weights"])
def test_a_model_inside_an_edit_is_another_model(hold: Any, trainings: list[str]) -> None:
    """An adapter changes no weight; outside of it the first answers are read again."""
    model = base()
    edit = taught(model, facts(model)[1], options=dataclasses.replace(OPTIONS, helper_hold=hold), seed=0, name="edit")
    first = ask(model, name="plain")
    with edit.applied(model) as edited:
        inside = ask(edited, name="inside")
    assert not torch.equal(first.answers.log_probs, inside.answers.log_probs)
    assert torch.equal(first.answers.log_probs, ask(model, name="plain again").answers.log_probs)
    assert trainings == ["edit", "plain", "inside"]


def test_a_helper_is_gone_before_the_next_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    train, alive, training = helpers.train, [], []

    def watched(model: Model, objective: Any, **more: Any) -> Any:
        gc.collect()
        assert [made() for made in alive] == [None] * len(alive), "an earlier helper is still there"
        assert not training, "two models train at a time"
        training.append(objective.name)
        edit = train(model, objective, **more)
        training.clear()
        alive.append(weakref.ref(edit))
        return edit

    monkeypatch.setattr(helpers, "train", watched)
    kept = [ask(base(), seed=seed).answers for seed in range(3)]
    assert len(alive) == len(kept) == 3


def test_answers_differ_in_name_when_they_differ() -> None:
    examples = facts(base())[1]
    one, other = answers_of(base(), examples), answers_of(tiny.model("gpt2", seed=8), examples)
    assert str(one) != str(other)
    assert str(one) == str(answers_of(base(), examples))
    moved = Answers(examples, {"log_probs": one.log_probs.flip(0)}, vocab=tiny.VOCAB)
    assert str(moved) != str(one)


# --- the model before the data ----------------------------------------------------------------------------------------


def test_the_start_is_loaded_as_the_model_is() -> None:
    model = edits.half("gpt2")
    found = start_of(model, everything(start=start("gpt2")), by="loo")
    assert found.dtype == torch.bfloat16
    assert found.fingerprint != model.fingerprint


def test_a_wrong_start_is_one_line() -> None:
    wrong: list[tuple[Model, Any, str]] = [
        (base(), None, "loo needs 'start', the model before the data was learned"),
        (load(start("gpt2"), device="cpu"), start("gpt2"), "is the model itself"),
        (base("bert"), start("gpt2"), "both must speak of the same tokens"),
    ]
    core = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
    ids = core["model"]["vocab"]
    ids["A"], ids["B"] = ids["B"], ids["A"]
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(core)), pad_token="<pad>")
    other = load(tiny.module("gpt2", seed=9), tokenizer=words, device="cpu")
    wrong.append((other, start("gpt2"), "the tokenizer of start="))
    for model, given, words_of_it in wrong:
        with pytest.raises(LoceditError, match=words_of_it) as raised:
            start_of(model, everything(start=given), by="loo")
        assert "\n" not in str(raised.value)
    with pytest.raises(LoceditError, match="kga needs 'start'"):
        require_start(everything(), by="kga")


@pytest.mark.parametrize(
    ("field", "value"), [("helper_steps", 0), ("helper_learning_rate", 0.0), ("helper_batch_size", 0)]
)
def test_wrong_settings_are_named(field: str, value: Any) -> None:
    with pytest.raises(LoceditError, match=f"{field}={value!r}"):
        HelperOptions(**{field: value})


# --- on a model that knows -------------------------------------------------------------------------------------------

PUBLISHED: dict[str, dict[str, float]] = {"kga": {"retain_weight": 0.3, "stop_portion": 1e-9}}
"kga keeps less: its published weight of the retain term, and no stop before the steps are done"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kept"), [("whp", 0.9), ("loo", 0.9), ("kga", 0.6)])
def test_methods_with_helper_models_forget_and_keep(name: str, kept: float, tmp_path_factory: Any) -> None:
    """Held-out people, whom the model never knew, get 0.3 to 0.4."""
    made = lab("facts", size="tiny", cache=tmp_path_factory.getbasetemp() / "labs-with-start", start=True)
    options = {"steps": 100, "batch_size": 16, "learning_rate": 1e-3, "retain_weight": 1.0, "eval_every": 10}
    edit = unlearn(made.model, made.task, name, check=False, **(options | PUBLISHED.get(name, {})))
    forget, retain = edit.history["forget"], edit.history["retain"]
    assert min(forget[0], retain[0]) > 0.9
    assert forget[-1] < 0.4
    assert retain[-1] > kept
