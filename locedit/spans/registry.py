"""What a rule that proposes spans is, and what it may look at."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from locedit.data.items import Dataset, Item
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.spans.found import Rejected
from locedit.spans.texts import Mark


@dataclass(frozen=True, kw_only=True)
class Source:
    """The texts, and the models that a rule or a verification may ask."""

    data: Dataset
    model: Model | None = None
    "the one that is to forget"
    scorer: Model | None = None
    "one that has not memorised the texts: a smaller one, or an earlier checkpoint"
    annotator: Model | None = None
    "one that can follow a prompt"

    def require(self, *roles: str, by: str) -> Model:
        """The first of the models that there is, or an error that says how to give one."""
        for role in roles:
            if (model := getattr(self, role)) is not None:
                return model
        raise LoceditError(f"{by} needs a model: give {' or '.join(f'{role}=' for role in roles)}")


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """What a rule says about one text."""

    item: Item
    marks: tuple[Mark, ...]
    rejected: tuple[Rejected, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One entry of RULES."""

    function: Callable[[Source, Any], Sequence[Proposal]]
    "(source, options) -> a proposal for every text, in order"
    options: type[Any]
    needs: tuple[str, ...] = ()
    "models, any one of which must be there: model, scorer, annotator"
    paper: str = ""
