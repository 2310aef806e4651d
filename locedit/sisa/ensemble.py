"""The members of a training record as one predictor, with the two calls of a model.

A member is the start with its shard's edit applied; members are swapped in one after the other, so one model is in
memory. Votes are counted by `majority`, probabilities averaged by `mean_probability`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from locedit import progress
from locedit.classification import Verbaliser, classify
from locedit.edit.edit import Edit
from locedit.errors import LoceditError
from locedit.generation import end_tokens
from locedit.models import Model, TokenBatch
from locedit.provenance import content_hash
from locedit.sisa.record import Record
from locedit.sisa.training import checkpoint_folder, require_start


@dataclass(frozen=True, kw_only=True, eq=False)
class Ensemble:
    """Several edits of one model whose token probabilities are averaged.

    It can stand where losses, levels, classification and metrics take a model. It is no Edit, so attacks on weights do
    not apply; attack its members.
    """

    start: Model
    members: tuple[Edit, ...]
    sizes: tuple[int, ...]
    "items that each member was trained on"
    weighted: bool = False
    "whether members count by their sizes, or all alike"

    def __post_init__(self) -> None:
        if not self.members or len(self.members) != len(self.sizes):
            raise LoceditError(f"an ensemble of {len(self.members)} members with {len(self.sizes)} sizes")

    @classmethod
    def load(cls, folder: str | Path, model: Model, *, weighted: bool = False) -> "Ensemble":
        """The members of a training record; shards with nothing left have none. `model` is the start."""
        folder, record = Path(folder), Record.load(folder)
        record.require_finished(folder)
        require_start(record, model)
        last = record.options.slices - 1
        sizes = {shard: len(record.trained_on(shard, last)) for shard in range(len(record.shards))}
        paths = {shard: checkpoint_folder(folder, record, shard, last) for shard, size in sizes.items() if size}
        for shard, path in paths.items():
            if not path.exists():
                raise LoceditError(
                    f"{folder}: shard {shard} is not trained to its end; give `locedit sisa train` again"
                )
        members = tuple(Edit.load(path) for path in paths.values())
        return cls(start=model, members=members, sizes=tuple(sizes[shard] for shard in paths), weighted=weighted)

    def __len__(self) -> int:
        return len(self.members)

    @property
    def weights(self) -> Float[Tensor, " members"]:
        """Of each member, float64, sum 1."""
        sizes = torch.tensor(self.sizes if self.weighted else [1] * len(self.sizes), dtype=torch.float64)
        return sizes / sizes.sum()

    # --- as a model --------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        return self.start.tokenizer

    @property
    def causal(self) -> bool:
        return self.start.causal

    @property
    def max_length(self) -> int | None:
        return self.start.max_length

    @property
    def vocab_size(self) -> int:
        return self.start.vocab_size

    @property
    def device(self) -> torch.device:
        return self.start.device

    @property
    def dtype(self) -> torch.dtype:
        return self.start.dtype

    @property
    def name(self) -> str:
        return f"{len(self)} members of {self.start.name}"

    @property
    def fingerprint(self) -> str:
        """Of the start and all members."""
        return content_hash([self.start.fingerprint, [edit.digest for edit in self.members], self.weights.tolist()])

    @torch.no_grad()
    def logits(self, batch: TokenBatch, *, at: Tensor | None = None) -> Tensor:
        """Log of the members' weighted mean probability, so that a softmax gives the mean back; float32 at least."""
        total: Tensor | None = None
        for edit, weight in zip(self.members, self.weights.log().tolist(), strict=True):
            with edit.applied(self.start) as member:
                own = member.logits(batch, at=at)
                own = own.to(torch.promote_types(own.dtype, torch.float32)).log_softmax(-1) + weight
            total = own if total is None else torch.logaddexp(total, own)
        assert total is not None
        return total

    def generate(self, batch: TokenBatch, *, max_new_tokens: int) -> list[tuple[int, ...]]:
        """Greedy continuations under the mean probability, without the end token; each row as if it were alone."""
        rows = [ids[: int(mask.sum())].tolist() for ids, mask in zip(batch.ids, batch.attention_mask, strict=True)]
        if not self.causal or any(not row for row in rows):
            raise LoceditError("generation needs a causal model and prompts with at least one token")
        starts, ends = [len(row) for row in rows], end_tokens(cast(Model, self))
        running = list(range(len(rows)))
        for _ in range(max_new_tokens):
            if not running:
                break
            tokens = _Tokens.of([rows[at] for at in running])
            following = self.logits(tokens, at=tokens.last()).argmax(-1).tolist()
            said = {at: token for at, token in zip(running, following, strict=True) if token not in ends}
            for at, token in said.items():
                rows[at].append(token)
            running = list(said)
        return [tuple(row[start:]) for row, start in zip(rows, starts, strict=True)]

    # --- as a classifier ---------------------------------------------------------------------------------------------

    def outputs(
        self, texts: Sequence[str], verbaliser: Verbaliser, *, batch_size: int = 32, chat: str = "off"
    ) -> Float[Tensor, "texts members classes"]:
        """Every member's probabilities of the classes; columns as in `classify`."""
        found: list[Tensor] = []
        for edit in progress.track(self.members, "members"):
            with edit.applied(self.start) as member:
                found.append(classify(member, texts, verbaliser, batch_size=batch_size, chat=chat))
        return torch.stack(found, dim=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Tokens:
    """Token ids padded on the right."""

    ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> "_Tokens":
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        return cls(ids=ids, attention_mask=mask)

    def last(self) -> Tensor:
        """Where each row ends, True at one position of each."""
        places = torch.arange(self.ids.shape[1])[None]
        return places == self.attention_mask.sum(1, keepdim=True) - 1


def votes(outputs: Float[Tensor, "texts members classes"]) -> Int[Tensor, "texts members"]:
    """The likeliest class of every member; of equally likely ones the first."""
    return _first(outputs == outputs.amax(-1, keepdim=True))


def majority(
    cast_votes: Int[Tensor, "texts members"], *, classes: int, sizes: Sequence[int] | None = None
) -> Int[Tensor, " texts"]:
    """The class with most votes, counted once each or by `sizes`. A tie goes to the class that comes first."""
    weight = torch.tensor([1] * cast_votes.shape[1] if sizes is None else list(sizes))
    counts = torch.stack([((cast_votes == number) * weight).sum(1) for number in range(classes)], dim=1)
    return _first(counts == counts.amax(1, keepdim=True))


def mean_probability(
    outputs: Float[Tensor, "texts members classes"], *, sizes: Sequence[int] | None = None
) -> Float[Tensor, "texts classes"]:
    """The members' probabilities, averaged alike or by `sizes`; float64."""
    weight = torch.tensor([1] * outputs.shape[1] if sizes is None else list(sizes), dtype=torch.float64)
    return (outputs.double() * (weight / weight.sum())[None, :, None]).sum(1)


def _first(hits: Tensor) -> Int[Tensor, " ..."]:
    """Number of the first hit on the last axis."""
    numbers = torch.arange(hits.shape[-1]).expand(hits.shape)
    return numbers.masked_fill(~hits, hits.shape[-1]).amin(-1)
