"""What worlds with a small model of their own share: building it, training it, and writing it and the data."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from locedit.lab.architectures import Arch, build
from locedit.lab.facts import Line, Row
from locedit.lab.training import Kind, Progress, Schedule, encode_rows, train
from locedit.loading import quiet
from locedit.storage import write_text

LAYERS, WIDTH, HEADS = 2, 64, 4


def small_model(arch: str, tokenizer: PreTrainedTokenizerFast, *, seed: int) -> PreTrainedModel:
    """An untrained model of two layers of width 64."""
    name = next(known for known in get_args(Arch) if known == arch)
    return build(name, tokenizer, layers=LAYERS, d_model=WIDTH, heads=HEADS, seed=seed)


def learn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Row],
    *,
    steps: int,
    seed: int,
    progress: Progress,
) -> None:
    """Train on the rows, all of one kind."""
    kinds = {"text": Kind(rows=encode_rows(tokenizer, rows), early=1.0, late=1.0)}
    train(model, kinds, schedule=Schedule(steps=steps, batch=64, rate=3e-3, seed=seed), progress=progress)


def whole(texts: Sequence[str]) -> list[Row]:
    """Texts of which every token is learned alike."""
    return [Row(text=text, spans=((0, len(text)),)) for text in texts]


def save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write a model folder with its tokenizer."""
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def write_lines(path: Path, lines: Sequence[Line]) -> None:
    """Write JSON lines."""
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def versions() -> dict[str, str]:
    """What a trained model depends on."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}
