"""The data of a study: what localizers and methods see, and what is measured and attacked."""

import dataclasses
from dataclasses import dataclass
from functools import cached_property

from locedit.attacks.splits import mirrored_halves
from locedit.data.items import Dataset, Task
from locedit.data.tasks import read_task
from locedit.errors import LoceditError
from locedit.provenance import content_hash
from locedit.study.config import Config

SPLIT_SEED = 0
"of the halves of the retain data: one split for the whole study"


@dataclass(frozen=True, kw_only=True)
class StudyData:
    """One task in the three ways in which a study uses it."""

    seen: Task
    "what localizers and methods see"
    measured: Task
    "every forget item, and the retain items that were not seen where they are split"
    attacked: Task
    "`measured`, with the forget and held-out items that attacks use"

    @cached_property
    def hash(self) -> str:
        return content_hash([self.seen.hash, self.measured.hash, self.attacked.hash])


def read_data(config: Config, seed: int) -> StudyData:
    """The data of one seed; raises LoceditError for what cannot be read, chosen or divided."""
    keys = config.keys
    task = read_task(with_seed(keys.data, seed), keys.fields)
    if keys.chat != "off":
        task = task.with_chat(keys.chat)
    try:
        seen, measured = task, task
        if keys.retain == "split":
            first, second = _halves(task)
            seen, measured = dataclasses.replace(task, retain=first), dataclasses.replace(task, retain=second)
        if keys.where:
            seen = dataclasses.replace(seen, forget=task.forget.where(**keys.where))  # type: ignore[arg-type]
        return StudyData(seen=seen, measured=measured, attacked=_attacked(measured, config))
    except LoceditError as error:
        raise LoceditError(f"{config.source}: {error}") from None


def _halves(task: Task) -> tuple[Dataset, Dataset]:
    retain = task.require("retain", by="retain = 'split'")
    halves = mirrored_halves(list(retain), splits=2, seed=SPLIT_SEED, what="retain = 'split'")[0]
    return tuple(retain.replace([retain[at] for at in part]) for part in (halves.relearned, halves.measured))  # type: ignore[return-value]


def _attacked(task: Task, config: Config) -> Task:
    wanted = config.keys.attack_where
    if not wanted:
        return task
    heldout = None if task.heldout is None else task.heldout.where(**wanted)  # type: ignore[arg-type]
    return dataclasses.replace(task, forget=task.forget.where(**wanted), heldout=heldout)  # type: ignore[arg-type]


def with_seed(path: str, seed: int) -> str:
    """A path of the study for one seed."""
    return path.replace("{seed}", str(seed))
