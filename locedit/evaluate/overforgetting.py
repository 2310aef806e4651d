"""Whether an edit has gone too far: blank or repeating output, answers less likely than to a model that never knew.

What is looked for, each as a share of what could show it:

- blank: greedy continuations of forget prompts that hold nothing but white space or end at once, where those of the
  unedited model do not;
- repeating: continuations of which fewer than half of the bigrams are distinct, where those of the unedited model do
  not repeat themselves;
- below: forget items whose log-probability per token after the edit is under the 1st percentile of the held-out items
  before the edit. These the model never knew, so that an edit which only takes knowledge away leaves forget items among
  them, and one in a hundred below that percentile.

A share above one half is over-forgetting. The rule is ours.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from locedit import losses
from locedit.contrasts import are_pairs
from locedit.data.encode import Example, collate, encode
from locedit.data.items import Task
from locedit.edit.edit import Edit
from locedit.errors import LoceditError
from locedit.models import Model

PROMPTS = 16
"prompts at most"
TOKENS = 20
"tokens of a continuation"
ITEMS = 128
"forget items, and held-out items, at most whose probability is measured"
LIMIT = 0.5
"a share above it is over-forgetting"
SHORTEST = 5
"bigrams from which on a continuation can repeat itself"


@dataclass(frozen=True, kw_only=True)
class OverForgetting:
    """Signs of over-forgetting; None where there is nothing to tell it from."""

    prompts: int
    "forget prompts that were continued"
    blank: float | None
    "share of the continuations that are blank, of those that were not before the edit"
    repeating: float | None
    "share of the continuations that repeat themselves, of those that did not before the edit"
    below: float | None
    "share of the forget items below `floor` after the edit; needs held-out data"
    floor: float | None
    "1st percentile of the held-out items' log-probability per token in nats, before the edit"
    median: float | None
    "log-probability per token of the forget items after the edit, median over items"

    @property
    def warning(self) -> str | None:
        """What is over-forgotten, in one line; None where nothing is."""
        signs: list[str] = []
        for share, what in ((self.blank, "blank"), (self.repeating, "repeating")):
            if share is not None and share > LIMIT:
                signs.append(
                    f"{share:.0%} of the continuations of forget prompts that were not {what} are {what} now "
                    f"({self.prompts} prompts)"
                )
        if self.below is not None and self.below > LIMIT:
            signs.append(
                f"{self.below:.0%} of the forget items are less likely than to a model that never knew them (median "
                f"{self.median:.3g} nats a token, 1st percentile of the held-out items {self.floor:.3g})"
            )
        return "over-forgetting: " + "; ".join(signs) if signs else None

    def to_json(self) -> dict[str, float | None]:
        """The numbers by name."""
        return dataclasses.asdict(self)


@torch.no_grad()
def over_forgetting(model: Model, task: Task, edit: Edit) -> OverForgetting:
    """Look for over-forgetting with at most PROMPTS greedy continuations of TOKENS tokens after the edit.

    Those of the unedited model are only written where one after the edit is blank or repeats itself. A masked model is
    not continued. Probabilities are compared where the task has held-out data of the same kind, not for contrast pairs.
    Raises LoceditError where the edited model gives no finite ones.
    """
    forget = encode(model, task.forget)
    prompts = _prompts(model, forget)
    comparable = task.heldout is not None and task.heldout.kind == task.forget.kind and not are_pairs(forget)
    never = encode(model, task.heldout) if comparable and task.heldout is not None else []
    floor = float(_per_token(model, never).quantile(0.01)) if never else None
    with edit.applied(model) as edited:
        after = _continuations(edited, prompts)
        own = _per_token(edited, forget) if never else torch.zeros(0)
    if not bool(own.isfinite().all()):
        raise LoceditError("the edited model gives NaN or infinite log-probabilities of the forget data: edit it less")
    suspect = any(is_blank(text) or repeats(ids) for ids, text in after)
    before = _continuations(model, prompts) if suspect else after
    blank = [is_blank(text) for (_, text), (_, old) in zip(after, before, strict=True) if not is_blank(old)]
    repeating = [repeats(ids) for (ids, _), (old, _) in zip(after, before, strict=True) if not repeats(old)]
    return OverForgetting(
        prompts=len(prompts),
        blank=_share(blank),
        repeating=_share(repeating),
        below=None if floor is None else float((own < floor).double().mean()),
        floor=floor,
        median=None if floor is None else float(own.median()),
    )


def _prompts(model: Model, forget: Sequence[Example]) -> list[Example]:
    """Different prompts, spread over the forget data, that leave room for a continuation."""
    if not model.causal:
        return []
    room = model.max_length - TOKENS if model.max_length is not None else None
    prompts = {example.prompt().ids: example.prompt() for example in forget}
    return spread([p for ids, p in prompts.items() if ids and (room is None or len(ids) <= room)], PROMPTS)


def spread(examples: Sequence[Example], most: int) -> list[Example]:
    """At most that many examples, evenly from the first on."""
    step = max(1, -(-len(examples) // most))
    return list(examples[::step])


def _continuations(model: Model, prompts: Sequence[Example]) -> list[tuple[tuple[int, ...], str]]:
    """Token ids and text of the greedy continuations."""
    if not prompts:
        return []
    written = model.generate(collate(prompts, model), max_new_tokens=TOKENS)
    return [(ids, model.tokenizer.decode(ids, skip_special_tokens=True)) for ids in written]


def _per_token(model: Model, examples: Sequence[Example]) -> torch.Tensor:
    """Mean log-probability of the scored tokens of each example, in nats."""
    return -losses.nll_of_examples(model, spread(examples, ITEMS))


def is_blank(text: str) -> bool:
    """Whether there is nothing but white space."""
    return not text.strip()


def repeats(ids: Sequence[int]) -> bool:
    """Whether fewer than half of the bigrams are distinct, of at least SHORTEST.

    >>> repeats([5, 6, 5, 6, 5, 6, 5]), repeats([5, 6, 7, 8, 9, 5, 6]), repeats([5, 5, 5])
    (True, False, False)
    """
    bigrams = list(zip(ids, ids[1:], strict=False))
    return len(bigrams) >= SHORTEST and len(set(bigrams)) < len(bigrams) / 2


def _share(hits: Sequence[bool]) -> float | None:
    return sum(hits) / len(hits) if hits else None
