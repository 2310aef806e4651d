"""The registry of unlearning methods: for each its function, its options, what it needs and its paper."""

import functools
from dataclasses import dataclass
from typing import Any

from locedit.components import ComponentSet
from locedit.data.items import Task
from locedit.edit import ablation
from locedit.edit.edit import Edit
from locedit.edit.layer_training import UNITS
from locedit.models import Model
from locedit.unlearn import (
    ceu,
    dpo,
    eul,
    f_learning,
    grad_diff,
    gradient_ascent,
    ihl,
    injection,
    kga,
    kl,
    latent,
    llmu,
    loku,
    loo,
    npo,
    pcgu,
    pdu,
    quark,
    quark_options,
    rmu,
    satimp,
    simnpo,
    sisa,
    stopping,
    texts,
    undial,
    unlikelihood,
    weight_mask,
    wga,
    whp,
)
from locedit.unlearn.combine import Methods
from locedit.unlearn.registry import ForgetOptions, Method


@dataclass(frozen=True, kw_only=True)
class ScaleOptions:
    """Options of scale."""

    factor: float = 0.5
    "what the components' contribution is multiplied by"


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """Nothing to choose."""


def _zero(model: Model, task: Task, *, within: ComponentSet, hold: Any, options: NoOptions) -> Edit:
    del task, options
    return ablation.zero(model, within, hold=hold)


def _mean(model: Model, task: Task, *, within: ComponentSet, hold: Any, options: NoOptions) -> Edit:
    """Means over the retain data, else over the texts, else over the forget data."""
    del options
    return ablation.mean(model, within, task.retain or task.texts or task.forget, hold=hold)


def _scale(model: Model, task: Task, *, within: ComponentSet, hold: Any, options: ScaleOptions) -> Edit:
    del task
    return ablation.scale(model, within, options.factor, hold=hold)


_ablation = functools.partial(
    Method, trained=False, dose="components", needs_set=True, holds=("weights", "hooks"), requires=()
)
_loss = functools.partial(Method, requires=("forget", "retain"))
TEXTS = ("fact", "private", "labelled", "plain", "tokens")
"""Kinds of items that are one text each."""

METHODS = Methods({
    "zero": _ablation(function=_zero, options=NoOptions, paper="Dai et al. 2022, arXiv:2104.08696"),
    "mean": _ablation(function=_mean, options=NoOptions, paper="Wang et al. 2023, arXiv:2211.00593"),
    "scale": _ablation(function=_scale, options=ScaleOptions, paper="Dai et al. 2022, arXiv:2104.08696"),
    "injection": Method(
        function=injection.loss,
        options=injection.InjectionOptions,
        requires=("forget", "retain"),
        paper="Guo et al. 2024, arXiv:2410.12949",
        learns=injection.new_answers,
        others=texts.others,
        verify=texts.verify,
    ),
    "unlikelihood": _loss(
        function=unlikelihood.loss,
        options=unlikelihood.UnlikelihoodOptions,
        paper="Welleck et al. 2020, arXiv:1908.04319; Guo et al. 2024, arXiv:2410.12949",
        others=texts.others,
        verify=texts.verify,
    ),
    "ga": Method(
        function=gradient_ascent.loss,
        options=gradient_ascent.GaOptions,
        requires=("forget",),
        paper="Jang et al. 2023, arXiv:2210.01504",
        stop=stopping.stop,
        verify=gradient_ascent.verify,
        finish=stopping.finish,
    ),
    "grad_diff": Method(
        function=grad_diff.loss,
        options=ForgetOptions,
        requires=("forget", "retain"),
        paper="Liu et al. 2022, arXiv:2203.12817",
    ),
    "npo": Method(
        function=npo.loss,
        options=npo.NpoOptions,
        requires=("forget", "retain"),
        paper="Zhang et al. 2024, arXiv:2404.05868",
    ),
    "adv_ga": Method(
        function=latent.adv_ga,
        options=latent.AdvGaOptions,
        requires=("forget", "retain"),
        paper="Yuan et al. 2025, arXiv:2408.10682",
        verify=latent.verify,
    ),
    "adv_npo": Method(
        function=latent.adv_npo,
        options=latent.AdvNpoOptions,
        requires=("forget", "retain"),
        paper="Yuan et al. 2025, arXiv:2408.10682",
        verify=latent.verify,
    ),
    "kl": _loss(
        function=kl.loss,
        options=kl.KlOptions,
        paper="Maini et al. 2024, arXiv:2401.06121",
    ),
    "simnpo": _loss(
        function=simnpo.loss,
        options=simnpo.SimnpoOptions,
        paper="Fan et al. 2024, arXiv:2410.07163",
    ),
    "dpo": _loss(
        function=dpo.loss,
        options=dpo.DpoOptions,
        paper="Rafailov et al. 2023, arXiv:2305.18290; Maini et al. 2024, arXiv:2401.06121",
        others=dpo.others,
        verify=dpo.verify,
        kinds=("fact",),
    ),
    "rmu": _loss(
        function=rmu.loss,
        options=rmu.RmuOptions,
        paper="Li et al. 2024, arXiv:2403.03218",
    ),
    "ceu": _loss(
        function=ceu.loss,
        options=ceu.CeuOptions,
        paper="Yang 2025, arXiv:2503.01224",
    ),
    "undial": _loss(
        function=undial.loss,
        options=undial.UndialOptions,
        paper="Dong et al. 2024, arXiv:2402.10052",
    ),
    "wga": _loss(
        function=wga.loss,
        options=wga.WgaOptions,
        paper="Wang et al. 2025, arXiv:2502.19301",
    ),
    "satimp": _loss(
        function=satimp.loss,
        options=satimp.SatimpOptions,
        paper="Yang et al. 2025, arXiv:2505.11953",
    ),
    "pdu": _loss(
        function=pdu.loss,
        options=pdu.PduOptions,
        paper="Entesari et al. 2025, arXiv:2506.05314",
    ),
    "ihl": _loss(
        function=ihl.loss,
        options=ForgetOptions,
        paper="Cha et al. 2025, arXiv:2408.06621",
    ),
    "loku": _loss(
        function=loku.loss,
        options=loku.LokuOptions,
        paper="Cha et al. 2025, arXiv:2408.06621",
        holds=("adapter",),
        held=loku.factors,
        verify=loku.verify,
    ),
    "llmu": _loss(
        function=llmu.loss,
        options=llmu.LlmuOptions,
        paper="Yao et al. 2023, arXiv:2310.10683",
        others=llmu.others,
        verify=llmu.verify,
        kinds=("fact",),
    ),
    "weight_mask": Method(
        function=weight_mask.weight_mask,
        options=weight_mask.WeightMaskOptions,
        requires=("forget", "retain"),
        paper="Guo et al. 2024, arXiv:2410.12949",
        trained=False,
        holds=("weights",),
        dose="weights",
        verify=weight_mask.verify,
    ),
    "f_learning": Method(
        function=f_learning.f_learning,
        options=f_learning.FLearningOptions,
        requires=("forget",),
        paper="Ni et al. 2024, arXiv:2311.08011; Ilharco et al. 2023, arXiv:2212.04089",
        trained=False,
        dose="scale",
        verify=f_learning.verify,
    ),
    "eul": _loss(
        function=eul.loss,
        options=eul.EulOptions,
        paper="Chen and Yang 2023, arXiv:2310.20150",
        holds=("modules",),
        units=UNITS,
        objective=eul.objective,
        held=eul.layers,
        finish=eul.finish,
        fuse=eul.fused,
        apart=eul.apart,
    ),
    "loo": Method(
        function=loo.loss,
        options=loo.LooOptions,
        requires=("forget", "retain"),
        paper="Liu and Kalinli 2023, arXiv:2309.16082",
        kinds=TEXTS,
        objective=loo.objective,
        verify=loo.verify,
    ),
    "kga": Method(
        function=kga.loss,
        options=kga.KgaOptions,
        requires=("forget", "retain", "heldout"),
        paper="Wang et al. 2023, arXiv:2305.06535",
        kinds=TEXTS,
        objective=kga.objective,
        verify=kga.verify,
    ),
    "quark": Method(
        function=quark.loss,
        options=quark_options.QuarkOptions,
        requires=("forget",),
        paper="Lu et al. 2022, arXiv:2205.13636",
        holds=("tokens",),
        objective=quark.objective,
        held=quark.held,
        verify=quark.verify,
    ),
    "sisa": Method(
        function=sisa.sisa,
        options=sisa.SisaEditOptions,
        requires=("forget", "retain"),
        paper="Bourtoule et al. 2021, arXiv:1912.03817",
        trained=False,
        restrictable=False,
        holds=("weights",),
        verify=sisa.verify,
    ),
    "pcgu": Method(
        function=pcgu.loss,
        options=pcgu.PcguOptions,
        requires=("forget", "retain"),
        paper="Yu et al. 2023, doi:10.18653/v1/2023.findings-acl.375; causal: Dige et al. 2024, arXiv:2406.13551",
        kinds=("contrast",),
        pairs=True,
        finish=pcgu.finish,
    ),
    "whp": Method(
        function=whp.loss,
        options=whp.WhpOptions,
        requires=("forget", "retain"),
        paper="Eldan and Russinovich 2023, arXiv:2310.02238",
        kinds=("fact", "private", "labelled", "plain"),
        objective=whp.objective,
        verify=whp.verify,
        finish=whp.finish,
    ),
})  # fmt: skip
"""Name -> method; a name such as npo+0.5*kl is a combination (see `combine`)."""
