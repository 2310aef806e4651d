"""Scores by which a text that a model was trained on is told from one that it never saw; higher = more like a member.

With l_t the log-probability of token t given the true text before it, in nats, and T tokens in all:

    mia_loss           mean_t l_t                                            (Yeom et al. 2018, arXiv:1709.01604)
    mia_zlib           mean_t l_t / len(zlib(text)) in bytes                 (Carlini et al. 2021, arXiv:2012.07805)
    min_k              mean of the lowest max(1, floor(k T)) of the l_t      (Shi et al. 2024, arXiv:2310.16789)
    min_k_plus_plus    the same of (l_t - mu_t) / sigma_t, with mu_t and sigma_t the mean and the standard deviation of
                       log p(. | x_<t) under p(. | x_<t) itself              (Zhang et al. 2024, arXiv:2404.02936)
    mia_reference      mean_t l_t - mean_t l_t of another model              (Carlini et al. 2021)
    mia_recall         LL(text | prefix of non-members) / LL(text)           (Xie et al. 2024, arXiv:2406.15968)
    mia_gradient_norm  minus the L2 norm of the gradient of -mean_t l_t

Masked models: l_t with only token t masked. OpenUnlearning's code takes k = 0.4 (the paper 0.2), leaves the last token
out of both min_k scores and counts an end token in the loss; here every token of the text itself counts, once.
"""

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from locedit import tracing
from locedit.data.encode import Example, Span, batches, collate, encode
from locedit.data.items import Dataset, Fact, Item, PlainText, PrivateText
from locedit.errors import LoceditError
from locedit.losses import ScoringModel, precise, score, sequence_nll
from locedit.models import Model

FLOOR = 1e-6
"of the variance sigma_t^2, as in OpenUnlearning: a distribution with all its mass on one token has none"
TINY = 1e-9
"nats added to both likelihoods of mia_recall, so that a text of probability 1 has a ratio"
Scored = Literal["answer", "all"]
Norm = Literal["global", "tensor_mean"]


@dataclass(frozen=True, kw_only=True)
class Text:
    """One item as it is scored."""

    id: str
    owner: str | None
    text: str
    "what is scored, as text"
    examples: tuple[Example, ...]
    "several where it is longer than the context; every token is scored in one of them"

    @property
    def tokens(self) -> int:
        return sum(len(example.targets) for example in self.examples)


@dataclass(frozen=True, kw_only=True)
class TokenSignals:
    """The scored tokens of one text, in order, float64."""

    log_probs: Float[Tensor, " token"]
    "l_t, in nats"
    standard: Float[Tensor, " token"]
    "(l_t - mu_t) / sigma_t"


def texts_of(model: ScoringModel, data: Dataset, *, scored: Scored = "answer") -> list[Text]:
    """Every item with the tokens that count: of a fact the answer or all of it, of a text all that can be predicted."""
    whole = [_as_plain(item) for item in data]
    examples = encode(model, whole, chat=data.chat)
    if data.kind == "tokens" or (data.kind == "fact" and scored == "all"):
        examples = [_all_scored(model, example) for example in examples]
    parts: dict[str, list[Example]] = {item.id: [] for item in data}
    for example in examples:
        parts[example.id if example.id in parts else example.id.rsplit("#", 1)[0]].append(example)
    return [
        Text(id=item.id, owner=item.owner, text=_text(model, item, scored), examples=tuple(parts[item.id]))
        for item in data
    ]


def _as_plain(item: Item) -> Item:
    """A private text as a text of which every token is scored."""
    return PlainText(text=item.text, id=item.id, owner=item.owner) if isinstance(item, PrivateText) else item


def _all_scored(model: ScoringModel, example: Example) -> Example:
    """Every token that can be predicted, up to the last one that is scored already."""
    start = max(_leading(model, example.ids), 1 if model.causal else 0)
    end = max(example.targets) + 1 if example.kind == "fact" else len(example.ids)
    return dataclasses.replace(example, spans=(Span(start=start, end=end, label=example.kind),))


def _leading(model: ScoringModel, ids: Sequence[int]) -> int:
    """How many special tokens stand in front."""
    special = set(model.tokenizer.all_special_ids)
    return next((at for at, token in enumerate(ids) if token not in special), len(ids))


def _text(model: ScoringModel, item: Item, scored: Scored) -> str:
    if isinstance(item, Fact):
        return item.answer if scored == "answer" else item.prompt + item.answer
    return getattr(item, "text", None) or model.tokenizer.decode(list(getattr(item, "ids", ())))


# --- of one forward pass ---------------------------------------------------------------------------------------------


def signals_of(model: ScoringModel, texts: Sequence[Text], *, batch_size: int = 64) -> list[TokenSignals]:
    """The token signals of every text from one forward pass; batching and padding change nothing."""
    found: dict[int, TokenSignals] = {}
    examples = [example for text in texts for example in text.examples]
    with torch.inference_mode():
        for batch in batches(examples, model, batch_size):
            scored = score(model, batch)
            log_p = precise(scored.logits).log_softmax(1)
            own = log_p.gather(1, scored.labels[:, None])[:, 0]
            standard, row = _standard(own, log_p), scored.row.cpu()
            for at, example in enumerate(scored.rows):
                here = row == at
                log_probs = own.double().cpu()[here]
                found[id(example)] = TokenSignals(log_probs=log_probs, standard=standard.double().cpu()[here])
                _refuse_nan(log_probs, example.id)
    return [_joined([found[id(example)] for example in text.examples]) for text in texts]


def _standard(own: Float[Tensor, " n"], log_p: Float[Tensor, "n vocab"]) -> Float[Tensor, " n"]:
    """(l_t - mu_t) / sigma_t; tokens of probability 0 add nothing to either."""
    p = log_p.exp()
    mu = torch.where(p > 0, p * log_p, 0).sum(1)
    variance = torch.where(p > 0, p * (log_p - mu[:, None]) ** 2, 0).sum(1)
    return (own - mu) / variance.clamp(min=FLOOR).sqrt()


def _refuse_nan(log_probs: Tensor, name: str) -> None:
    if not bool(log_probs.isfinite().all()):
        raise LoceditError(f"item {name!r}: the model gives NaN or infinite log-probabilities: are there NaN weights?")


def _joined(parts: Sequence[TokenSignals]) -> TokenSignals:
    return TokenSignals(
        log_probs=torch.cat([part.log_probs for part in parts]), standard=torch.cat([part.standard for part in parts])
    )


def lowest(values: Float[Tensor, " token"], share: float) -> float:
    """Mean of the lowest `share` of the values, of at least one.

    >>> lowest(torch.tensor([-1.0, -5.0, -2.0, -3.0]), 0.5), lowest(torch.tensor([-1.0, -5.0]), 0.2)
    (-4.0, -5.0)
    """
    return float(values.sort().values[: max(1, int(share * len(values)))].mean())


def zlib_bytes(text: str) -> int:
    """Length of the text compressed."""
    return len(zlib.compress(text.encode("utf-8", "surrogatepass")))


SIGNALS: dict[str, Callable[[TokenSignals, Text, float], float]] = {
    "mia_loss": lambda signals, _, __: float(signals.log_probs.mean()),
    "mia_zlib": lambda signals, text, _: float(signals.log_probs.mean()) / zlib_bytes(text.text),
    "min_k": lambda signals, _, share: lowest(signals.log_probs, share),
    "min_k_plus_plus": lambda signals, _, share: lowest(signals.standard, share),
}
"""Metric -> score of a text, from its token signals and the share k."""


# --- of passes of their own ------------------------------------------------------------------------------------------


def gradient_norms(model: Model, texts: Sequence[Text], *, norm: Norm = "global") -> list[float]:
    """Norm of the gradient of each text's mean negative log-likelihood over all parameters of the model.

    `global` is the L2 norm over all parameters together; `tensor_mean` the mean over parameter tensors of the L2 norm
    of each, as OpenUnlearning has it. One backward pass for each text; gradients are not kept.
    """
    parameters = dict(model.core.named_parameters())
    if fixed := next((name for name, p in parameters.items() if not p.is_floating_point()), None):
        raise LoceditError(f"mia_gradient_norm: {fixed} of {model.name} is quantized and has no gradient")
    found: list[float] = []
    for text in texts:
        norms: list[Tensor] = []
        with tracing.weight_gradients(parameters, lambda _, g, norms=norms: norms.append(g.double().norm().cpu())):
            nll = sequence_nll(score(model, collate(text.examples, model)), reduction="sum").sum()
            (nll / text.tokens).backward()
        found.append(_norm(torch.stack(norms), norm))
    return found


def _norm(norms: Float[Tensor, " tensor"], norm: Norm) -> float:
    return float(norms.norm() if norm == "global" else norms.mean())


def after_prefix(model: ScoringModel, text: Text, prefix: Sequence[int]) -> Text:
    """The text with tokens of other texts before it; the same tokens of it are scored. It must fit the context."""
    example = text.examples[0]
    front = _leading(model, example.ids)
    ids = (*example.ids[:front], *prefix, *example.ids[front:])
    if len(text.examples) > 1 or (model.max_length is not None and len(ids) > model.max_length):
        raise LoceditError(
            f"item {text.id!r}: mia_recall: the text after {len(prefix)} tokens of held-out text does not fit the "
            f"context of {model.max_length}: choose a smaller recall_shots"
        )
    moved = [dataclasses.replace(s, start=s.start + len(prefix), end=s.end + len(prefix)) for s in example.spans]
    return dataclasses.replace(
        text, examples=(dataclasses.replace(example, ids=ids, spans=tuple(moved), subject=None),)
    )


def without_specials(model: ScoringModel, text: Text) -> tuple[int, ...]:
    """The tokens of a text without the special tokens in front and behind, as they stand in a prefix."""
    ids = [token for example in text.examples for token in example.ids[_leading(model, example.ids) :]]
    return tuple(ids[: len(ids) - _leading(model, ids[::-1])])
