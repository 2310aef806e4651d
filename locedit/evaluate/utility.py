"""What an edit costs elsewhere: perplexity, and how far the next-token distributions moved from the unedited model."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from locedit.data.encode import Batch, Example, batches, encode
from locedit.data.items import Item, PlainText, PrivateText
from locedit.edit import Edit
from locedit.evaluate.scoring import token_scores
from locedit.evaluate.values import Values, View
from locedit.losses import kl, score
from locedit.models import Model

MAX_HELD = 50_000_000
"logits of the unedited model held at a time: 200 MB in float32"


def perplexity_metric(view: View, names: Sequence[str]) -> dict[str, Values]:
    """exp of the mean token NLL over all tokens of all texts; a text's own perplexity is kept per example.

    Texts longer than the context are scored in windows, each as an example of its own.
    """
    assert tuple(names) == ("perplexity",)
    examples = encode(view.model, [_as_plain(item) for item in view.dataset])
    scores = token_scores(view.model, examples, batch_size=view.options.batch_size)
    per_token = [float(found.log_probs.mean().neg().exp()) for found in scores]
    return {
        "perplexity": Values(
            per_example={example.id: value for example, value in zip(examples, per_token, strict=True)},
            owners=text_owners(examples),
            weights={example.id: float(len(found.log_probs)) for example, found in zip(examples, scores, strict=True)},
            combine="exp",
        )
    }


def _as_plain(item: Item) -> Item:
    """A private text as a text of which every token is scored."""
    return PlainText(text=item.text, id=item.id, owner=item.owner) if isinstance(item, PrivateText) else item


def text_owners(examples: Sequence[Example]) -> dict[str, str | None]:
    """id -> owner, or else the text that the example is a window of."""
    return {example.id: example.owner or f"text {example.id.rsplit('#', 1)[0]}" for example in examples}


def shift_metrics(view: View, names: Sequence[str]) -> dict[str, Values]:
    """kl_to_base and agreement_with_base per scored token, averaged over all tokens of all texts."""
    assert view.edit is not None, "a shift is measured between the unedited and the edited model"
    examples = encode(view.model, view.dataset)
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    weights: dict[str, float] = {}
    with torch.inference_mode():
        for group in _held_together(view.model, batches(examples, view.model, view.options.batch_size)):
            for example, divergence, agreement in _shifts(view.model, view.edit, group):
                means = {"kl_to_base": divergence.mean(), "agreement_with_base": agreement.mean()}
                weights[example.id] = float(len(divergence))
                for name in names:
                    found[name][example.id] = float(means[name])
    owners = text_owners(examples)
    ordered = {name: {example.id: values[example.id] for example in examples} for name, values in found.items()}
    return {name: Values(per_example=values, owners=owners, weights=weights) for name, values in ordered.items()}


def _held_together(model: Model, found: Iterator[Batch]) -> Iterator[list[Batch]]:
    """Groups of batches whose logits are held at once, so that the edit is applied once a group."""
    group: list[Batch] = []
    held = 0
    for batch in found:
        size = int(batch.scored.sum()) * model.vocab_size
        if group and held + size > MAX_HELD:
            yield group
            group, held = [], 0
        group.append(batch)
        held += size
    if group:
        yield group


_Shift = tuple[Example, Float[Tensor, " token"], Float[Tensor, " token"]]


def _shifts(model: Model, edit: Edit, group: Sequence[Batch]) -> Iterator[_Shift]:
    """For every example: KL(unedited || edited) in nats and whether the argmax is the same, token by token."""
    before = [score(model, batch).logits.float() for batch in group]
    with edit.applied(model) as edited:
        after = [score(edited, batch) for batch in group]
    for reference, scored in zip(before, after, strict=True):
        divergence = kl(scored.logits.float(), reference).double().clamp(min=0).cpu()
        agreement = (scored.logits.argmax(1) == reference.argmax(1)).double().cpu()
        row = scored.row.cpu()
        for at, example in enumerate(scored.rows):
            yield example, divergence[row == at], agreement[row == at]
