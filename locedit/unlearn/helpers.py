"""Helper models of a recipe: trained one after the other, asked once, gone; what they said is kept on disk by content.

A helper is an Edit of the task's `start` (the model before the data was learned) or of the model itself, so that one
set of weights beside the model serves them all, and only one trains at a time. What is kept are the answers alone: the
distributions at the scored positions, under a name that hashes the model, the data and every setting, in the user's
cache folder. Asked again, with another restriction or after a kill, nothing is trained.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from locedit import losses
from locedit.data.encode import Batch, Example, batches, collate
from locedit.data.items import Task
from locedit.edit.edit import Edit
from locedit.edit.levels import levels
from locedit.edit.objective import Objective
from locedit.edit.options import TrainOptions
from locedit.edit.parallel import Processes
from locedit.edit.train import train
from locedit.errors import LoceditError
from locedit.models import Model, load
from locedit.provenance import content_hash, plain
from locedit.storage import cache_folder, read_tensors, write_tensors
from locedit.unlearn.registry import nll, one_of

log = logging.getLogger(__name__)

VERSION = 2
"To be raised whenever helpers come out differently from the same settings."
PROBED = 3
"Of so many examples, the shortest that are asked, what a model says is part of the name under which answers are kept."
WHOLE = 4096
"Up to this size of the vocabulary whole distributions are kept."
NAMES = frozenset({"_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype"})
"Of a configuration: what decides nothing of what a model of given weights says."
KEPT = 256
"Of larger ones the likeliest tokens, in float16, and the probability of all others together."


@dataclass(frozen=True, kw_only=True)
class HelperOptions:
    """How helper models are trained; the other options of training are the trainer's defaults."""

    helper_steps: int = 200
    "optimizer steps of each helper model"
    helper_learning_rate: float = 1e-3
    "of the helper models"
    helper_batch_size: int = 16
    "examples in a step of a helper model"
    helper_hold: Literal["weights", "adapter"] = "weights"
    "what a helper trains: every weight, or LoRA factors of the default rank"

    def __post_init__(self) -> None:
        one_of(self, "helper_hold", ("weights", "adapter"))
        self.helper_training(seed=0)

    def helper_training(self, *, seed: int) -> TrainOptions:
        """The trainer's options; LoceditError for a value that it does not take."""
        try:
            return TrainOptions(
                steps=self.helper_steps,
                learning_rate=self.helper_learning_rate,
                batch_size=self.helper_batch_size,
                eval_every=0,
                seed=seed,
            )
        except LoceditError as error:
            raise LoceditError(f"helper_{error}") from None


def require_start(task: Task, *, by: str) -> str:
    """The model before the data was learned, or an error that says how to give it; needs no model."""
    if task.start is None:
        raise LoceditError(
            f"{by} needs 'start', the model before the data was learned, which the task {task.name!r} does not have: "
            "put it into its folder as a folder named start, or a file named start that holds its path or hub id"
        )
    return task.start


def start_of(model: Model, task: Task, *, by: str) -> Model:
    """The task's start, loaded as the model was.

    Raises LoceditError when there is none, when it is the model itself, or has another vocabulary.
    """
    try:
        start = load(require_start(task, by=by), dtype=model.dtype, device=model.device)
    except LoceditError as error:
        raise LoceditError(f"{by}: start, the model before the data, of the task {task.name!r}: {error}") from error
    if start.fingerprint == model.fingerprint:
        raise LoceditError(f"{by}: start={task.start!r} is the model itself; it has to be the one before the data")
    if start.causal != model.causal or start.vocab_size != model.vocab_size:
        raise LoceditError(
            f"{by}: start={task.start!r} has a vocabulary of {start.vocab_size}, {model.name} one of "
            f"{model.vocab_size}: both must speak of the same tokens"
        )
    if model.tokenizer is not None and start.tokenizer is not None:
        if start.tokenizer.get_vocab() != model.tokenizer.get_vocab():
            raise LoceditError(f"{by}: the tokenizer of start={task.start!r} is not that of {model.name}")
    elif start.tokenizer is None:
        start.tokenizer = model.tokenizer
    return start


def taught(base: Model, examples: Sequence[Example], *, options: HelperOptions, seed: int, name: str) -> Edit:
    """The helper that `base` becomes by learning the examples' scored tokens; `base` itself is unchanged."""
    objective = Objective(loss=nll, forget=examples, name=name)
    return train(base, objective, options=options.helper_training(seed=seed), hold=options.helper_hold)


class Answers:
    """What a model says at the scored positions of some examples, as log-probabilities over the vocabulary.

    Only the likeliest tokens may be kept. The others then share what is left of the probability in the proportions in
    which the model that is compared has them, so that a KL counts them as one event and teaches nothing about their
    proportions. Equal shares would not do: a tail of a fifth of the probability, spread evenly over 50,000 tokens, adds
    most of a nat to a KL.
    """

    def __init__(self, examples: Sequence[Example], tensors: Mapping[str, Tensor], *, vocab: int) -> None:
        self.log_probs = tensors["log_probs"]
        "`[n, kept]`, the examples' targets one after the other"
        self.tokens = tensors.get("tokens")
        "`[n, kept]` of the vocabulary; None = all of it"
        self.vocab = vocab
        ends = torch.tensor([0, *(len(example.targets) for example in examples)]).cumsum(0).tolist()
        self._where = dict(zip(examples, zip(ends, ends[1:], strict=False), strict=True))
        self.hash = content_hash(
            [[e.id, e.ids, e.targets] for e in examples] + [_digest(each) for each in self._tensors()]
        )

    def _tensors(self) -> list[Tensor]:
        return [self.log_probs] if self.tokens is None else [self.log_probs, self.tokens]

    def __str__(self) -> str:
        return f"answers {self.hash}"

    def of(self, batch: Batch, logits: Float[Tensor, "n vocab"] | None = None) -> Float[Tensor, "n vocab"]:
        """Log-probabilities at the scored tokens of a batch, in their order, float32, on the batch's device.

        `logits` are those of the compared model; no gradient flows through them. Needed where not all tokens are kept.
        """
        places = [range(*self._where[example]) for example in batch.examples]
        rows = torch.tensor([row for place in places for row in place], dtype=torch.long)
        kept = self.log_probs[rows].to(batch.ids.device).float()
        if self.tokens is None:
            return kept
        assert logits is not None, "the proportions of the tokens that are not kept"
        tokens = self.tokens[rows].to(kept.device).long()
        others = logits.detach().to(kept).scatter(1, tokens, -torch.inf).log_softmax(1)
        left = torch.log1p(-kept.exp().sum(1, keepdim=True).clamp(max=1 - 1e-6))
        return (others + left).scatter(1, tokens, kept)


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


@torch.no_grad()
def answers_of(model: Model, examples: Sequence[Example], *, batch_size: int = 32) -> Answers:
    """The answers of a model as it is now, kept in memory."""
    return Answers(examples, _asked(model, examples, batch_size=batch_size), vocab=model.vocab_size)


@dataclass(frozen=True, kw_only=True, eq=False)
class Helper:
    """What is left of a helper model."""

    answers: Answers
    known: float
    "mean probability of a scored token (geometric within an example), on what it learned"


def helper(
    base: Model,
    learned: Sequence[Example],
    asked: Sequence[Example],
    *,
    options: HelperOptions,
    seed: int,
    name: str,
) -> Helper:
    """Train a helper on `learned`, ask it `asked`, keep the answers and let it go; or read what is kept.

    Args:
        base: the model that it starts from, which is unchanged.
        options: those of its training decide what is kept where.
        name: for progress and messages.
    """

    def make() -> dict[str, Tensor]:
        log.info("%s: trained on %d examples", name, len(learned))
        edit = taught(base, learned, options=options, seed=seed, name=name)
        with edit.applied(base) as edited:
            known = levels(edited, {"learned": learned}, level="token_probability")["learned"]
            return _asked(edited, asked) | {"known": torch.tensor(known)}

    training = plain(options.helper_training(seed=seed)) | {"hold": options.helper_hold}
    key = {"helper": VERSION, **placed(base, asked), "learned": fingerprint(learned), "asked": fingerprint(asked)}
    tensors = kept(key | training, make)
    return Helper(
        answers=Answers(asked, tensors, vocab=base.vocab_size),
        known=float(tensors["known"]),
    )


def placed(model: Model, asked: Sequence[Example]) -> dict[str, str]:
    """What of a model and its place decides a result, for a key.

    The weights alone do not: an edit that works beside them, and the mask token, show in what the model says.
    """
    return {
        "model": model.fingerprint,
        "settings": content_hash(settings_of(model)),
        "says": _digest(_said(model, sorted(asked, key=lambda example: len(example.ids))[:PROBED])),
        "on": f"{model.device} {model.dtype}",
        "torch": torch.__version__,
    }


def settings_of(model: Model) -> dict[str, Any]:
    """The model's configuration without names, versions and the dtype."""
    return {name: value for name, value in model.core.config.to_dict().items() if name not in NAMES}


@torch.no_grad()
def _said(model: Model, examples: Sequence[Example]) -> Float[Tensor, "n vocab"]:
    """The logits at the scored tokens."""
    return losses.score(model, collate(examples, model).to(model.device)).logits.cpu()


def fingerprint(examples: Sequence[Example]) -> str:
    """A hash of tokens and scored positions, in order."""
    return content_hash([[example.ids, example.targets] for example in examples])


def kept(key: Mapping[str, Any], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors from the user's cache folder, made where they are not there, and written where that is possible."""
    own = cache_folder() / "helpers" / f"{content_hash(dict(key))}.safetensors"
    path, there = Processes.now().from_main(lambda: (own, own.exists()))
    if there:  # all processes read, or all make
        log.info("helpers: %s is there already", path.name)
        return read_tensors(path)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in make().items()}
    try:
        write_tensors(path, tensors)
    except LoceditError as error:  # what took long to make is not lost to a full disk
        log.warning("helpers: the answers are not kept for another time: %s", error)
    return tensors


@torch.no_grad()
def _asked(model: Model, examples: Sequence[Example], *, batch_size: int = 32) -> dict[str, Tensor]:
    """`log_probs` and, for a large vocabulary, `tokens`, of all examples in their order."""
    found: dict[Example, tuple[Tensor, Tensor | None]] = {}
    for batch in batches(examples, model, batch_size):
        scored = losses.score(model, batch.to(model.device))
        log_probs, tokens = _kept(losses.precise(scored.logits).log_softmax(1))
        for number, example in enumerate(scored.rows):
            mine = scored.row == number
            found[example] = log_probs[mine].cpu(), None if tokens is None else tokens[mine].cpu()
    parts = [found[example] for example in examples]
    made = {"log_probs": torch.cat([log_probs for log_probs, _ in parts])}
    tokens = [tokens for _, tokens in parts if tokens is not None]
    return made | ({"tokens": torch.cat(tokens)} if tokens else {})


def _kept(log_probs: Tensor) -> tuple[Tensor, Tensor | None]:
    if log_probs.shape[1] <= WHOLE:
        return log_probs.float(), None
    best = log_probs.topk(KEPT, dim=1)
    return best.values.half(), best.indices.int()
