"""Making a lab: the world, its tokenizer, the training, the report; kept in the user's cache, whole or not at all."""

import dataclasses
import shutil
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from locedit.errors import LoceditError, nearest
from locedit.lab.architectures import POSITIONS, build
from locedit.lab.contexts import in_contexts
from locedit.lab.facts import Row
from locedit.lab.lookup import lookup
from locedit.lab.measure import world_report
from locedit.lab.recipe import Recipe, recipe_for
from locedit.lab.separate import SEPARATE, check_separate, make_separate, separate_folder
from locedit.lab.small import save, versions, write_lines
from locedit.lab.tokenizer import mask_id, train_tokenizer
from locedit.lab.training import Kind, Progress, Schedule, cut_short, encode_rows, train
from locedit.lab.world import WORLDS, World, answer_words, make_world, start_rows, tokenizer_texts
from locedit.progress import report as count
from locedit.storage import atomic_folder, cache_folder, read_json, refuse_overwrite, write_json, write_text

if TYPE_CHECKING:
    from locedit.data import Task
    from locedit.models import Model

SHARES = {"sentence": (0.65, 0.3), "multiple_choice": (0.15, 0.65), "prose": (0.2, 0.15), "pronoun": (0.25, 0.3)}
"""Kind of text -> its share of the batches in the first and the second half: the choice is learned after the facts."""
BEFORE = ("sentence", "prose")
"""Kinds of text that stand before others."""
CUT_SHORT = ("sentence", "multiple_choice", "pronoun")
"""Kinds of text of which a masked model learns both the whole and the part up to what is to be learned."""


@dataclass(frozen=True, kw_only=True)
class Lab:
    """A small world with the model trained on it, as ordinary files."""

    name: str
    """The world. The model has learned facts, private and bias together; groups and others have their own."""
    folder: Path
    """Holds model/, facts/, private/, bias/ and lab.json; of a world with its own model model/, start/ and its data."""

    @property
    def task_folder(self) -> Path:
        """The data files of this world: forget, retain, heldout and texts."""
        return self.folder / self.name

    @cached_property
    def model(self) -> "Model":
        """The trained model, loaded when first asked for."""
        from locedit.models import load

        return load(str(self.folder / "model"))

    @cached_property
    def task(self) -> "Task":
        """The task of this world, read when first asked for."""
        from locedit.data import read_task

        return read_task(self.task_folder)

    @cached_property
    def report(self) -> dict[str, Any]:
        """What lab.json says: the recipe, what the model knows of each group, and where it looks facts up."""
        return read_json(self.folder / "lab.json")


def lab(
    world: str = "facts",
    *,
    arch: str = "gpt2",
    size: str = "small",
    seed: int = 0,
    cache: str | Path | None = None,
    start: bool = False,
    contexts: bool = False,
    progress: Progress | None = None,
) -> Lab:
    """A small world and a model trained on it, made at the first call (minutes; size="tiny": seconds) and then cached.

    Args:
        world: "facts", "private" or "bias"; says which task comes with the lab, the model is the same. Or one of
            SEPARATE ("groups"), which has a model of its own and one size.
        arch: "gpt2", "llama", "neox" or "bert" (a masked model).
        cache: the folder to keep labs in; by default the user's cache folder for locedit.
        start: also train the model before the data, which knows how people and records are spoken of and nobody of
            this world; it becomes the `start` of the tasks facts and private. The worlds of SEPARATE always have it.
        contexts: half of the training texts stand after one or two other texts. Without it the model reads single
            sentences only, and any sentence before a question breaks it: then no prompting attack shows anything. The
            multiple choice is learned less surely with it, not by every small lab; lab.json says what is known.
        progress: called with ("training the lab model", steps done, all steps).
    """
    check_world(world)
    place = Path(cache) if cache is not None else cache_folder()
    if world in SEPARATE:
        check_separate(world, arch=arch, size=size, contexts=contexts)
        folder = place / separate_folder(world, arch=arch, seed=seed)
        if not (folder / "lab.json").is_file():
            make_separate(world, folder, arch=arch, seed=seed, progress=progress or count)
        return Lab(name=world, folder=folder)
    recipe = recipe_for(arch, size=size, seed=seed, contexts=contexts)
    folder = place / recipe.folder_name
    if not (folder / "lab.json").is_file():
        _make(recipe, folder, progress or count)
    if start and not (folder / "start").is_dir():
        _add_start(recipe, folder, progress or count)
    return Lab(name=world, folder=folder)


def check_world(world: str) -> None:
    """Raise LoceditError for a world that is neither one of WORLDS nor one of SEPARATE."""
    if world not in (known := (*WORLDS, *SEPARATE)):
        raise LoceditError(f"world: unknown world {world!r}; {nearest(world, known)}")


def write_lab(
    folder: str | Path, *, world: str = "facts", force: bool = False, cache: str | Path | None = None, **options: Any
) -> Lab:
    """Put a lab into `folder`: a copy from the cache, made first if need be. `options` are those of `lab`."""
    refuse_overwrite(folder, force=force)
    made = lab(world, cache=cache, **options)
    left_out = () if world in SEPARATE or options.get("start") else ("start",)
    with atomic_folder(folder, force=force) as temporary:
        shutil.copytree(made.folder, temporary, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*left_out))
    return Lab(name=world, folder=Path(folder))


def _make(recipe: Recipe, folder: Path, progress: Progress) -> None:
    """Train and write; an unwritable folder is found before, and an interrupted training leaves nothing behind."""
    with atomic_folder(folder, force=True) as temporary:
        world = make_world(recipe)
        tokenizer = train_tokenizer(
            tokenizer_texts(recipe),
            words=answer_words(),
            vocab_size=recipe.vocab_size,
            max_length=POSITIONS,
            masked=recipe.arch == "bert",
        )
        started = time.perf_counter()
        model = _trained(recipe, world.training_rows(), tokenizer, progress)
        seconds = {"training_seconds": round(time.perf_counter() - started, 1)}
        _write(temporary, world, model, tokenizer)
        write_json(temporary / "lab.json", _report(recipe, model, tokenizer, world) | seconds)


def _add_start(recipe: Recipe, folder: Path, progress: Progress) -> None:
    """Train the model before the data; the tasks that need it name it in a file of their own."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    model = _trained(recipe, start_rows(recipe), tokenizer, progress)
    with atomic_folder(folder / "start", force=True) as temporary:
        save(temporary, model, tokenizer)
    for world in ("facts", "private"):
        write_text(folder / world / "start", "../start\n")


def _trained(
    recipe: Recipe, texts: dict[str, list[Row]], tokenizer: PreTrainedTokenizerFast, progress: Progress
) -> PreTrainedModel:
    model = build(
        recipe.arch, tokenizer, layers=recipe.layers, d_model=recipe.d_model, heads=recipe.heads, seed=recipe.seed
    )
    if recipe.contexts:
        rng, before = Random(f"contexts {recipe.seed}"), [row.text for name in BEFORE for row in texts[name]]
        texts = {name: in_contexts(rows, before, rng=rng) for name, rows in texts.items()}
    if mask_id(tokenizer) is not None:
        texts = texts | {name: [*texts[name], *cut_short(texts[name])] for name in CUT_SHORT if name in texts}
    encoded = {name: encode_rows(tokenizer, rows) for name, rows in texts.items()}
    fitting = {name: tuple(row for row in rows if len(row.ids) <= POSITIONS) for name, rows in encoded.items()}
    kinds = {name: Kind(rows=rows, early=SHARES[name][0], late=SHARES[name][1]) for name, rows in fitting.items()}
    schedule = Schedule(
        steps=recipe.steps, batch=recipe.batch, rate=recipe.rate, seed=recipe.seed, parts=4 if recipe.contexts else 1
    )
    train(model, kinds, schedule=schedule, mask_with=mask_id(tokenizer), progress=progress)
    return model


def _report(recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, world: World) -> dict[str, Any]:
    return {
        "recipe": dataclasses.asdict(recipe),
        "key": recipe.key,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **world_report(model, tokenizer, world),
        "lookup": lookup(model, tokenizer, world),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def _write(folder: Path, world: World, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    save(folder / "model", model, tokenizer)
    for name, lines in world.files().items():
        write_lines(folder / f"{name}.jsonl", lines)
