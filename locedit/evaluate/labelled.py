"""Classification by the word that a causal model says next, and how unequal it is between groups of texts.

Each labelled text is put into `label_template`; the class is that of the likeliest word (see `classify`). The classes
are the labels of the task's labelled texts, each with its own name as its word unless `label_words` gives others.
Unequal rates are those of fairlearn (Weerts et al. 2023, arXiv:2303.16626), for the output `positive` against all
others: the largest difference between groups in the share of that output among all texts (demographic parity), among
those that are truly so (equal opportunity; Hardt et al. 2016, arXiv:1610.02413), and the larger one of that and of the
same difference among those that are not (equalised odds).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from locedit.classification import Verbaliser, classify, label_numbers
from locedit.data.items import LabelledText, Task
from locedit.errors import LoceditError, nearest
from locedit.evaluate.intervals import Estimate, around, owner_index, resampled_means
from locedit.evaluate.values import EvaluateOptions, Values, View

WITHIN: dict[str, tuple[bool | None, ...]] = {
    "demographic_parity_difference": (None,),
    "equal_opportunity_difference": (True,),
    "equalized_odds_difference": (True, False),
}
"""Metric -> the truths (positive or not; None = all texts) within which the groups' rates are compared."""


def labelled_metrics(view: View, names: Sequence[str]) -> dict[str, Values]:
    """classification_accuracy, and the differences between groups; an example's value is 1 if right, or if positive."""
    items = view.dataset.of(LabelledText, by="classification")
    verbaliser = verbaliser_of(view.task, view.options)
    truth = label_numbers(view.dataset, verbaliser)
    columns = {name: positive_column(verbaliser, view.options, name) for name in names if name in WITHIN}
    for name, column in columns.items():
        _check_rates(view, items, truth == column, name=name)
    texts = [item.text for item in items]
    said = classify(view.model, texts, verbaliser, batch_size=view.options.batch_size, chat=view.dataset.chat).argmax(1)
    right = (said == truth).tolist()
    found = {
        "classification_accuracy": Values(
            per_example={item.id: float(value) for item, value in zip(items, right, strict=True)},
            owners={item.id: item.owner for item in items},
            groups={item.id: tuple(n for n in (item.format, item.group) if n) for item in items},
        )
    }
    for name, column in columns.items():
        found[name] = _difference(view, items, said == column, truth == column, name=name)
    return {name: found[name] for name in names}


def _difference(
    view: View,
    items: Sequence[LabelledText],
    said: Bool[Tensor, " items"],
    truth: Bool[Tensor, " items"],
    *,
    name: str,
) -> Values:
    """The largest difference of a rate between the groups, with its interval; it has no parts."""
    groups = [item.group for item in items]
    ids = {item.id: at for at, item in enumerate(items)}

    def estimate(chosen: Sequence[str]) -> Estimate:
        at = torch.tensor([ids[key] for key in chosen])
        owners = [items[int(i)].owner for i in at]
        cells = rate_cells([groups[int(i)] for i in at], truth[at], WITHIN[name])
        return _estimate(cells, said[at], owners, view.options, within=len(WITHIN[name]))

    return Values(
        per_example={item.id: float(value) for item, value in zip(items, said.tolist(), strict=True)},
        owners={item.id: item.owner for item in items},
        estimate=estimate,
    )


def rate_cells(
    groups: Sequence[str | None], truth: Bool[Tensor, " items"], within: Sequence[bool | None]
) -> Float[Tensor, "items cell"]:
    """Whether an item is in a cell: for every truth in `within` one cell for each group, in turn; float64."""
    names = sorted({str(group) for group in groups})
    member = torch.tensor([[str(group) == name for name in names] for group in groups])
    parts = [member if wanted is None else member & (truth == wanted)[:, None] for wanted in within]
    return torch.cat(parts, dim=1).double()


def _estimate(
    cells: Float[Tensor, "items cell"],
    said: Bool[Tensor, " items"],
    owners: Sequence[str | None],
    options: EvaluateOptions,
    *,
    within: int,
) -> Estimate:
    columns = torch.cat([cells, cells * said[:, None]], dim=1)
    value = float(gap(columns.mean(0, keepdim=True), within=within)[0])
    if max(owner_index(owners)) == 0:
        return Estimate(value, float("nan"), float("nan"))
    drawn = resampled_means(columns, owners=owners, draws=options.draws, seed=options.seed)
    return around(value, gap(drawn, within=within))


def gap(means: Float[Tensor, "draw column"], *, within: int) -> Float[Tensor, " draw"]:
    """Largest minus smallest rate of the groups, the largest over the truths; a rate of nothing is left out.

    The columns are the means of the cells, then of the cells' positive outputs.

    >>> gap(torch.tensor([[0.5, 0.5, 0.25, 0.0]]), within=1)
    tensor([0.5000])
    """
    share, positive = means.chunk(2, dim=1)
    rates = (positive / share).view(len(means), within, -1)
    high = rates.nan_to_num(nan=-torch.inf).amax(2)
    low = rates.nan_to_num(nan=torch.inf).amin(2)
    return (high - low).clamp(min=0).amax(1)


# --- what the user gave ----------------------------------------------------------------------------------------------


def verbaliser_of(task: Task, options: EvaluateOptions) -> Verbaliser:
    """The template and the word of every label of the task."""
    data = [part for part in (task.forget, task.retain, task.heldout) if part is not None and part.kind == "labelled"]
    labels = sorted({item.label for part in data for item in part.of(LabelledText, by="classification")})
    given = dict(_words(options.label_words or ()))
    for label in given:
        if label not in labels:
            raise LoceditError(f"evaluate: label_words: unknown label {label!r}; {nearest(label, labels)}")
    words = {label: given.get(label, f" {label}") for label in labels}
    if len(words) < 2:
        raise LoceditError(f"classification needs texts of two labels or more; all are {labels[0]!r}")
    return Verbaliser(template=options.label_template.replace("\\n", "\n"), words=words)


def _words(parts: Sequence[str]) -> list[tuple[str, str]]:
    """(label, word with a space before it) of every label=word."""
    found: list[tuple[str, str]] = []
    for part in parts:
        label, equals, word = part.partition("=")
        if not equals:
            raise LoceditError(f"evaluate: label_words: {part!r} is not LABEL=WORD")
        found.append((label.strip(), word if word.startswith(" ") else f" {word}"))
    return found


def positive_column(verbaliser: Verbaliser, options: EvaluateOptions, name: str) -> int:
    """The column of the output whose rates are compared; of two labels either gives the same gap in most metrics."""
    if options.positive is not None:
        return verbaliser.number(options.positive, by="evaluate: positive")
    if len(verbaliser.labels) > 2 or name == "equal_opportunity_difference":
        raise LoceditError(f"metric {name!r} needs the option positive: one of {', '.join(verbaliser.labels)}")
    return 0


def _check_rates(view: View, items: Sequence[LabelledText], truth: Bool[Tensor, " items"], *, name: str) -> None:
    groups = [item.group for item in items]
    if None in groups or len(set(groups)) < 2:
        raise LoceditError(
            f"{view.dataset.source}: metric {name!r} needs a group on every text, and two groups or more"
        )
    names = sorted({str(group) for group in groups})
    cells = rate_cells(groups, truth, WITHIN[name])
    for at, empty in enumerate((cells.sum(0) == 0).tolist()):
        if empty:
            what = "positive" if WITHIN[name][at // len(names)] else "negative"
            raise LoceditError(
                f"{view.dataset.source}: metric {name!r}: group {names[at % len(names)]!r} has no {what} text, so its "
                "rate is not defined"
            )
