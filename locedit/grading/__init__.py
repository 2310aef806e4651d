"""A ground truth to grade localizers by: facts planted in known places, deletion, and an oracle of edited places.

grades = le.grade("gpt2", seeds=(0, 1, 2), methods="all", out="runs/grade")
print(grades)
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from locedit.errors import LoceditError, nearest
from locedit.grading.options import PARTS, GradeOptions
from locedit.grading.oracle import Outcome
from locedit.grading.records import Record, Row
from locedit.grading.result import Grades
from locedit.grading.running import Seed
from locedit.grading.scoring import names_of
from locedit.lab import Lab, lab
from locedit.options import fill
from locedit.provenance import plain
from locedit.runs import Run


def grade(
    arch: str = "gpt2",
    *,
    seeds: str | Sequence[int] = (0, 1, 2),
    methods: str | Sequence[str] = "all",
    parts: str | Sequence[str] = PARTS,
    size: str = "small",
    out: str | Path | None = None,
    force: bool = False,
    **options: Any,
) -> Grades:
    """Grade localizers on the facts labs of these seeds, which are trained first where they are not in the cache.

    Args:
        methods: names of localizers, or "all" for every one there is.
        parts: planted, deletion, oracle.
        out: the folder where every step is kept: the same call goes on where it was killed, and seeds can be run by
            several processes at once. None = nothing is kept.
        options: fields of GradeOptions.
    """
    chosen = fill(GradeOptions, options, method="grade")
    asked, wanted, numbers = names_of(methods), parts_of(parts), seeds_of(seeds)
    labs = {seed: partial(lab, "facts", arch=arch, size=size, seed=seed) for seed in numbers}
    with ExitStack() as stack:
        folder = Path(out) if out is not None else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        run = Run(folder=folder, force=force)
        return grade_labs(f"{arch} ({size})", labs, run, methods=asked, parts=wanted, options=chosen)


def grade_labs(
    name: str,
    labs: Mapping[int, Callable[[], Lab]],
    run: Run,
    *,
    methods: tuple[str, ...],
    parts: tuple[str, ...],
    options: GradeOptions,
) -> Grades:
    """The grades of localizers on labs that exist or are made when their turn comes."""
    records: list[Record] = []
    outcomes: dict[int, Sequence[Outcome]] = {}
    for seed, make in labs.items():
        made = make()
        grader = Seed(run, made.model, made.task, seed=seed, methods=methods, options=options)
        if "planted" in parts:
            records += grader.planted()
        if "deletion" in parts:
            records += grader.deletion()
        if "oracle" in parts:
            found, outcomes[seed] = grader.oracle()
            records += found
    return Grades(
        lab=name,
        seeds=tuple(labs),
        methods=methods,
        parts=parts,
        records=tuple(records),
        outcomes=outcomes,
        settings=plain(options),
    )


def parts_of(parts: str | Sequence[str]) -> tuple[str, ...]:
    """The parts named, in their order; "a,b" counts as two names."""
    names = [part.strip() for part in (parts.split(",") if isinstance(parts, str) else parts)]
    for name in names:
        if name not in PARTS:
            raise LoceditError(f"parts: unknown part {name!r}; {nearest(name, PARTS)}")
    if not names:
        raise LoceditError(f"parts={parts!r} names no part; {nearest('', PARTS)}")
    return tuple(part for part in PARTS if part in names)


def seeds_of(seeds: str | Sequence[int]) -> tuple[int, ...]:
    """The seeds, each once; "0,1" counts as two."""
    words = seeds.split(",") if isinstance(seeds, str) else seeds
    try:
        numbers = [int(word) for word in words]
    except ValueError:
        raise LoceditError(f"seeds={seeds!r} must be whole numbers, as in 0,1,2") from None
    if not numbers or min(numbers) < 0:
        raise LoceditError(f"seeds={seeds!r} must be whole numbers of at least 0, as in 0,1,2")
    return tuple(dict.fromkeys(numbers))


__all__ = ["GradeOptions", "Grades", "Outcome", "Record", "Row", "grade", "names_of"]
