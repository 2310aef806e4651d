"""Signs of over-forgetting: by hand from greedy decoding and quantiles, and a mild edit against a ruinous one."""

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pytest
import torch

from locedit.data import Dataset, Fact, encode
from locedit.edit import Edit, scale
from locedit.errors import LoceditError
from locedit.evaluate.overforgetting import OverForgetting, is_blank, over_forgetting, repeats, spread
from locedit.models import Model
from locedit.unlearn import unlearn
from tests import edits, tiny

if TYPE_CHECKING:
    from locedit.lab import Lab

NONE = OverForgetting(prompts=16, blank=0.0, repeating=0.0, below=0.0, floor=-3.0, median=-1.0)


def test_repetition_and_blanks_by_hand() -> None:
    assert repeats([1, 2] * 10)  # 2 of 19 bigrams are distinct
    assert not repeats(range(20))
    cycle = list(range(9))
    assert repeats((cycle * 3)[:20])  # 9 of 19
    assert not repeats(([*cycle, 9] * 2)[:20])  # 10 of 19
    assert not repeats([7] * 5)  # four bigrams are too few to tell
    assert repeats([7] * 6)
    assert is_blank(" \n\t")
    assert not is_blank(" .")


def test_at_most_so_many_are_taken_evenly() -> None:
    examples = encode(tiny.model("gpt2"), [Fact(prompt=f"{n} is", answer=" a", id=str(n)) for n in range(10)])
    assert [example.id for example in spread(examples, 4)] == ["0", "3", "6", "9"]
    assert spread(examples, 10) == examples


def test_the_warning_names_what_is_over_the_limit() -> None:
    assert NONE.warning is None
    assert dataclasses.replace(NONE, blank=0.5, repeating=0.5, below=0.5).warning is None
    blank = dataclasses.replace(NONE, blank=0.75).warning
    assert blank == (
        "over-forgetting: 75% of the continuations of forget prompts that were not blank are blank now (16 prompts)"
    )
    text = dataclasses.replace(NONE, repeating=1.0, below=0.9).warning
    assert text is not None
    assert "repeating" in text
    assert "90% of the forget items are less likely than to a model that never knew" in text
    assert "\n" not in text


def greedy(model: Model, ids: Sequence[int]) -> list[int]:
    """Twenty tokens, each from a whole forward pass; stops before the end token."""
    written: list[int] = []
    with torch.inference_mode():
        while len(written) < 20:
            logits = model.module(input_ids=torch.tensor([[*ids, *written]])).logits[0, -1]
            if int(logits.argmax()) == 2:
                break
            written.append(int(logits.argmax()))
    return written


def per_token(model: Model, data: Dataset) -> list[float]:
    found: list[float] = []
    for example in encode(model, data):
        with torch.inference_mode():
            table = model.module(input_ids=torch.tensor([example.ids])).logits[0].log_softmax(-1)
        found.append(float(torch.stack([table[at - 1, example.ids[at]] for at in example.targets]).mean()))
    return found


def some_edits(model: Model) -> dict[str, Edit]:
    everything = model.components({f"blocks.{layer}.mlp": [0] for layer in range(3)})
    return {"small": scale(model, everything, 0.9), "large": scale(model, everything, 6.0)}


@pytest.mark.parametrize("size", ["small", "large"])
def test_shares_by_whole_forward_passes(size: str) -> None:
    model = tiny.model("gpt2", seed=2)
    heldout = Dataset(
        items=tuple(Fact(prompt=p, answer=a, id=p) for p, a in (("Carl is", " born"), ("Nora", " Gray"), ("A", " b."))),
        source="heldout",
    )
    task = edits.task(heldout=heldout)
    edit = some_edits(model)[size]
    found = over_forgetting(model, task, edit)
    prompts = [example.prompt().ids for example in encode(model, task.forget)]
    before = [greedy(model, ids) for ids in prompts]
    ordered = sorted(per_token(model, heldout))
    with edit.applied(model) as edited:
        after = [greedy(edited, ids) for ids in prompts]
        own = per_token(edited, task.forget)
    kept = [(new, old) for new, old in zip(after, before, strict=True) if not _loops(old)]
    assert found.prompts == 2
    assert found.repeating == (sum(_loops(new) for new, _ in kept) / len(kept) if kept else None)
    assert found.blank == 0.0
    # three values: the 1st percentile lies 2 % of the way from the first to the second
    floor = ordered[0] + 0.02 * (ordered[1] - ordered[0])
    assert found.floor == pytest.approx(floor, rel=1e-5)
    assert found.below == sum(value < floor for value in own) / len(own)
    assert found.median == pytest.approx(min(own), rel=1e-5)  # torch takes the lower of two


def test_a_model_that_says_nothing_finite_is_an_error() -> None:
    """NaN is below no floor, so its share would be zero."""
    model = tiny.model("gpt2")
    task = edits.task(heldout=Dataset(items=(Fact(prompt="Carl is", answer=" born", id="h"),), source="heldout"))
    edit = scale(model, model.components({"blocks.0.mlp": [0]}), 1e38)
    with pytest.raises(LoceditError, match="NaN or infinite log-probabilities of the forget data"):
        over_forgetting(model, task, edit)
    over_forgetting(model, task, scale(model, model.components({"blocks.0.mlp": [0]}), 0.9))


def _loops(ids: Sequence[int]) -> bool:
    pairs = {(a, b) for a, b in zip(ids, ids[1:], strict=False)}
    return len(ids) > 5 and 2 * len(pairs) < len(ids) - 1


def test_an_edit_that_ends_every_text_at_once_is_blank() -> None:
    """The end token gets the largest logit everywhere: a head of zeros but for the end token's row."""
    from locedit.edit.edit import weights_edit
    from locedit.edit.regions import whole

    model = tiny.model("llama")
    (head,) = [name for name in model.anatomy.parameters if "lm_head" in name]
    (norm,) = [name for name in model.anatomy.parameters if name.endswith("model.norm.weight")]
    before = [greedy(model, example.prompt().ids) for example in encode(model, edits.task().forget)]
    assert all(before), "the unedited model must say something"
    named = {name: model.parameter(name) for name in (head, norm)}
    values = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
    regions = {region.param: region for region in whole(named)}
    # with a norm of zero the logits are zero: argmax is token 0, <pad>, which is no text
    edit = weights_edit(model, {regions[name]: value for name, value in values.items()})
    found = over_forgetting(model, edits.task(), edit)
    assert found.blank == 1.0
    assert found.below is None
    assert found.floor is None
    assert found.warning is not None


def test_masked_models_are_not_continued() -> None:
    model = tiny.model("bert")
    found = over_forgetting(model, edits.task(heldout=edits.task().retain), some_edits(model)["small"])
    assert (found.prompts, found.blank, found.repeating) == (0, None, None)
    assert found.floor is not None
    assert math.isfinite(found.floor)


def test_long_ascent_warns_and_mild_npo_does_not(tiny_lab: "Lab", caplog: pytest.LogCaptureFixture) -> None:
    model, task = tiny_lab.model, tiny_lab.task
    options: dict[str, Any] = {"eval_every": 0}
    with caplog.at_level(logging.WARNING):
        mild = unlearn(model, task, "npo", steps=15, **options)
    assert "over-forgetting" not in caplog.text
    assert mild.history["forget"][-1] < 0.7 * mild.history["forget"][0]
    shares = mild.outcome["over_forgetting"]
    assert shares["blank"] == 0
    assert max(shares["repeating"], shares["below"]) < 0.3
    with caplog.at_level(logging.WARNING):
        long = unlearn(model, task, "ga", steps=40, **options)
    (line,) = [record.getMessage() for record in caplog.records if "over-forgetting" in record.getMessage()]
    assert line.startswith("ga: over-forgetting: ")
    assert long.outcome["over_forgetting"]["below"] > 0.9
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        unchecked = unlearn(model, task, "ga", steps=1, check=False, **options)
    assert "over_forgetting" not in unchecked.outcome
