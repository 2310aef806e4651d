"""Who's Harry Potter: learn what a model without the texts would say of them (Eldan and Russinovich 2023).

arXiv:2310.02238. Four steps, for each block of text:

    reinforced = the model, trained further on the texts
    translated = the text with its anchors replaced by their generic counterparts
    v_generic  = v_base(translated) - strength * relu(v_reinforced(original) - v_base(inner))
    label      = argmax v_generic, at every place that the text and its translation share

and the model is then trained on the original text with these labels. The reinforced model finds what the texts make
likelier, the translation what the base would say were it about somebody else. A base that is sure of the texts already
leaves little to reinforce: the second term is then small, and needs a larger strength or the anchors.

Formula (1) of the paper has one v_base for both, without anchors; with them re-implementations differ on whether the
inner one reads the translated or the original text. On raw logits the relu is not invariant to a constant added to all
logits of a position, though that changes no probability; on="log_probs" is.
"""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor
from torch.nn.functional import cross_entropy

from locedit import losses
from locedit.data.items import Task
from locedit.edit.edit import Edit
from locedit.edit.objective import Objective, Step
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.spans.texts import text_of
from locedit.unlearn.anchors import SUFFIXES, check_anchors, make_anchors, read_anchors
from locedit.unlearn.blocks import Blocks
from locedit.unlearn.generic_labels import LabelOptions, Labels, make_labels
from locedit.unlearn.registry import ForgetOptions, example_mean, nll, objective_of, one_of, retain_terms
from locedit.unlearn.translation import Translator


@dataclass(frozen=True, kw_only=True)
class WhpOptions(LabelOptions, ForgetOptions):
    """The paper trains with a rate of 1e-6 for 2 epochs, 120 to 150 steps of 128 blocks (recalled, not checked)."""

    anchors: str | dict[str, str] = "made"
    """terms and counterparts: a file (see `read_anchors`); made, from the task (see `make_anchors`); none, the
    reinforced model alone"""
    block: int = 512
    "tokens that are labelled together, at most; that of the context where it is smaller"
    drop_repeated: bool = True
    """no labels on an anchor from its second occurrence in a block on, which would contradict the first (recalled), nor
    where the first token of its counterpart, then lowered, has been introduced by another anchor (inferred)"""
    inside_anchors: Literal["unlabelled", "by_number"] = "unlabelled"
    """the tokens after the first of an anchor: unlabelled; by_number, labelled where its counterpart has equally many,
    with the counterpart's"""
    retain_weight: float = 0.0
    "of the retain term; the paper has none"

    def __post_init__(self) -> None:
        LabelOptions.__post_init__(self)
        ForgetOptions.__post_init__(self)
        one_of(self, "inside_anchors", ("unlabelled", "by_number"))
        if self.block < 2:
            raise LoceditError(f"block={self.block!r} must be at least 2")


def dictionary(task: Task, options: WhpOptions) -> dict[str, str]:
    """The anchors that the options ask for; LoceditError where the forget data have none of them."""
    given = options.anchors
    if given == "none":
        return {}
    if given == "made":
        return make_anchors(task, seed=options.seed)
    if isinstance(given, str):
        if Path(given).suffix not in SUFFIXES:
            raise LoceditError(f"anchors={given!r} is neither 'made', 'none' nor a file in {', '.join(SUFFIXES)}")
        found, source = read_anchors(given), given
    else:
        found, source = check_anchors(given), "anchors"
    translator = Translator(found)
    if not any(translator(text_of(item)).replaced for item in task.forget):
        raise LoceditError(f"{source}: none of its {len(found)} terms is in {task.forget.source}")
    return found


def verify(task: Task, options: WhpOptions) -> None:
    """Anchors that can be read or made, at least one of them in the forget data."""
    dictionary(task, options)


def objective(model: Model, task: Task, options: WhpOptions) -> Objective:
    """Make the labels, or read them; the loss then sees the original texts in blocks."""
    anchors = dictionary(task, options)
    made = objective_of(model, task, nll, name="whp", retain=options.retain_weight != 0)
    blocks = Blocks(
        model=model,
        anchors=anchors,
        size=options.block,
        drop_repeated=options.drop_repeated,
        inside=options.inside_anchors,
    )
    labels = make_labels(model, blocks.of(task.forget), options, seed=options.seed)
    return dataclasses.replace(
        made,
        loss=functools.partial(loss, options=options, labels=labels),
        forget=labels.examples,
        settings={"dictionary": anchors, "labels": labels.facts},
    )


def loss(step: Step, options: WhpOptions, labels: Labels) -> dict[str, Tensor]:
    """Cross-entropy to the generic labels in nats, mean over each block's tokens and then over blocks, and retain."""
    scored = step.score(step.forget)
    targets = labels.batch(step.forget).to(scored.logits.device)
    values = cross_entropy(losses.precise(scored.logits), targets, reduction="none")
    return {"generic_loss": options.forget_weight * example_mean(scored, values)} | retain_terms(step, options)


def finish(model: Model, edit: Edit, options: WhpOptions) -> Edit:
    """The edit with the anchors that were used, and what the labels were like, in its outcome."""
    del model, options
    assert edit.provenance is not None
    found = {name: edit.provenance.settings[name] for name in ("dictionary", "labels")}
    return dataclasses.replace(edit, outcome=edit.outcome | {"anchors": found["dictionary"], "labels": found["labels"]})
