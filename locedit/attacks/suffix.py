"""A suffix of ordinary tokens between prompt and answer, the same for all prompts, that brings the answers back.

The dynamic unlearning attack of Yuan et al. 2024 (arXiv:2408.10682): a universal suffix is searched for with gradients
(`token_search`) that makes the true answers of many prompts likely, and then needs nothing but the prompt. Their three
settings are three numbers:

- cross_target, the headline: searched for on other owners, measured on owners it never saw;
- cross_query: searched for on some relations of the same owners, measured on their other relations;
- within_query: searched for and measured on the same items, which only says that a suffix exists.

Each has its own never-known control, searched for and measured in the same way. The suffix is searched for in the
edited model, or in the unedited one (`found_on`, the paper's other row). Their score is the change of ROUGE-L of what
is written; here it is the metric of the attack. Their code of this attack is not published. The defaults are small
beside published searches (20 tokens, 500 steps of 512 candidates among the top 256): no failure at these says that no
suffix exists.

Tokens are put in as ids, right before the first scored token: of a private text that is inside the text, before its
first span. Written as text and read again they may become other tokens, so the decoded suffix in the note is only for
looking at.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from locedit.attacks.aim import Aim, ItemOptions, Side, Target, aimed
from locedit.attacks.arms import Control, Dose, Values
from locedit.attacks.conditional import conditional
from locedit.attacks.inserted import check_fits, drawn_tokens, ordinary_tokens
from locedit.attacks.item_attack import ItemAttack
from locedit.attacks.measures import values_of
from locedit.attacks.outcome import Others, carried_out
from locedit.attacks.shared import Shared
from locedit.attacks.token_search import Search, Tokens, searched, with_suffix
from locedit.data.items import Task
from locedit.edit import Edit
from locedit.errors import LoceditError, nearest
from locedit.models import Model
from locedit.options import fill
from locedit.results import AttackResult

Setting = Literal["cross_target", "cross_query", "within_query"]
BESIDE: tuple[Setting, ...] = ("cross_query", "within_query")
CONTEXTS = 8
"random suffixes a forget item in which the positive control keeps the answer"


@dataclass(frozen=True, kw_only=True)
class SuffixOptions(ItemOptions):
    """How long the suffix is, and how hard it is searched for."""

    length: int = 6
    "tokens of the suffix"
    steps: int = 20
    "steps of the search"
    look_every: int = 10
    "steps between two looks at the other half; every look is a dose"
    candidates: int = 24
    "suffixes with one token swapped that are tried in a step"
    top_k: int = 64
    "tokens at each place among which swaps are drawn, by the gradient"
    prompts: int = 16
    "items that the suffix is searched for on, at most, drawn once"
    found_on: Literal["edited", "unedited"] = "edited"
    "the model in which the suffix is searched for; it is always tried on the edited one"
    beside: tuple[Literal["cross_query", "within_query"], ...] = BESIDE
    "the settings that are reported beside cross_target; cross_query costs as much again"
    batch_size: int = 128
    "texts in a forward pass of the search"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("length", "steps", "look_every", "candidates", "top_k", "prompts", "batch_size"):
            if getattr(self, name) < 1:
                raise LoceditError(f"suffix: {name}={getattr(self, name)!r} must be at least 1")
        for setting in self.beside:
            if setting not in BESIDE:
                raise LoceditError(f"suffix: beside={self.beside!r}: {setting!r}; {nearest(setting, BESIDE)}")
        if self.found_on not in ("edited", "unedited"):
            raise LoceditError(f"suffix: found_on={self.found_on!r}; choose edited or unedited")

    @property
    def looks(self) -> tuple[int, ...]:
        """The steps after which the other half is measured."""
        return tuple(sorted({*range(self.look_every, self.steps, self.look_every), self.steps}))


def suffix(
    model: Model, task: Task, edit: Edit, *, others: Others = None, shared: Shared | None = None, **options: Any
) -> AttackResult:
    """Search for tokens between prompt and answer, from half of the forget items."""
    attack, memo = Suffix(fill(SuffixOptions, options, method="suffix")), shared or Shared()
    aim = aimed(model, task, attack.options, by=attack.name, learns=True, shared=memo, narrow=None)
    settings: list[Setting] = [name for name in attack.options.beside if name != "cross_query" or crossable(aim)]
    if len(settings) < len(attack.options.beside):
        attack.notes.append("cross_query was left out: there are owners with one query alone")
    attack.prepare(aim)
    result = carried_out(attack, model, task, edit, others=others, shared=memo)
    for setting in settings:
        beside = Suffix(dataclasses.replace(attack.options, shallow=False), setting=setting)
        beside.prepare(aim)
        result = joined(result, carried_out(beside, model, task, edit, others=None, shared=memo), setting)
    return result


class Suffix(ItemAttack[SuffixOptions]):
    """The metric of every item with the suffix before its answer, at every look."""

    name: ClassVar[str] = "suffix"
    lead: ClassVar[str] = "With a suffix searched for on other forget items"
    x_name: ClassVar[str] = "steps"
    learns: ClassVar[bool] = True

    def __init__(self, options: SuffixOptions, *, setting: Setting = "cross_target") -> None:
        super().__init__(options)
        self.setting: Setting = setting

    def doses(self, aim: Aim) -> tuple[Dose, ...]:  # noqa: ARG002
        return tuple(Dose(x=step) for step in self.options.looks)

    def ready(self, aim: Aim) -> None:
        sides = [side.examples for side in (aim.forget, aim.heldout, aim.kept) if side is not None]
        check_fits(aim.model, sides, self.options.length, by=self.name, option="length")

    def prepare(self, aim: Aim) -> None:
        """Search in the unedited model where that is asked for, before anything is edited."""
        sides = [(aim.forget, aim.forget_halves)]
        sides += [(aim.heldout, aim.heldout_halves)] if aim.heldout is not None else []
        if self.options.found_on == "unedited":
            for side, halves in sides:
                for half in halves:
                    for learned, _ in self._parts(side.at(half.relearned), side.at(half.measured)):
                        self._searched(Target(model=aim.model, key="unedited"), learned, aim)

    def attack(self, target: Target, learned: Side, measured: Mapping[str, Side], aim: Aim) -> Values:
        data = next(name for name in measured if name != "retain")
        parts = self._parts(learned, measured[data])
        found = {name: torch.zeros(len(self.options.looks), len(side)).double() for name, side in measured.items()}
        for source, places in parts:
            for look, tokens in enumerate(self._searched(target, source, aim)):
                for name, side in measured.items():
                    at = places if name == data else range(len(side))
                    rows = [with_suffix(side.examples[place], tokens) for place in at]
                    values = values_of(target.model, rows, aim.metric)
                    found[name][look, list(at)] += values / (1 if name == data else len(parts))
        return found

    def control(self, aim: Aim, *, level: float) -> Control:
        """An edit that acts only without other tokens before the answer."""
        ordinary, length = ordinary_tokens(aim.model, aim.shared), self.options.length
        generator = torch.Generator().manual_seed(self.options.seed)
        opened = {
            example: [
                with_suffix(example, drawn_tokens(ordinary, length, generator=generator)) for _ in range(CONTEXTS)
            ]
            for example in aim.forget.examples
        }
        where = f"{length} random tokens before the answer"
        return conditional(aim, self.options, opened, level=level, where=where)

    def _parts(self, learned: Side, measured: Side) -> list[tuple[Side, list[int]]]:
        """(items to search on, places of the measured items that it is then tried on), by the setting."""
        everything = list(range(len(measured)))
        if self.setting == "cross_query":
            first, second = queries(measured)
            return [(measured.at(first), second), (measured.at(second), first)]
        return [(measured if self.setting == "within_query" else learned, everything)]

    def _searched(self, target: Target, side: Side, aim: Aim) -> list[Tokens]:
        """The suffix at every look; searched for once for the same model and items."""
        options = self.options
        key = "unedited" if options.found_on == "unedited" else target.key
        how = dataclasses.replace(options, shallow=True, beside=())
        place = ("suffix", key, side.examples, how)
        return aim.shared.get(place, lambda: self._search(target.model, side, aim))

    def _search(self, model: Model, side: Side, aim: Aim) -> list[Tokens]:
        options = self.options
        generator = torch.Generator().manual_seed(options.seed)
        drawn = torch.randperm(len(side), generator=generator)[: options.prompts].tolist()
        search = Search(
            length=options.length,
            steps=options.steps,
            top_k=options.top_k,
            candidates=options.candidates,
            batch_size=options.batch_size,
            seed=options.seed,
        )
        examples = side.at(sorted(drawn)).examples
        course = searched(model, examples, ordinary_tokens(model, aim.shared), search)
        tokens, loss = course[-1]
        if not self.notes:
            text = model.tokenizer.decode(list(tokens))
            self.notes.append(f"the first suffix, {course[0][1]:.2f} to {loss:.2f} nats where it was found: {text!r}")
        return [course[step][0] for step in options.looks]


def queries(side: Side) -> tuple[list[int], list[int]]:
    """Places of the items in two parts: every other relation of every owner; without relations every other item."""
    groups = sorted({item.group for item in side.items if item.group is not None})
    ranks: list[int] = []
    seen: dict[str, int] = {}
    for item, owner in zip(side.items, side.owners, strict=True):
        seen[owner] = seen.get(owner, -1) + 1
        by_relation = len(groups) > 1 and item.group is not None
        ranks.append(groups.index(item.group) if by_relation and item.group is not None else seen[owner])
    first = [place for place, rank in enumerate(ranks) if rank % 2 == 0]
    return first, [place for place, rank in enumerate(ranks) if rank % 2]


def crossable(aim: Aim) -> bool:
    """Whether every owner has queries of both parts."""
    sides = [aim.forget, *([aim.heldout] if aim.heldout is not None else [])]
    return all({side.owners[place] for place in part} == set(side.owners) for side in sides for part in queries(side))


def joined(result: AttackResult, beside: AttackResult, setting: Setting) -> AttackResult:
    """The result with the numbers and curves of another setting beside its own."""
    groups: dict[tuple[str, str | None], str] = {
        ("forget", None): setting,
        ("heldout", "never knew"): f"never knew, {setting}",
    }
    levels = [
        dataclasses.replace(m, group=groups[m.dataset, m.group])
        for m in beside.measures
        if m.stage == "attacked" and (m.dataset, m.group) in groups
    ]
    curves = [
        dataclasses.replace(curve, name=f"{curve.name} ({setting})", track=setting, matched=None)
        for curve in beside.curves
    ]
    share = dataclasses.replace(beside.headline, group=setting)
    return dataclasses.replace(result, measures=(*result.measures, *levels, share), curves=(*result.curves, *curves))
