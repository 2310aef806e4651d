"""What a lab is made from: every number that decides its world and its model, and the key under which it is cached."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Literal

from locedit.errors import LoceditError, nearest
from locedit.lab.architectures import ARCHITECTURES, Arch

VERSION = 2
"""To be raised whenever the code of this package makes another world or model from the same recipe."""

MASKED_STEPS = 2000
"""Optimizer steps of the small masked model, which learns from the few tokens that are masked."""

Size = Literal["small", "tiny"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A world and a model. The defaults are the size `small`."""

    arch: Arch = "gpt2"
    """Architecture of the model."""
    size: Size = "small"
    """Name of the numbers below."""
    seed: int = 0
    """Decides the names, the answers, the first weights and the order of training."""
    parts: int = 24
    """First names, and as many last names, of the facts world."""
    forget: int = 20
    """People to forget."""
    retain: int = 76
    """Other people the model learns."""
    heldout: int = 20
    """People the model never sees."""
    levels: tuple[int, ...] = (1, 2, 5, 10, 20, 50)
    """How often the secrets of each level stand in the training text."""
    secrets_forget: int = 2
    """Secrets to forget of each kind and level."""
    secrets_retain: int = 4
    """Secrets to keep of each kind and level."""
    canaries: int = 24
    """Never-planted secrets of each kind."""
    professions_forget: int = 2
    """Professions to forget at each strength that leans."""
    professions_retain: int = 2
    """Professions to keep at each strength."""
    professions_heldout: int = 6
    """Professions the model never sees."""
    ordinary: int = 2000
    """Ordinary sentences in the training text."""
    unseen: int = 100
    """Ordinary sentences kept out of it; the file of texts has as many seen ones."""
    vocab_size: int = 704
    """Tokens, special ones and all bytes included."""
    layers: int = 5
    """Layers of the model."""
    d_model: int = 96
    """Width of the residual stream; the MLP has four times as many neurons (Llama: 8/3)."""
    heads: int = 4
    """Attention heads of each layer; Llama shares keys and values between pairs of them."""
    steps: int = 1300
    """Optimizer steps."""
    batch: int = 128
    """Texts in a step."""
    rate: float = 3e-3
    """Highest learning rate."""
    contexts: bool = False
    """Whether half of the texts stand after other texts (see `lab.contexts`)."""

    @property
    def key(self) -> str:
        """Hash of every number above and of the code's version, in 16 hexadecimal digits."""
        numbers = dataclasses.asdict(self)
        if not self.contexts:
            del numbers["contexts"]  # labs from before there were contexts keep their key
        content = json.dumps([VERSION, numbers], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def folder_name(self) -> str:
        """Name of the folder in the cache."""
        contexts = "-contexts" if self.contexts else ""
        return f"lab-{self.arch}-{self.size}{contexts}-{self.seed}-{self.key}"


def recipe_for(arch: str, *, size: str = "small", seed: int = 0, contexts: bool = False) -> Recipe:
    """The recipe of one of the sizes for one of the architectures, without contexts or with them."""
    if arch not in ARCHITECTURES:
        raise LoceditError(f"arch: unknown architecture {arch!r}; {nearest(arch, ARCHITECTURES)}")
    if size not in ("small", "tiny"):
        raise LoceditError(f"size: unknown size {size!r}; {nearest(size, ('small', 'tiny'))}")
    if size == "small":
        return Recipe(arch=arch, seed=seed, contexts=contexts, steps=MASKED_STEPS if arch == "bert" else Recipe.steps)
    return Recipe(
        arch=arch,
        size=size,
        seed=seed,
        contexts=contexts,
        parts=6,
        forget=4,
        retain=8,
        heldout=4,
        levels=(1, 10, 50),
        secrets_forget=1,
        secrets_retain=1,
        canaries=4,
        professions_forget=1,
        professions_retain=1,
        professions_heldout=2,
        ordinary=200,
        unseen=20,
        layers=2,
        d_model=64,
        steps=420,
        batch=64,
    )
