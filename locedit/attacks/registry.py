"""Every attack by name, the least access first."""

from collections.abc import Callable
from typing import Any

from locedit.attacks.attack import Attack
from locedit.attacks.depth import DepthOptions, depth
from locedit.attacks.dropped import DropOptions
from locedit.attacks.dropping import drop_layer, drop_token
from locedit.attacks.few_shot import FewShot, FewShotOptions, few_shot
from locedit.attacks.interpolation import InterpolationOptions, interpolation, require_change_of_weights
from locedit.attacks.item_attack import ItemAttack
from locedit.attacks.jailbreak import Jailbreak, JailbreakOptions, jailbreak
from locedit.attacks.latent import Latent, LatentOptions, latent
from locedit.attacks.logit_lens import LogitLens, LogitLensOptions, logit_lens
from locedit.attacks.options import RelearnOptions
from locedit.attacks.outcome import readied
from locedit.attacks.probe import Probe, ProbeOptions, classes_of, probe
from locedit.attacks.quantization import Quantization, QuantizationOptions, quantization
from locedit.attacks.relearning import Relearning, relearn
from locedit.attacks.relearning_otherwise import (
    Benign,
    Few,
    OtherFormat,
    Quantized,
    RelearnBenignOptions,
    RelearnFewOptions,
    RelearnFormatOptions,
    RelearnQuantizedOptions,
    relearn_benign,
    relearn_few,
    relearn_format,
    relearn_quantized,
    require_benign,
    shown_format,
)
from locedit.attacks.shared import Shared
from locedit.attacks.soft_prompt import SoftPrompt, SoftPromptOptions, soft_prompt
from locedit.attacks.suffix import Suffix, SuffixOptions, suffix
from locedit.data.items import Task
from locedit.edit import Edit
from locedit.models import Model


def _by_item(make: Callable[[Any, Model, Task], ItemAttack[Any]]) -> Callable[[Any, Model, Task, Edit], object]:
    """What says whether an attack that is read item by item can be run."""
    return lambda options, model, task, _: readied(make(options, model, task), model, task, shared=Shared())


def _by_relearning(kind: type[Relearning]) -> Callable[[Any, Model, Task, Edit], object]:
    """What says whether a kind of relearning can be run."""
    return lambda options, model, task, edit: kind(model, task, edit, {}, options, shared=Shared())


SHARE = "share_back = (forget items under attack - items never known) / (before the edit - items never known)"

ATTACKS: dict[str, Attack] = {
    "few_shot": Attack(
        function=few_shot,
        options=FewShotOptions,
        ready=_by_item(lambda options, *_: FewShot(options)),
        access="prompting",
        requires=("forget",),
        kinds=("fact", "private"),
        definition=f"show solved items of the other half before the question; {SHARE}",
        paper="Lynch et al. 2024, arXiv:2402.16835, section 4 (in-context relearning)",
    ),
    "jailbreak": Attack(
        function=jailbreak,
        options=JailbreakOptions,
        ready=_by_item(lambda options, *_: Jailbreak(options)),
        access="prompting",
        requires=("forget",),
        kinds=("fact", "private"),
        definition=f"ask inside a sentence that insists on the answer; {SHARE}",
        paper="after Lynch et al. 2024, arXiv:2402.16835, section 3",
    ),
    "suffix": Attack(
        function=suffix,
        options=SuffixOptions,
        ready=_by_item(lambda options, *_: Suffix(options)),
        access="prompting",
        requires=("forget",),
        definition="search by gradients for tokens between prompt and answer that are the same for all items, on other "
        f"owners (beside it: on other relations of the same owners, and on the same items); {SHARE}",
        paper="Yuan et al. 2024, arXiv:2408.10682 (dynamic unlearning attack); search of Zou et al. 2023, "
        "arXiv:2307.15043",
    ),
    "soft_prompt": Attack(
        function=soft_prompt,
        options=SoftPromptOptions,
        ready=_by_item(lambda options, *_: SoftPrompt(options)),
        access="activations",
        requires=("forget",),
        definition=f"learn embeddings that stand before every text, on the other half and retain items; {SHARE}",
        paper="prompt tuning of Lester et al. 2021, arXiv:2104.08691; as an attack after Guo et al. 2024, "
        "arXiv:2410.12949, and Schwinn et al. 2024, arXiv:2402.09063",
    ),
    "latent": Attack(
        function=latent,
        options=LatentOptions,
        ready=_by_item(lambda options, *_: Latent(options)),
        access="activations",
        requires=("forget",),
        definition="perturb the residual stream at an early layer towards the true answer of each item, items never "
        f"known as well; {SHARE}",
        paper="Yuan et al. 2024, arXiv:2408.10682 (inner attack of latent adversarial unlearning); compare Schwinn et "
        "al. 2024, arXiv:2402.09063",
    ),
    "probe": Attack(
        function=probe,
        options=ProbeOptions,
        ready=_by_item(lambda options, _, task: Probe(options, task)),
        access="activations",
        requires=("forget", "retain"),
        kinds=("fact",),
        verify=lambda options, task: classes_of(task, least=options.least),
        definition="read the answer off the residual stream with linear probes fitted on retain items, at every layer "
        "and two positions; share_back = (forget items - items never known) / (read likewise before the edit - items "
        "never known)",
        paper="Guo et al. 2024, arXiv:2410.12949, section 5",
    ),
    "logit_lens": Attack(
        function=logit_lens,
        options=LogitLensOptions,
        ready=_by_item(lambda options, *_: LogitLens(options)),
        access="activations",
        requires=("forget",),
        definition="send the residual stream of every layer through the final norm and the unembedding; share_back as "
        "for probe",
        paper="nostalgebraist 2020, interpreting GPT: the logit lens",
    ),
    "depth": Attack(
        function=depth,
        options=DepthOptions,
        access="activations",
        requires=("forget",),
        definition="put the edited model's residual stream into the unedited model, layer by layer, and see how much "
        "of what a retain model's costs the answer it costs too; share_back = 1 - the unlearning depth score",
        paper="unlearning depth score, arXiv:2605.24614",
        diagnostic=True,
        reference="retain_model",
    ),
    "interpolation": Attack(
        function=interpolation,
        options=InterpolationOptions,
        ready=lambda *given: require_change_of_weights(given[-1]),
        access="weights",
        requires=("forget",),
        definition=f"go half of the way back to the unedited weights (a look at the edit: who has those needs no "
        f"attack); {SHARE}",
        paper="after Frankle et al. 2020, arXiv:1912.05671 (linear interpolation of weights)",
        diagnostic=True,
    ),
    "drop_token": Attack(
        function=drop_token,
        options=DropOptions,
        access="weights",
        requires=("forget",),
        kinds=("fact", "private", "tokens", "plain", "labelled"),
        definition=f"run the edited model without the control token that the edit acts through; {SHARE}",
        paper="",
        undoes="token",
    ),
    "drop_layer": Attack(
        function=drop_layer,
        options=DropOptions,
        access="weights",
        requires=("forget",),
        kinds=("fact", "private", "tokens", "plain", "labelled"),
        definition="run the model without the layers that the edit added; share_back as for drop_token",
        paper="",
        undoes="layer",
    ),
    "quantization": Attack(
        function=quantization,
        options=QuantizationOptions,
        ready=_by_item(lambda options, model, _: Quantization(options, device=model.device)),
        access="weights",
        requires=("forget",),
        definition="round the edited weights of the blocks to int8 (one scale an output row) and to NF4 (one scale for "
        f"64 weights), without training; {SHARE}",
        paper="Zhang et al. 2024, arXiv:2410.16454; NF4: Dettmers et al. 2023, arXiv:2305.14314",
    ),
    "relearn_few": Attack(
        function=relearn_few,
        options=RelearnFewOptions,
        ready=_by_relearning(Few),
        access="few steps",
        requires=("forget",),
        definition="as relearn, with at most 4 items and 10 steps",
        paper="after Deeb and Roger 2024, arXiv:2410.08827",
    ),
    "relearn": Attack(
        function=relearn,
        options=RelearnOptions,
        ready=_by_relearning(Relearning),
        access="fine-tuning",
        requires=("forget",),
        definition="fine-tune the edited model on half of the forget set, divided by owner, measure the other half; "
        "share_back = (that half - items never known) / (that half before the edit - items never known)",
        paper="Deeb and Roger 2024, arXiv:2410.08827; Guo et al. 2024, arXiv:2410.12949, section 4",
    ),
    "relearn_benign": Attack(
        function=relearn_benign,
        options=RelearnBenignOptions,
        verify=lambda _, task: require_benign(task),
        ready=_by_relearning(Benign),
        access="fine-tuning",
        requires=("forget",),
        definition="fine-tune the edited model on retain items and texts alone, measure the forget set; share_back as "
        "for relearn",
        paper="Hu et al. 2024, arXiv:2406.13356; Lucki et al. 2024, arXiv:2409.18025",
    ),
    "relearn_format": Attack(
        function=relearn_format,
        options=RelearnFormatOptions,
        verify=lambda options, task: shown_format(task.forget, options.shown),
        ready=_by_relearning(OtherFormat),
        access="fine-tuning",
        requires=("forget",),
        definition="as relearn, with the items of one format of half of the owners; measured are the other formats of "
        "the other half",
        paper="after Guo et al. 2024, arXiv:2410.12949, section 4",
    ),
    "relearn_quantized": Attack(
        function=relearn_quantized,
        options=RelearnQuantizedOptions,
        ready=_by_relearning(Quantized),
        access="fine-tuning",
        requires=("forget",),
        definition="quantize the edited weights, then as relearn",
        paper="after Zhang et al. 2024, arXiv:2410.16454",
    ),
}
