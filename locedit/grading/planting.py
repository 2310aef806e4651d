"""Facts planted where they are known to be: new people trained into a set of components, nothing else trainable.

The information that is fine-tuned into known neurons is the benchmark INJ of Chang et al. 2024 (arXiv:2311.09060); the
same idea at scale is LACUNA (arXiv:2607.02513). Training also makes the weights of the set larger, which tells it from
the rest without any knowledge. So other people are planted in the same way in as many *decoys*, and only what a set
knows tells it from them. The set says where the facts were *written*: components outside it can matter for them as
well, such as those that read the name, so that a causal method can be right and still score them high.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from locedit.components import ComponentSet
from locedit.data.encode import encode
from locedit.data.items import Dataset, Task
from locedit.edit import Edit, train
from locedit.grading.accuracy import accuracy
from locedit.grading.options import SITES, GradeOptions
from locedit.grading.worlds import Planted
from locedit.models import Model
from locedit.unlearn import objective_of
from locedit.unlearn.injection import InjectionOptions, loss


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """Share of the facts whose answer is the likeliest, before planting and after it."""

    before: float
    "of the planted people: guessing"
    planted: float
    "of the planted people afterwards"
    decoys: float
    "of the decoys' people afterwards"
    known_before: float
    "of the people whom the model knows"
    known: float


@dataclass(frozen=True, kw_only=True)
class Sets:
    """Two disjoint sets of equal size."""

    truth: ComponentSet
    decoys: ComponentSet


def draw(model: Model, site: str, *, seed: int, number: int, options: GradeOptions) -> Sets:
    """The sets number `number` of a seed at a site.

    Layers go round, so that over seeds and draws each is planted about equally often and a method that always points
    to the same layer gains nothing; their decoys, and neurons and heads, are drawn at random.
    """
    layers = list(range(model.n_layers))
    Random("layers").shuffle(layers)
    layer = layers.pop((seed * options.draws + number) % len(layers))
    rng = Random(f"{site} {seed} {number}")
    if site == "mlp":
        return Sets(truth=_mlp(model, layer), decoys=_mlp(model, rng.choice(layers)))
    sites = model.sites(SITES[site])
    places = [(name, i) for name, part in sites.items() for i in range(part.count)]
    count = max(1, round((options.heads if site == "heads" else options.neurons) * len(places)))
    if site == "layer_neurons":
        places = [(name, i) for name, i in places if sites[name].layer == layer]
    count = min(count, len(places) // 3)
    chosen = rng.sample(places, 2 * count)
    return Sets(truth=_of(model, chosen[:count]), decoys=_of(model, chosen[count:]))


def _mlp(model: Model, layer: int) -> ComponentSet:
    return model.components({f"blocks.{layer}.mlp": [0]})


def _of(model: Model, places: Sequence[tuple[str, int]]) -> ComponentSet:
    chosen: dict[str, list[int]] = {}
    for name, index in places:
        chosen.setdefault(name, []).append(index)
    return model.components(chosen)


def plant(model: Model, data: Planted, sets: Sets, *, options: GradeOptions, seed: int, number: int) -> Edit:
    """Both sets planted, as one edit; in every second draw the decoys come first."""
    todo = [(data.people, sets.truth), (data.decoys, sets.decoys)]
    (first, where), (second, there) = todo if number % 2 == 0 else todo[::-1]
    made = _learned(model, first, data.known, where, options=options, seed=seed)
    with made.applied(model) as changed:
        both = data.known.replace([*data.known, *first])
        return made.then(_learned(changed, second, both, changed.bind(there), options=options, seed=seed))


def _learned(
    model: Model, people: Dataset, kept: Dataset, within: ComponentSet, *, options: GradeOptions, seed: int
) -> Edit:
    """The facts of the people, trained inside the set beside what is to be kept; the rate falls to 0."""
    training = InjectionOptions(
        steps=options.plant_steps,
        learning_rate=options.plant_rate,
        batch_size=32,
        schedule="linear",
        eval_every=0,
        seed=seed,
    )
    goal = objective_of(
        model,
        Task(forget=people, retain=kept),
        functools.partial(loss, options=training),
        name="planting",
        learns=people,
        retain=True,
    )
    return train(model, goal, within=within, options=training)


def knowledge(model: Model, edit: Edit, data: Planted) -> Knowledge:
    """What the model knows, without the edit and with it."""
    before, known_before = (accuracy(model, encode(model, part)) for part in (data.people, data.known))
    with edit.applied(model) as planted:
        parts = (data.people, data.decoys, data.known)
        after, decoys, known = (accuracy(planted, encode(planted, part)) for part in parts)
    return Knowledge(before=before, planted=after, decoys=decoys, known_before=known_before, known=known)
