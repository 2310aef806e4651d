"""How much of a habit is back in what the model writes, once a control token or layers are dropped.

The share compares prompt by prompt: of each prompt whose responses could be judged both before the edit and with the
addition dropped, the rate of bad ones, all these prompts counting alike; of the model that never learned the habit, all
of its own prompts. The rates that are printed beside it are those of `evaluate`, over all judged responses. They are
the same means where every response can be judged.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from locedit.attacks.dropped import WORDS, DropOptions
from locedit.attacks.measures import share_measure
from locedit.attacks.outcome import verdict
from locedit.attacks.recovery import share_back
from locedit.data.items import Task
from locedit.edit import Edit
from locedit.edit.edit import Addition
from locedit.evaluate.intervals import Estimate
from locedit.models import Model
from locedit.provenance import plain
from locedit.results import AttackResult, Curve, Measure, Role, Stage
from locedit.rewards import RewardOptions, settings_of
from locedit.unlearn.helpers import start_of

Samples = dict[str, Measure]
"""Metric of sampled responses -> its measure."""
HABIT, PERPLEXITY = "habit_rate", "sample_perplexity"


class Habit:
    """How often what is sampled is bad, before the edit, with it, and with what it adds dropped."""

    def __init__(self, what: Addition, model: Model, task: Task, edit: Edit, options: DropOptions) -> None:
        self.what: Addition = what
        self.model, self.task, self.options = model, task, options
        self.stages: dict[Stage, Samples] = {
            "before": self._samples(model, None),
            "after": self._samples(model, edit),
            "attacked": self._samples(model, edit.dropped(what)),
        }
        start = None if task.start is None else start_of(model, task, by=f"drop_{what}")
        self.clean = None if start is None else self._samples(start, None)
        "of the model before the habit was learned"

    def _samples(self, model: Model, edit: Edit | None) -> Samples:
        """The measures of the responses."""
        from locedit.evaluate import evaluate

        own = ("samples", "top_p", "draws", "seed", *(f.name for f in dataclasses.fields(RewardOptions)))
        options = {name: getattr(self.options, name) for name in own}
        found = evaluate(model, self.task, edit, metrics=(HABIT, PERPLEXITY), **options).measures
        return {m.name: m for m in found if m.stage == ("before" if edit is None else "after")}

    def _share(self, samples: Samples) -> Estimate:
        before, prompts = self.stages["before"], self._judged(samples)
        never = [] if self.clean is None else list(self.clean[HABIT].per_example)
        return share_back(
            _rates(samples, prompts),
            _rates(before, prompts),
            owners=prompts,
            control=None if self.clean is None else _rates(self.clean, never),
            control_owners=never,
            draws=self.options.draws,
            seed=self.options.seed,
        )

    def _judged(self, samples: Samples) -> list[str]:
        """The prompts with a judged response before the edit and among the samples."""
        return [prompt for prompt in self.stages["before"][HABIT].per_example if prompt in samples[HABIT].per_example]

    def _measure(self, samples: Samples, *, group: str | None = None, note: str = "") -> Measure:
        return share_measure(self._share(samples), len(self._judged(samples)), group=group, note=note)

    def result(self, others: Mapping[str, Edit]) -> AttackResult:
        note = "" if self.clean else "the task has no start: what was never learned counts as 0"
        shares = [
            self._measure(self._samples(self.model, other.dropped(self.what)), group=name)
            for name, other in others.items()
        ]
        return AttackResult(
            name=f"drop_{self.what}",
            sentence=self._sentence(),
            headline=self._measure(self.stages["attacked"], note=note),
            curves=tuple(self._curves()),
            measures=(*self._levels(), *shares),
            settings=plain(self.options) | settings_of(self.options),
            note=note,
        )

    def _sentence(self) -> str:
        rates, odds = ([self.stages[s][n].value for s in ("attacked", "before", "after")] for n in (HABIT, PERPLEXITY))
        text = (
            f"{WORDS[self.what][0]} {verdict(self._share(self.stages['attacked']))}: {rates[0]:.3f} of the responses "
        )
        text += f"are bad ({rates[1]:.3f} before the edit, {rates[2]:.3f} with it"
        if self.clean:
            text += f"; {self.clean[HABIT].value:.3f} of a model that never learned it"
        return f"{text}); their perplexity under the unedited model is {odds[0]:.2f} ({odds[1]:.2f}, {odds[2]:.2f})."

    def _curves(self) -> list[Curve]:
        rates = tuple(self.stages[stage][HABIT].value for stage in ("after", "attacked"))
        made = [self._curve("found", "found", rates)]
        if self.clean:
            made.append(self._curve("never known", "never knew", (self.clean[HABIT].value,) * 2))
        return made

    def _curve(self, name: str, role: Role, rates: tuple[float, ...]) -> Curve:
        return Curve(name=name, role=role, x_name=f"{self.what} dropped", x=(0.0, 1.0), columns={"recovered": rates})

    def _levels(self) -> list[Measure]:
        found = [
            dataclasses.replace(m, stage=stage) for stage, samples in self.stages.items() for m in samples.values()
        ]
        if self.clean:
            found.append(dataclasses.replace(self.clean[HABIT], stage="attacked", group="never knew"))
        return found


def _rates(samples: Samples, prompts: Sequence[str]) -> Float[Tensor, " prompt"]:
    return torch.tensor([samples[HABIT].per_example[prompt] for prompt in prompts], dtype=torch.float64)
