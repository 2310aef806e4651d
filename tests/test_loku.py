"""LoKU: trained beside the untouched base it equals training the published factors on the residual model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from locedit import losses
from locedit.components import ComponentSet
from locedit.data.encode import Batch, Example, collate, encode
from locedit.edit import Edit
from locedit.edit.adapter import linear_pieces
from locedit.edit.checkpoint import checkpoints
from locedit.edit.fila import Svd, weighted_low_rank
from locedit.edit.objective import Step
from locedit.errors import LoceditError
from locedit.losses import Scored
from locedit.models import Model
from locedit.unlearn import ihl, prepare, unlearn
from locedit.unlearn.fila import FilaOptions, Start, importance
from locedit.unlearn.loku import LOSSES, LokuOptions
from tests import edits, tiny
from tests.test_edit_adapter import dense

SETTINGS: dict[str, Any] = {"steps": 5, "learning_rate": 1e-2, "eval_every": 0, "rank": 3, "alpha": 6.0}


def batch(model: Model) -> Batch:
    return collate(encode(model, edits.task().forget), model)


def logits(model: Model) -> Tensor:
    with torch.no_grad():
        return model.logits(batch(model))


def pieces(model: Model) -> ComponentSet:
    """Rows, columns, both of one matrix, heads, and a whole matrix."""
    rows = model.components({"blocks.0.mlp.out.row": [2, 3, 9, 11, 20]})
    columns = model.components({"blocks.0.mlp.out.column": [1, 7], "blocks.1.mlp.out.column": [4]})
    return edits.neurons_and_heads(model) | rows | columns | model.components({"blocks.2.mlp.out.matrix": [0]})


def inverted_hinge(scored: Scored) -> Tensor:
    """1 + p(y) - max over v != y of p(v), mean over tokens, then over examples; from the definition."""
    rows: list[list[Tensor]] = [[] for _ in scored.rows]
    for row, label, line in zip(scored.row.tolist(), scored.labels.tolist(), scored.logits, strict=True):
        p = line.softmax(0)
        rows[row].append(1 + p[label] - torch.cat([p[:label], p[label + 1 :]]).max())
    return torch.stack([torch.stack(row).mean() for row in rows]).mean()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_it_equals_training_the_published_factors_on_the_residual_base(architecture: str) -> None:
    """W' + s B A with W' = W - s B0 A0, trained with AdamW, against the edit: the same logits and losses in float64."""
    model = edits.double(architecture)
    task = edits.task()
    assert task.retain is not None
    forget, retain = encode(model, task.forget), encode(model, task.retain)
    within = model.components({"blocks.0.mlp.out.matrix": [0], "blocks.2.attn.o.matrix": [0]})
    edit = unlearn(model, task, "loku", within=within, clip=None, **SETTINGS)
    made = Start(model=model, forget=forget, retain=retain, options=FilaOptions(), rank=3, alpha=6.0)
    held = linear_pieces(model, within)
    ratios = made.relative_information(held)
    transposed = architecture == "gpt2"  # Conv1D
    trained: list[Tensor] = []
    residuals: list[tuple[torch.nn.Parameter, Tensor]] = []
    for piece in held:
        weight = model.parameter(piece.param)
        matrix = (weight.T if transposed else weight).detach()
        down, up = weighted_low_rank(
            matrix, importance(piece, ratios[piece.param]), rank=3, scale=2.0, svd=Svd(), generator=torch.Generator()
        )
        residuals.append((weight, matrix - 2.0 * up @ down))
        trained += [down.clone().requires_grad_(), up.clone().requires_grad_()]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    names = {id(p): name for name, p in model.module.named_parameters()}

    def scored(examples: list[Example]) -> Scored:
        """By functional call on the residual model with B A added."""
        full = [residual + 2.0 * trained[2 * i + 1] @ trained[2 * i] for i, (_, residual) in enumerate(residuals)]
        weights = {names[id(w)]: f.T if transposed else f for (w, _), f in zip(residuals, full, strict=True)}
        data = collate(examples, model)
        inputs = {"input_ids": data.ids, "attention_mask": data.attention_mask}
        output = torch.func.functional_call(model.module, weights, kwargs=inputs).logits
        at, labels, row = [], [], []
        for number, example in enumerate(examples):
            for target in example.targets:
                offset = int(data.attention_mask[number].argmax())
                at.append(output[number, offset + target - 1])
                labels.append(example.ids[target])
                row.append(number)
        return Scored(logits=torch.stack(at), labels=torch.tensor(labels), row=torch.tensor(row), rows=tuple(examples))

    for step in range(5):
        optimizer.zero_grad()
        terms = inverted_hinge(scored(forget)), losses.sequence_nll(scored(retain)).mean()
        assert edit.history["forget_loss"][step + 1] == pytest.approx(terms[0].item(), rel=1e-9)
        assert edit.history["retain_loss"][step + 1] == pytest.approx(terms[1].item(), rel=1e-9)
        sum(terms).backward()  # type: ignore[union-attr]
        optimizer.step()
    expected = scored(encode(model, task.forget)).logits
    start = losses.score(model, batch(model)).logits
    with edit.applied(model) as edited:
        torch.testing.assert_close(losses.score(edited, batch(edited)).logits, expected, rtol=1e-9, atol=1e-9)
    assert (expected - start).abs().max() > 0.1


@pytest.mark.parametrize(
    ("architecture", "restricted"),
    [("gpt2", True), ("llama", True), ("gpt_neox", True), ("bert", True), ("gpt2", False), ("llama", False)],
)
def test_the_export_is_a_plain_adapter_on_the_original_base(
    architecture: str, restricted: bool, tmp_path: Path
) -> None:
    model = tiny.model(architecture)
    before = edits.bits(model.module)
    plain = logits(model)
    within = pieces(model) if restricted else None
    edit = unlearn(model, edits.task(), "loku", within=within, **SETTINGS)
    assert edit.kind == "adapter"
    assert edits.same_bits(model.module, before)
    with edit.applied(model) as edited:
        expected = logits(edited)
    assert (expected - plain).abs().max() > 1e-2
    # at most twice the rank for each piece
    assert {a.down.shape[0] for a in edit.adapters} <= {2, 4, 6}
    edit.save(tmp_path / "edit")
    loaded = Edit.load(tmp_path / "edit")
    assert loaded.digest == edit.digest
    with loaded.applied(model) as edited:
        assert torch.equal(logits(edited), expected)
    edit.export(model, tmp_path / "adapter")
    wrapped = PeftModel.from_pretrained(model.module, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    with wrapped.disable_adapter():
        assert torch.equal(logits(model), plain)
    wrapped.unload()
    if within is not None:
        masks = within.parameter_mask("train")
        for name, change in dense(model, edit).items():
            assert not change[~masks[name]].any()
            assert change[masks[name]].abs().max() > 1e-4


@pytest.mark.parametrize("half", [False, True])
def test_outputs_outside_the_rows_keep_their_bits(half: bool) -> None:
    model = edits.half("llama") if half else tiny.model("llama")
    rows = [2, 3, 9]
    within = model.components({"blocks.1.mlp.out.row": rows})
    (piece,) = linear_pieces(model, within)
    module: Any = piece.module
    edit = unlearn(model, edits.task(), "loku", within=within, **SETTINGS)
    x = torch.randn(2, 5, module.in_features, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    with torch.no_grad():
        plain = module(x)
        with edit.applied(model):
            changed = module(x)
    rest = [i for i in range(plain.shape[-1]) if i not in rows]
    assert changed.dtype == plain.dtype
    assert torch.equal(changed[..., rest].view(torch.uint8), plain[..., rest].view(torch.uint8))
    assert not torch.equal(changed[..., rows], plain[..., rows])


def test_what_it_needs_is_said_before_a_model_is_loaded() -> None:
    task = edits.task()
    with pytest.raises(LoceditError, match="loku needs 'retain' data"):
        prepare("loku", edits.task(retain=None), retain_weight=0.0)
    with pytest.raises(LoceditError, match="loku cannot be held as 'weights'"):
        prepare("loku", task, hold="weights")
    with pytest.raises(LoceditError, match="eps=0 must be above 0"):
        prepare("loku", task, eps=0)
    with pytest.raises(LoceditError, match=r"alpha=0\.0 must be above 0"):
        prepare("loku", task, alpha=0.0)
    assert prepare("loku", task, retain_weight=0.0).loss == "ihl"


def test_the_ablation_is_ascent_in_the_same_factors() -> None:
    model = tiny.model("llama")
    common: dict[str, Any] = {"within": edits.neurons_and_heads(model), **SETTINGS}
    found = {loss: unlearn(model, edits.task(), "loku", loss=loss, **common) for loss in ("ihl", "grad_diff")}
    diff = unlearn(model, edits.task(), "grad_diff", hold="adapter", **common)
    assert found["grad_diff"].history["forget_loss"][1] == diff.history["forget_loss"][1]
    assert found["ihl"].history["forget_loss"][1] != diff.history["forget_loss"][1]
    assert found["grad_diff"].history["forget_loss"][2] != diff.history["forget_loss"][2]


class Killed(BaseException):
    """Stands for a process that ends in the middle of a step."""


def test_a_killed_training_goes_on_from_the_same_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    settings: dict[str, Any] = {"within": pieces(model), "svd": "randomized", **SETTINGS}
    whole = unlearn(model, edits.task(), "loku", **settings)
    steps: list[int] = []

    def dies_at_step_4(step: Step, options: LokuOptions) -> dict[str, Tensor]:
        steps.append(step.number)
        if len(steps) == 4:
            raise Killed
        return ihl.loss(step, options)

    monkeypatch.setitem(LOSSES, "ihl", dies_at_step_4)
    with pytest.raises(Killed), checkpoints(tmp_path / "state", cost=1):
        unlearn(model, edits.task(), "loku", **settings)
    with checkpoints(tmp_path / "state", cost=1):
        again = unlearn(model, edits.task(), "loku", **settings)
    assert steps == [1, 2, 3, 4, 4, 5]
    assert again.digest == whole.digest
    assert again.history == whole.history


@pytest.mark.parametrize("option", [{"gradient_checkpointing": True}, {"accumulate": 2, "batch_size": 1}])
def test_recomputed_and_accumulated_steps_are_the_same(option: dict[str, Any]) -> None:
    """Of two forget and two retain examples, in one batch or in two."""
    model = edits.double("llama")
    task = edits.task()
    assert task.retain is not None
    task = edits.task(retain=task.retain.replace(list(task.retain)[:2]))
    settings: dict[str, Any] = {"within": pieces(model), **SETTINGS}
    plain, other = (unlearn(model, task, "loku", **settings, **given) for given in ({}, option))
    for one, two in zip(plain.adapters, other.adapters, strict=True):
        torch.testing.assert_close(two.up @ two.down, one.up @ one.down, rtol=1e-7, atol=1e-9)
        assert (one.up @ one.down).abs().max() > 1e-3
