"""What an attack is: its function, the access that it takes, and its card."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from locedit.data.items import Task
from locedit.edit import Edit
from locedit.models import Model
from locedit.results import AttackResult

Access = Literal["prompting", "activations", "weights", "few steps", "fine-tuning"]
ACCESS: dict[Access, str] = {
    "prompting": "other words in the prompt",
    "activations": "reading or changing activations and embeddings",
    "weights": "other weights without any training",
    "few steps": "a few gradient steps on a few items",
    "fine-tuning": "full fine-tuning",
}
"""Levels of access, the least first, and what each is."""


@dataclass(frozen=True, kw_only=True)
class Attack:
    """One attack, as `locedit methods` prints it."""

    function: Callable[..., AttackResult]
    options: type[Any]
    access: Access
    "what whoever attacks must have"
    requires: tuple[str, ...]
    "parts of the task without which it cannot run"
    definition: str
    "one sentence"
    paper: str
    kinds: tuple[str, ...] = ("fact", "private", "tokens")
    "kinds of forget items that it can be read of"
    undoes: Literal["", "token", "layer"] = ""
    "what an edit must have for it: a control token, or added layers (see `Edit.conditional`); empty = nothing"
    diagnostic: bool = False
    "whether it takes what an attacker lacks, such as the unedited weights: shown, but no level of access"
    verify: Callable[[Any, Task], object] | None = None
    "(options, task): raises LoceditError for data that it cannot use with these options, before a model is loaded"
    ready: Callable[[Any, Model, Task, Edit], object] | None = None
    "(options, model, task, edit): raises LoceditError for what cannot be done with this model, before it is measured"
    reference: str = ""
    "an option without which it cannot run, such as retain_model"
