"""A soft prompt: embeddings learned from some forget items, that stand before every text and bring back the others.

A few rows stand before the text, each with a position of its own, the same for all items (prompt tuning, Lester et al.
2021, arXiv:2104.08691). They are learned in the edited model, whose parameters stay frozen, from the true answers of
the half that is not measured, and from retain items, so that they do not merely break the model. What they bring back
of the other half was never shown. Of several restarts the one with the lowest loss on what it learned from counts.

The "soft prompt" of Guo et al. 2024 (arXiv:2410.12949) is another thing: attention over 15 learned keys and values,
added to the embedding of every token, without retain items. Schwinn et al. 2024 (arXiv:2402.09063) attack unlearned
models with embeddings after the prompt, found for each item or for all, and count an answer in any of the attempts.

The rows stand before everything, special tokens included, and before an edit's own control token. Masked models have no
first position that the others are predicted from, and are refused.
"""

from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from locedit.attacks.aim import Aim, ItemOptions, Side, Target
from locedit.attacks.arms import Control, Dose, Values
from locedit.attacks.conditional import conditional
from locedit.attacks.finetuning import Diet, fine_tune
from locedit.attacks.inserted import check_fits, drawn_tokens, inserted, ordinary_tokens
from locedit.attacks.item_attack import ItemAttack
from locedit.attacks.measures import values_of
from locedit.attacks.outcome import Others, carried_out
from locedit.attacks.shared import Shared
from locedit.data.items import Task
from locedit.edit import Edit
from locedit.edit.restrict import frozen
from locedit.edit.tokens import conditioned
from locedit.errors import LoceditError
from locedit.losses import nll_of_examples
from locedit.models import Model
from locedit.options import fill
from locedit.results import AttackResult

CONTEXTS = 8
"random prefixes a forget item in which the positive control keeps the answer"


@dataclass(frozen=True, kw_only=True)
class SoftPromptOptions(ItemOptions):
    """How long the soft prompt is, and how it is learned."""

    length: int = 4
    "embeddings that are learned"
    steps: int = 60
    "optimizer steps"
    look_every: int = 20
    "steps between two looks at the other half; every look is a dose"
    learning_rate: float = 0.1
    "of Adam, times the root mean square of the model's input embeddings, so that one value suits any model"
    restarts: int = 2
    "soft prompts that are learned, each from the embeddings of other random tokens"
    retain_weight: float = 1.0
    "weight of the retain items in the loss; 0 = they are not learned from"
    batch_size: int = 16
    "forget items, and as many retain items, in a step"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("length", "steps", "look_every", "restarts", "batch_size"):
            if getattr(self, name) < 1:
                raise LoceditError(f"soft_prompt: {name}={getattr(self, name)!r} must be at least 1")
        if self.learning_rate <= 0:
            raise LoceditError(f"soft_prompt: learning_rate={self.learning_rate!r} must be above 0")
        if self.retain_weight < 0:
            raise LoceditError(f"soft_prompt: retain_weight={self.retain_weight!r} must not be negative")

    @property
    def looks(self) -> tuple[int, ...]:
        """The steps after which the other half is measured."""
        return tuple(sorted({*range(self.look_every, self.steps, self.look_every), self.steps}))


def soft_prompt(
    model: Model, task: Task, edit: Edit, *, others: Others = None, shared: Shared | None = None, **options: Any
) -> AttackResult:
    """Learn embeddings that stand before every text, from half of the forget items."""
    attack = SoftPrompt(fill(SoftPromptOptions, options, method="soft_prompt"))
    return carried_out(attack, model, task, edit, others=others, shared=shared)


class SoftPrompt(ItemAttack[SoftPromptOptions]):
    """The metric of every item after the soft prompt, at every look."""

    name: ClassVar[str] = "soft_prompt"
    lead: ClassVar[str] = "After a soft prompt learned from other forget items"
    x_name: ClassVar[str] = "steps"
    learns: ClassVar[bool] = True
    causal: ClassVar[bool] = True

    def ready(self, aim: Aim) -> None:
        sides = [side.examples for side in (aim.forget, aim.heldout, aim.known, aim.kept) if side is not None]
        check_fits(aim.model, sides, self.options.length, by=self.name, option="length")

    def doses(self, aim: Aim) -> tuple[Dose, ...]:  # noqa: ARG002
        return tuple(Dose(x=step) for step in self.options.looks)

    def attack(self, target: Target, learned: Side, measured: Mapping[str, Side], aim: Aim) -> Values:
        found: dict[str, list[Tensor]] = {name: [] for name in measured}
        for rows in self.learned(target.model, learned, aim):
            with prefixed(target.model, rows):
                for name, side in measured.items():
                    found[name].append(values_of(target.model, side.examples, aim.metric))
        return {name: torch.stack(values) for name, values in found.items()}

    def control(self, aim: Aim, *, level: float) -> Control:
        """An edit that acts only without other tokens before the text."""
        ordinary, length = ordinary_tokens(aim.model, aim.shared), self.options.length
        generator = torch.Generator().manual_seed(self.options.seed)
        opened = {
            example: [
                inserted(example, drawn_tokens(ordinary, length, generator=generator), at=0) for _ in range(CONTEXTS)
            ]
            for example in aim.forget.examples
        }
        where = f"{length} random tokens before the text"
        return conditional(aim, self.options, opened, level=level, where=where)

    def learned(self, model: Model, side: Side, aim: Aim) -> list[Float[Tensor, "length d_model"]]:
        """The rows at every look, of the restart with the lowest loss there on what was learned from."""
        courses = [self._course(model, side, aim, restart) for restart in range(self.options.restarts)]
        if len(courses) == 1:
            return courses[0]
        losses = torch.tensor([[self._loss(model, rows, side, aim) for rows in course] for course in courses])
        return [courses[best][look] for look, best in enumerate(losses.argmin(0).tolist())]

    def _course(self, model: Model, side: Side, aim: Aim, restart: int) -> list[Tensor]:
        """The rows at every look of one restart."""
        options = self.options
        seed = 1000 * options.seed + restart
        rows = nn.Parameter(start_rows(model, ordinary_tokens(aim.model, aim.shared), options.length, seed=seed))
        diet = Diet(
            relearned=side.examples,
            retain=aim.known.examples if options.retain_weight > 0 else (),
            batch_size=options.batch_size,
            retain_weight=options.retain_weight,
            seed=seed,
        )
        seen: list[Tensor] = []

        def look(step: int) -> None:
            if step in options.looks:
                seen.append(rows.detach().clone())

        rate = options.learning_rate * embedding_size(model)
        with frozen(model.module), prefixed(model, rows):
            fine_tune(model, [rows], diet, learning_rate=rate, steps=options.steps, after_step=look, by=self.name)
        return seen

    def _loss(self, model: Model, rows: Tensor, side: Side, aim: Aim) -> float:
        """Of all items learned from, and of at most so many retain items as are measured elsewhere."""
        kept = aim.known.examples[: self.options.retain_measured] if self.options.retain_weight > 0 else ()
        with prefixed(model, rows):
            loss = float(nll_of_examples(model, side.examples).double().mean())
            return loss + (self.options.retain_weight * float(nll_of_examples(model, kept).mean()) if kept else 0.0)


@contextmanager
def prefixed(model: Model, rows: Float[Tensor, "length d_model"]) -> Generator[None]:
    """The rows before every text inside the block, the first one first; gradients reach them."""
    with ExitStack() as stack:
        for place in reversed(range(len(rows))):  # what is put there last stands first
            stack.enter_context(conditioned(model, rows, place))
        yield


@torch.no_grad()
def start_rows(model: Model, ordinary: Tensor, length: int, *, seed: int) -> Float[Tensor, "length d_model"]:
    """Input embeddings of random ordinary tokens, float32, on the model's device."""
    tokens = drawn_tokens(ordinary, length, generator=torch.Generator().manual_seed(seed))
    embedding: Any = model.core.get_input_embeddings()
    return embedding.weight[tokens].detach().to(torch.promote_types(embedding.weight.dtype, torch.float32)).clone()


@torch.no_grad()
def embedding_size(model: Model) -> float:
    """Root mean square of the entries of the input embeddings."""
    embedding: Any = model.core.get_input_embeddings()
    return float(embedding.weight.float().square().mean().sqrt())
