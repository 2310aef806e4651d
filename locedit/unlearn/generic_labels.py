"""Generic labels of Who's Harry Potter: what a model that does not know the texts would say in them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import relu

from locedit import losses
from locedit.data.encode import Batch, Example, collate
from locedit.edit.edit import Edit
from locedit.edit.levels import levels
from locedit.errors import LoceditError
from locedit.models import Model
from locedit.provenance import content_hash, plain
from locedit.unlearn.blocks import Block
from locedit.unlearn.helpers import HelperOptions, fingerprint, kept, placed, taught
from locedit.unlearn.registry import at_least_zero, one_of

VERSION = 2
"To be raised whenever labels come out differently from the same settings."
LOGIT_BYTES = 2**29
"Blocks whose logits fit into this size, at least one, are labelled together: reinforced weights go in once for them."


@dataclass(frozen=True, kw_only=True)
class LabelOptions(HelperOptions):
    """Of the reinforced model, which is the helper, and of the labels."""

    strength: float = 5.0
    "alpha, of what the reinforced model makes likelier; the paper's 5 is recalled, not checked; 0 = without that model"
    inner: Literal["translated", "original"] = "translated"
    "the text that the reinforced model's logits on the original are compared with"
    on: Literal["logits", "log_probs"] = "logits"
    "logits, as written; log_probs, the same with log-probabilities"
    lower_introduced: float = 5.0
    """subtracted from the logit of the first token of a counterpart, with and without a space before it, once it has
    been introduced in a block, so that the original name does not become the other in the middle of a text (recalled;
    the amount is inferred)"""
    helper_steps: int = 200
    "optimizer steps of the reinforced model; the paper's 3 epochs (recalled, not checked)"
    helper_learning_rate: float = 1e-3
    "of the reinforced model; the paper's 3e-6 (recalled, not checked)"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_zero(self, "strength", "lower_introduced")
        one_of(self, "inner", ("translated", "original"))
        one_of(self, "on", ("logits", "log_probs"))


def generic_logits(
    translated: Float[Tensor, "n vocab"],
    reinforced: Float[Tensor, "n vocab"],
    inner: Float[Tensor, "n vocab"],
    *,
    strength: float = 5.0,
    on: Literal["logits", "log_probs"] = "logits",
) -> Float[Tensor, "n vocab"]:
    """translated - strength * relu(reinforced - inner): never above `translated`, and equal where nothing rose."""
    parts = [losses.precise(logits) for logits in (translated, reinforced, inner)]
    if on == "log_probs":
        parts = [logits.log_softmax(1) for logits in parts]
    return parts[0] - strength * relu(parts[1] - parts[2])


@torch.no_grad()
def generic(
    model: Model, blocks: Sequence[Block], reinforced: Edit | None, options: LabelOptions
) -> Float[Tensor, "n vocab"]:
    """Generic logits at the labelled tokens of some blocks, one after the other; without `reinforced`, the base's."""
    original, translated = (
        collate(examples, model).to(model.device)
        for examples in ([block.original for block in blocks], [block.translated for block in blocks])
    )
    outer = losses.score(model, translated).logits
    found = outer if options.on == "logits" else losses.precise(outer).log_softmax(1)
    if reinforced is not None:
        inner = outer if options.inner == "translated" else losses.score(model, original).logits
        with reinforced.applied(model) as edited:
            raised = losses.score(edited, original).logits
        found = generic_logits(outer, raised, inner, strength=options.strength, on=options.on)
    return _lowered(losses.precise(found), blocks, options.lower_introduced)


def _lowered(logits: Tensor, blocks: Sequence[Block], amount: float) -> Tensor:
    """The logits with those of introduced counterparts lowered."""
    logits, at = logits.clone(), 0
    for block in blocks:
        end = at + len(block.original.targets)
        for first, token in block.introduced:
            logits[at + first : end, token] -= amount
        at = end
    return logits


def _groups(blocks: Sequence[Block], vocab: int) -> Iterator[list[Block]]:
    """Neighbouring blocks whose logits, three float32 tensors, fit into LOGIT_BYTES; at least one."""
    group: list[Block] = []
    size = 0
    for block in blocks:
        mine = 12 * len(block.original.targets) * vocab
        if group and size + mine > LOGIT_BYTES:
            yield group
            group, size = [], 0
        group.append(block)
        size += mine
    if group:
        yield group


class Labels:
    """The generic label of every labelled token."""

    def __init__(self, blocks: Sequence[Block], tensors: Mapping[str, Tensor]) -> None:
        self.examples = [block.original for block in blocks]
        counts = [len(example.targets) for example in self.examples]
        self._of = dict(zip(self.examples, tensors["labels"].split(counts), strict=True))
        own = torch.tensor([example.ids[at] for example in self.examples for at in example.targets])
        self.facts: dict[str, Any] = {
            "tokens": len(own),
            "text's own": float((tensors["labels"] == own).double().mean()),
            "generic probability of the text": float(tensors["generic"]),
            "token probability": tensors["token_probability"].tolist(),
        }
        """how many tokens have one, and for how many it is the text's own token; the mean probability of the text's own
        tokens under softmax(v_generic); the texts' token probability before and after reinforcement"""
        self.hash = content_hash([fingerprint(self.examples), tensors["labels"].tolist()])

    def __str__(self) -> str:
        return f"labels {self.hash}"

    def of(self, example: Example) -> Tensor:
        """The labels at the example's targets."""
        return self._of[example]

    def batch(self, batch: Batch) -> Tensor:
        """The labels of a batch's scored tokens, in their order."""
        return torch.cat([self._of[example] for example in batch.examples])


def make_labels(model: Model, blocks: Sequence[Block], options: LabelOptions, *, seed: int) -> Labels:
    """Train the reinforced model, label all blocks and let it go; or read what is kept of the same from before."""
    blocks = [block for block in blocks if block.original.targets]
    if not blocks:
        raise LoceditError("whp: no token of the forget data has a place in its translation: nothing to label")
    texts = [block.text for block in blocks]

    def make() -> dict[str, Tensor]:
        reinforced = (
            taught(model, texts, options=options, seed=seed, name="whp, reinforced") if options.strength else None
        )
        labels, own = zip(*_labelled(model, blocks, reinforced, options), strict=True)
        known = [_known(model, texts, edit) for edit in (None, reinforced)]
        return {
            "labels": torch.cat(labels),
            "generic": torch.cat(own).double().mean(),
            "token_probability": torch.tensor(known, dtype=torch.float64),
        }

    decisive = ("strength", "inner", "on", "lower_introduced")
    training = plain(options.helper_training(seed=seed)) | {"hold": options.helper_hold}
    key = {
        "generic labels": VERSION,
        **placed(model, [block.original for block in blocks]),
        "texts": [fingerprint([getattr(b, name) for b in blocks]) for name in ("text", "original", "translated")],
        "introduced": [block.introduced for block in blocks],
        "options": [getattr(options, name) for name in decisive],
        "reinforced": training if options.strength else None,
    }
    return Labels(blocks, kept(key, make))


def _labelled(
    model: Model, blocks: Sequence[Block], reinforced: Edit | None, options: LabelOptions
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each group of blocks the labels, and the generic probability of the text's own tokens."""
    for group in _groups(blocks, model.vocab_size):
        logits = generic(model, group, reinforced, options)
        own = torch.tensor([b.original.ids[at] for b in group for at in b.original.targets], device=logits.device)
        probability = logits.softmax(1).gather(1, own[:, None]).squeeze(1)
        yield logits.argmax(1).cpu(), probability.cpu()


def _known(model: Model, texts: Sequence[Example], reinforced: Edit | None) -> float:
    """Mean token probability of the texts."""
    with nullcontext(model) if reinforced is None else reinforced.applied(model) as edited:
        return levels(edited, {"texts": texts}, level="token_probability")["texts"]
