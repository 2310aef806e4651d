"""Where a model looks facts up: the MLPs that turn a subject into its attribute, by probes and by path patching (FLU).

Guo et al. 2024, Mechanistic Unlearning (arXiv:2410.12949), restrict edits to these MLPs. They find them by probing
(`probes`, `lookup_range`) for facts with a few answers, by path patching (`lookup_paths`) for the rest. Here both can
run, and the table `agreement` says whether they name the same MLPs.

The score of an MLP is its normalised effect on the answer (path patching) or how much its output raises the
chance-corrected accuracy of the probe (probing; at least 0.001 inside its range). The lookup MLPs have the votes of all
examples, the others none: `select(shared=1)` is the lookup set, whatever its size.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from locedit.components import ComponentSet
from locedit.data.items import Dataset, Item, Task
from locedit.errors import LoceditError
from locedit.localize.budget import MIB
from locedit.localize.lookup import path_patching, probes
from locedit.localize.lookup.lookup_paths import Layer0, PathRule, Paths, Sign, lookup_paths
from locedit.localize.lookup.lookup_range import LookupRange, RangeRule, lookup_range
from locedit.localize.lookup.path_effects import Normalise
from locedit.localize.lookup.probe_data import CHOICE, ProbeOptions
from locedit.localize.lookup.probes import Position, Probes, probe
from locedit.localize.patching.pairs import Pair, PairOptions, pairs_of
from locedit.models import Model
from locedit.scores import Scores, Table

LEAST = 0.001
"score of an MLP inside the probe's range whose output does not raise the accuracy"


@dataclass(frozen=True, kw_only=True)
class FactLookupOptions(PairOptions):
    """Probing, path patching, and the rules by which each names MLPs."""

    by: Literal["both", "path_patching", "probe"] = "both"
    "both: path patching decides, the probes stand beside it"
    heads: int = 10
    "extraction heads at most (published: 10)"
    head_share: float | None = 0.8
    "fewest heads that have this share of all positive effects; None = as many as `heads` says (published)"
    threshold: float | None = None
    "least effect of a lookup MLP (published: 0.02); None = the larger of the null and mlp_share of the largest"
    mlp_share: float = 0.1
    "least effect of a lookup MLP, as a share of the largest"
    sign: Sign = "positive"
    "positive: heads and MLPs that bring the answer back; absolute: by |effect| (published)"
    layer0: Layer0 = "apart"
    "apart: heads of layer 0, below which is no MLP, do not set the reading layer; read: they do (published)"
    normalise: Normalise = "means"
    "effects divided by the clean minus the corrupt metric, mean by mean or item by item (published)"
    probe_at: Position = "subject"
    "whose curve gives the range: the last token of the subject, of the subject alone, or of the prompt"
    probe_data: Literal["task", "forget"] = "task"
    "task: probes learn from the facts of forget and retain; forget: only from those"
    probe_items: int = 600
    "facts of a relation at most; more are drawn from, whole owners at a time"
    probe_folds: int = 5
    "parts of the cross-validation, split by owner; an answer needs as many owners"
    probe_l2: float = 1.0
    "price of the probe's weights, 1 / C of scikit-learn"
    ablate_from: tuple[int, ...] | None = None
    "layers from which on attention is at its mean, a run each; None = all, or 12 of them evenly spaced"
    decodable: float = 0.5
    "least peak of the chance-corrected accuracy; below it there is no range"
    saturation: float = 0.95
    "the range ends at the first layer with this share of the peak"
    rise: float = 0.1
    "the range begins where this share of the way from the embedding to the peak is gone, ..."
    survival: float = 0.9
    "... but not before the attention without which this share of the peak is not reached"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.paths()
        self.range()
        self.probes()

    def paths(self) -> PathRule:
        return _part(PathRule, self)

    def range(self) -> RangeRule:
        return _part(RangeRule, self)

    def probes(self) -> ProbeOptions:
        return ProbeOptions(
            batch=self.batch,
            memory_mb=self.memory_mb,
            data=self.probe_data,
            items=self.probe_items,
            folds=self.probe_folds,
            l2=self.probe_l2,
            ablate_from=self.ablate_from,
            seed=self.seed,
        )


def _part(cls: type, options: FactLookupOptions):  # noqa: ANN202
    return cls(**{field.name: getattr(options, field.name) for field in dataclasses.fields(cls)})


def fact_lookup(model: Model, task: Task, options: FactLookupOptions) -> Scores:
    """Scores of the MLPs, votes for the lookup MLPs alone; tables `lookup`, `heads`, `mlps`, `probe`, `agreement`.

    Multiple choice is left out: its answer is a letter, no property of the subject.
    """
    if options.by != "probe":
        path_patching.refuse(model)
    task = without_choice(task)
    pairs = pairs_of(model, task, options) if options.by != "probe" else None
    paths = patched(model, task, pairs, options) if pairs else None
    probed, why = _probes(model, task, options)
    found = _range(model, probed, options) if probed else None
    gains = _gains(probed, options.probe_at) if probed else None
    chosen, values = _decide(model, paths, gains, found, options)
    evidence: dict[str, Table] = {"lookup": _lookup(paths, probed, found, chosen, options, why=why)}
    if paths:
        evidence |= {"heads": paths.heads, "mlps": paths.mlps}
    if probed and found and gains:
        evidence |= {"probe": probed.table(), "relations": probed.relations}
        evidence["agreement"] = _agreement(paths, gains, found)
    sites = model.sites("mlp")
    ids = [item.id for item in pairs or task.forget]
    return Scores(
        values={name: torch.tensor([value]) for name, value in zip(sites, values, strict=True)},
        sites=sites,
        examples=tuple(ids),
        votes={name: torch.tensor([len(ids) * (layer in chosen)]) for layer, name in enumerate(sites)},
        evidence=evidence,
        fingerprint=model.fingerprint,
    )


def lookup_set(scores: Scores) -> ComponentSet:
    """The lookup MLPs that `fact_lookup` found; an error where it found none."""
    if "lookup" not in scores.evidence:
        raise LoceditError("these scores are not of fact_lookup: they have no table 'lookup'")
    return scores.select(shared=1.0)


def without_choice(task: Task) -> Task:
    """The task's facts in all formats but multiple choice."""
    changed: dict[str, Dataset | None] = {}
    for role in ("forget", "retain"):
        data: Dataset | None = getattr(task, role)
        if data is not None and data.kind == "fact":
            kept: list[Item] = [item for item in data if item.format != CHOICE]
            if not kept and role == "forget":
                raise LoceditError(f"{data.source}: every fact is multiple choice, whose answers are letters")
            changed[role] = data.replace(kept) if kept else None
    return dataclasses.replace(task, **changed)


def patched(model: Model, task: Task, pairs: Sequence[Pair], options: FactLookupOptions) -> Paths:
    """Path patching of some of the task's pairs."""
    items = {item.id: item for data in (task.pairs, task.forget) if data is not None for item in data}
    owners = [items[pair.id].owner for pair in pairs]
    groups = [items[pair.id].group for pair in pairs]
    return lookup_paths(model, pairs, options.paths(), options, owners=owners, groups=groups)


# --- probes ----------------------------------------------------------------------------------------------------------


def _probes(model: Model, task: Task, options: FactLookupOptions) -> tuple[Probes | None, str]:
    """The probes, or why there are none; an error where nothing else was asked for."""
    if options.by == "path_patching":
        return None, "not asked for"
    try:
        return probe(model, task, options.probes()), ""
    except LoceditError as error:
        if options.by == "probe":
            raise
        return None, str(error)


def _range(model: Model, probed: Probes, options: FactLookupOptions) -> LookupRange:
    curve = {layer: r.corrected for layer, r in probed.curve(options.probe_at).items()}
    ablated = {
        first: {layer: r.corrected for layer, r in probed.curve(options.probe_at, first).items()}
        for first in probed.ablations
    }
    return lookup_range(curve, ablated, options.range(), parallel=model.parallel)


def _gains(probed: Probes, position: Position) -> list[float]:
    """What each MLP's output adds to the chance-corrected accuracy after its layer."""
    after, before = probed.curve(position), probed.curve(position, middle=True)
    return [after[layer].corrected - before[layer].corrected for layer in sorted(before)]


# --- the decision ----------------------------------------------------------------------------------------------------


def _decide(
    model: Model,
    paths: Paths | None,
    gains: Sequence[float] | None,
    found: LookupRange | None,
    options: FactLookupOptions,
) -> tuple[list[int], list[float]]:
    """The lookup MLPs' layers, and the scores of all."""
    layers = range(model.n_layers)
    if paths is not None:
        chosen = paths.chosen
        values = [abs(v) if options.sign == "absolute" else v for v in paths.mlps["effect"]]
    else:
        assert gains is not None
        assert found is not None
        chosen = [layer for layer in layers if layer in found]
        values = [max(gain, LEAST) if layer in found else gain for layer, gain in enumerate(gains)]
    return chosen, list(values)


# --- tables ----------------------------------------------------------------------------------------------------------


def _lookup(
    paths: Paths | None,
    probed: Probes | None,
    found: LookupRange | None,
    chosen: Sequence[int],
    options: FactLookupOptions,
    *,
    why: str,
) -> Table:
    """What was decided, and by which rule; and why there are no probes."""
    rows: list[tuple[str, object, str]] = [
        ("lookup MLPs", _listed(chosen), "by " + ("probing" if options.by == "probe" else "path patching"))
    ]
    if paths is not None:
        rows += _path_rows(paths, options)
    if probed is not None and found is not None:
        rows += _probe_rows(probed, found, options)
    else:
        rows.append(("probes", "none", why))
    if paths is not None and found is not None:
        both = [layer for layer in paths.chosen if layer in found]
        either = [layer for layer in paths.mlps["layer"] if layer in found or layer in paths.chosen]
        share = len(both) / len(either) if either else math.nan
        rows.append(("agreement", f"{share:.3g}", "lookup MLPs of both methods, as a share of those of either"))
    return {name: [row[i] for row in rows] for i, name in enumerate(("what", "value", "rule"))}


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers)) or "none"


def _path_rows(paths: Paths, options: FactLookupOptions) -> list[tuple[str, object, str]]:
    chosen = [i for i, c in enumerate(paths.heads["chosen"]) if c]
    heads = ", ".join(f"{paths.heads['layer'][i]}.{paths.heads['head'][i]}" for i in chosen)
    share = "" if options.head_share is None else f" and no more than have {options.head_share:g} of all such effects"
    given = options.threshold is not None
    null = "none" if math.isnan(paths.null) else f"{paths.null:.4g}"
    bottom = sum(paths.heads["effect"][i] for i in chosen if paths.heads["layer"][i] == 0)
    apart = " above layer 0" if options.layer0 == "apart" else ""
    return [
        ("extraction heads", heads, f"largest effects ({options.sign}), at most {options.heads}{share}"),
        ("heads of layer 0", f"{bottom:.4g}", "effect of the extraction heads that read what no MLP has written"),
        ("reading layer", paths.reading, f"lowest layer of the extraction heads{apart}"),
        (
            "threshold",
            f"{paths.threshold:.4g}",
            "given" if given else f"the larger of {options.mlp_share:g} of the largest effect and the null",
        ),
        ("null", null, "95 % quantile of the largest effect when items are measured by others' answers"),
        (
            "clean minus corrupt",
            f"{paths.total:.4g}",
            f"mean {options.metric}, of whose size effects are a share; below 0 the model does not know the answers",
        ),
    ]


def _probe_rows(probed: Probes, found: LookupRange, options: FactLookupOptions) -> list[tuple[str, object, str]]:
    at = options.probe_at
    ends = "none" if found.first is None else f"{found.first} to {found.last}"
    why = f"peak below {options.decodable:g}" if found.first is None else "later of rise and joining, to saturation"
    enough = "not known" if found.attention is None else str(found.attention)
    return [
        ("probe range", ends, why),
        ("probed at", at, "whose curve gives the range"),
        ("peak", f"{found.peak:.3g} after layer {found.peak_layer}", f"chance-corrected accuracy at {at}"),
        ("rise", _or_none(found.rise), f"first layer with {options.rise:g} of the way from the embedding to the peak"),
        ("saturation", _or_none(found.saturation), f"first layer with {options.saturation:g} of the peak"),
        (
            "attention needed",
            enough,
            f"fewest layers of attention with which {options.survival:g} of the peak is reached",
        ),
        ("unsolved", f"{probed.unsolved:.1e}", "largest gradient that a probe was left with, as a share of its items"),
    ]


def _or_none(layer: int | None) -> str:
    return "none" if layer is None else str(layer)


def _agreement(paths: Paths | None, gains: Sequence[float], found: LookupRange) -> Table:
    """Layer by layer what both methods say."""
    table: Table = {"layer": list(range(len(gains))), "probe_gain": list(gains)}
    table["by_probe"] = [layer in found for layer in table["layer"]]
    if paths is not None:
        table |= {"path_effect": paths.mlps["effect"], "by_path_patching": paths.mlps["chosen"]}
        table["agree"] = [a == b for a, b in zip(table["by_probe"], paths.mlps["chosen"], strict=True)]
    return table


def memory(model: Model, data: Dataset, options: FactLookupOptions) -> int:
    """Bytes beside the model: the budget of a pass, and the states of the probes."""
    states = 0 if options.by == "path_patching" else probes.memory(model, len(data), options.probes())
    return options.memory_mb * MIB + states
