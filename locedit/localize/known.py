"""What the model knows of the items that a localizer reads: scores of what it does not know mean little."""

import math
from dataclasses import replace

from locedit.data.encode import Example, encode
from locedit.data.items import Dataset
from locedit.evaluate.scoring import token_scores
from locedit.models import Model
from locedit.scores import Scores, Table

KINDS = ("fact", "private", "tokens", "patch")
"kinds of items with an answer that can be known; of a patching pair it is the clean prompt's"


def known(model: Model, data: Dataset, *, batch: int = 16) -> Table | None:
    """For each item the probability of its answer, that of its least likely token, and whether every token is the most
    likely one; None for items without an answer.

    The probability of several tokens is their product, each given the ones before it (for a masked model each with
    only itself masked).
    """
    if data.kind not in KINDS:
        return None
    examples = [example for example in encode(model, data) if example.kind != "corrupt"]
    found = token_scores(model, examples, batch_size=batch)
    return {
        "id": [_item(example) for example in examples],
        "probability": [math.exp(-scores.nll) for scores in found],
        "least_token_probability": [math.exp(float(scores.log_probs.min())) for scores in found],
        "known": [bool(scores.hits.all()) for scores in found],
    }


def with_known(scores: Scores, model: Model, data: Dataset, *, batch: int = 16) -> Scores:
    """The scores with what is known in their evidence: "items", or "known" beside a table of that name of their own."""
    own = scores.evidence.get("items", {})
    if "known" in own or (table := known(model, data, batch=batch)) is None:
        return scores
    joined = not own or own.get("id") == table["id"]
    return replace(
        scores, evidence=scores.evidence | {"items" if joined else "known": {**table, **own} if joined else table}
    )


def _item(example: Example) -> str:
    return example.id.removesuffix("/clean") if example.kind == "clean" else example.id


def warning(scores: Scores) -> str | None:
    """A line where the model knows less than half of the items that were scored."""
    tables = (scores.evidence.get(name, {}) for name in ("items", "known"))
    answers = next((table["known"] for table in tables if "known" in table), None)
    if not answers or sum(map(bool, answers)) >= len(answers) / 2:
        return None
    return (
        f"warning: the model gives the answer to only {sum(map(bool, answers))} of {len(answers)} items; "
        "scores of what it does not know mean little"
    )
