"""Where a lab model looks its facts up: one MLP at a time gives its mean, at the subject or at the last position."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from locedit.data import Fact, encode
from locedit.data.encode import Example, collate
from locedit.lab.facts import RELATIONS
from locedit.lab.world import World
from locedit.models import Model, load
from locedit.tracing import replace


def lookup(module: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, world: World) -> dict[str, Any]:
    """Accuracy of the statements about the people of `forget` and `retain` with one MLP's output replaced by its mean.

    `subject`: replaced at every token of the name; `last`: at the position that predicts the answer. One number for
    each layer, lowest first; the mean is over the same positions of all these statements. `whole`: nothing replaced.
    A low number at `subject` says that the layer looks the fact up from the name (as in Guo et al. 2024,
    arXiv:2410.12949); a low number at `last` says that it is needed once the name is known.
    """
    model = load(module, tokenizer=tokenizer)
    examples = encode(model, _statements(world))
    batch = collate(examples, model)
    last = batch.predicting(model.causal)
    places = {"subject": _subject(examples, last), "last": last}

    def accuracy() -> float:
        with torch.inference_mode():
            predicted = model.logits(batch)[last].argmax(-1)
        return round((predicted == batch.labels[batch.labels != -100]).double().mean().item(), 4)

    result: dict[str, Any] = {"whole": accuracy()}
    for name, place in places.items():
        result[name] = [_without(model, layer, place, accuracy) for layer in range(model.n_layers)]
    return result


def _statements(world: World) -> list[Fact]:
    people = (*world.facts.forget, *world.facts.retain)
    return [
        Fact(
            prompt=relation.prompt("statement", person.name),
            answer=f" {person.answers[relation.name]}",
            id=f"{person.name}/{relation.name}",
            subject=person.name,
        )
        for person in people
        for relation in RELATIONS
    ]


def _subject(examples: list[Example], like: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    place = torch.zeros_like(like)
    for row, example in enumerate(examples):
        assert example.subject is not None, f"{example.id} has no subject"
        place[row, example.subject.start : example.subject.end] = True
    return place


def _without(model: Model, layer: int, place: Bool[Tensor, "batch pos"], accuracy: Callable[[], float]) -> float:
    def at_mean(value: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return torch.where(place[..., None], value[place].mean(0), value)

    with replace(model, {f"blocks.{layer}.hook_mlp_out": at_mean}):
        return accuracy()
