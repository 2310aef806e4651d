"""The batches of a training: forget, retain and other data of an objective, shared among processes."""

import torch

from locedit.data.encode import Batch, Example, collate
from locedit.edit.objective import Matched, Objective, Shuffled
from locedit.edit.parallel import Processes
from locedit.models import Model


class Streams:
    """All endless batches of an objective, drawn with one generator."""

    def __init__(self, objective: Objective, size: int, generator: torch.Generator, processes: Processes) -> None:
        self.generator = generator
        self.processes = processes
        self.together = objective.together
        self.forget = Shuffled(objective.forget, size, generator, together=objective.together)
        self.retain = Shuffled(objective.retain, size, generator) if objective.retain else None
        self.matched = {name: data for name, data in objective.others.items() if isinstance(data, Matched)}
        self.pools = {
            name: Shuffled(data, size, generator)
            for name, data in objective.others.items()
            if not isinstance(data, Matched)
        }
        self.weight = processes.weight({name: stream.size for name, stream in self._named().items()})
        "share of every batch that this process has"

    def draw(self, model: Model) -> tuple[Batch, Batch | None, dict[str, Batch]]:
        """This process's share of the next forget, retain and other batches, on the model's device."""
        forget = next(self.forget)
        retain = next(self.retain) if self.retain else None
        others = {
            name: (self._matching(data, forget), data.count * self.together) for name, data in self.matched.items()
        }
        others |= {name: (next(pool), 1) for name, pool in self.pools.items()}
        named = {name: self._batch(model, examples, each) for name, (examples, each) in others.items()}
        kept = None if retain is None else self._batch(model, retain, 1)
        return self._batch(model, forget, self.together), kept, named

    def waiting(self) -> dict[str, list[int]]:
        """What has still to come of every stream before it is shuffled again."""
        return {name: list(stream.waiting) for name, stream in self._named().items()}

    def resume(self, waiting: dict[str, list[int]]) -> None:
        """Go on where `waiting` was read."""
        for name, stream in self._named().items():
            stream.waiting = list(waiting[name])

    def _named(self) -> dict[str, Shuffled]:
        retain = {"retain": self.retain} if self.retain else {}
        return {"forget": self.forget} | retain | {f"other {name}": pool for name, pool in self.pools.items()}

    def _matching(self, data: Matched, forget: list[Example]) -> list[Example]:
        found: list[Example] = []
        for example in forget:
            candidates = data.candidates[example]
            order = torch.randperm(len(candidates), generator=self.generator).tolist()
            found += [candidates[i] for i in order[: data.count]]
        return found

    def _batch(self, model: Model, examples: list[Example], each: int) -> Batch:
        return collate(self.processes.share(examples, each=each), model).to(model.device)
