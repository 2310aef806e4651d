"""Loading, running and naming models: one line for what is wrong, and the same numbers whatever the padding."""

import functools
import importlib
import json
import logging
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from locedit import fingerprints
from locedit._transformer_lens import _quiet_import
from locedit.errors import LoceditError
from locedit.fingerprints import fingerprint_of
from locedit.models import Model, load
from tests import tiny

by_architecture = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
causal = pytest.mark.parametrize("architecture", tiny.CAUSAL)
cached = functools.cache(tiny.model)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCEDIT_CACHE", str(tmp_path / "cache"))


def padded(lengths: tuple[int, ...], width: int = 14) -> SimpleNamespace:
    """Random prompts of the given lengths, padded on the right."""
    ids = tiny.ids(len(lengths), width)
    mask = (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).long()
    return SimpleNamespace(ids=ids * mask, attention_mask=mask)


def alone(batch: SimpleNamespace, row: int) -> SimpleNamespace:
    length = int(batch.attention_mask[row].sum())
    return SimpleNamespace(
        ids=batch.ids[row : row + 1, :length], attention_mask=torch.ones(1, length, dtype=torch.long)
    )


def saved(tmp_path: Path, architecture: str = "llama", **overrides: Any) -> Path:
    folder = tmp_path / "model"
    tiny.module(architecture, **overrides).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


# --- running ---------------------------------------------------------------------------------------------------------


@by_architecture
def test_padding_changes_nothing(architecture: str) -> None:
    model, batch = cached(architecture), padded((9, 14, 5))
    with torch.no_grad():
        together = model.logits(batch)
        for row in range(3):
            single = model.logits(alone(batch, row))
            torch.testing.assert_close(together[row : row + 1, : single.shape[1]], single, rtol=0, atol=3e-5)
    other = SimpleNamespace(ids=batch.ids.roll(1, 0), attention_mask=batch.attention_mask)
    assert not torch.allclose(model.logits(other)[1], together[1], atol=0.1)


@by_architecture
def test_logits_are_the_modules_own(architecture: str) -> None:
    model = cached(architecture)
    ids = tiny.ids()
    with torch.no_grad():
        ours = model.logits(SimpleNamespace(ids=ids, attention_mask=torch.ones_like(ids)))
        assert torch.equal(ours, model.module(ids).logits)
    assert ours.shape == (2, 12, model.vocab_size)


@causal
def test_generation_is_argmax_token_by_token(architecture: str) -> None:
    """Each row of a padded batch continues as if it were alone, by plain forward passes without a cache."""
    model, batch = cached(architecture), padded((9, 14, 5))
    together = model.generate(batch, max_new_tokens=10)
    for row, written in enumerate(together):
        ids, expected = alone(batch, row).ids, list[int]()
        for _ in range(10):
            with torch.no_grad():
                token = model.module(ids).logits[:, -1].argmax(-1)
            if int(token) == model.tokenizer.eos_token_id:
                break
            expected.append(int(token))
            ids = torch.cat([ids, token[:, None]], dim=1)
        assert list(written) == expected
    assert max(map(len, together)) == 10


def test_generation_stops_before_the_end_token(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = cached("llama"), padded((9, 14, 5))
    free = model.generate(batch, max_new_tokens=8)
    end = free[0][3]
    monkeypatch.setattr(model.core.generation_config, "eos_token_id", [2, end])
    stopped = model.generate(batch, max_new_tokens=8)
    assert stopped[0] == free[0][: free[0].index(end)]
    assert all(s == f[: f.index(end)] if end in f else s == f for s, f in zip(stopped, free, strict=True))
    assert model.generate(batch, max_new_tokens=0) == [(), (), ()]


@pytest.mark.parametrize(
    ("architecture", "call", "said"),
    [
        ("llama", lambda m: m.logits(padded((65,), 65)), "65 tokens do not fit the context of 64"),
        ("roberta", lambda m: m.logits(padded((65,), 65)), "65 tokens do not fit the context of 64"),
        ("llama", lambda m: m.generate(padded((14,)), max_new_tokens=51), "14 tokens and 51 new ones do not fit"),
        ("llama", lambda m: m.generate(padded((14,)), max_new_tokens=-1), "max_new_tokens=-1"),
        ("llama", lambda m: m.generate(padded((0, 4)), max_new_tokens=1), "without tokens"),
        ("bert", lambda m: m.generate(padded((4,)), max_new_tokens=1), "masked language model"),
    ],
)
def test_what_cannot_run_is_one_line(architecture: str, call: Any, said: str) -> None:
    with pytest.raises(LoceditError, match=said) as caught:
        call(cached(architecture))
    assert "\n" not in str(caught.value)


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    batch = SimpleNamespace(ids=torch.tensor([[5, 320]]), attention_mask=torch.ones(1, 2))
    with pytest.raises(LoceditError, match="token 320 is outside the vocabulary of 320"):
        cached("gpt2").logits(batch)


def test_padding_on_the_left_is_refused() -> None:
    batch = padded((3, 14))
    left = SimpleNamespace(ids=batch.ids.flip(1), attention_mask=batch.attention_mask.flip(1))
    with pytest.raises(LoceditError, match="padded on the left"):
        cached("gpt2").logits(left)


@by_architecture
def test_the_longest_prompt_that_fits_runs(architecture: str) -> None:
    model = cached(architecture)
    assert model.max_length == tiny.CONTEXT
    with torch.no_grad():
        assert model.logits(padded((64,), 64)).isfinite().all()


def test_properties_of_a_grouped_query_model() -> None:
    model = cached("llama")
    numbers = (model.n_layers, model.n_heads, model.n_kv_heads, model.d_head, model.d_model, model.d_mlp)
    assert numbers == (3, 4, 2, 16, 48, 80)
    assert (model.gated, model.parallel, model.causal, model.vocab_size) == (True, False, True, 320)
    assert (cached("gptj").parallel, cached("phi").gated, cached("phi3").gated) == (True, False, True)
    assert (cached("bert").causal, cached("gpt2").d_mlp) == (False, 192)
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)


# --- loading ---------------------------------------------------------------------------------------------------------


@by_architecture
def test_a_saved_folder_loads_as_the_same_model(architecture: str, tmp_path: Path) -> None:
    built = cached(architecture)
    built.module.save_pretrained(tmp_path / "m")
    tiny.tokenizer().save_pretrained(tmp_path / "m")
    model = load(tmp_path / "m", device="cpu")
    assert type(model.module) is type(built.module)
    assert model.fingerprint == built.fingerprint
    with torch.no_grad():
        torch.testing.assert_close(model.logits(padded((14, 9))), built.logits(padded((14, 9))), rtol=0, atol=1e-5)
    assert model.tokenizer("Anna Berg").input_ids == tiny.tokenizer()("Anna Berg").input_ids


def test_the_checkpoints_dtype_is_kept_and_another_can_be_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "half"
    tiny.module("llama").bfloat16().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    assert load(folder, device="cpu").dtype == torch.bfloat16
    assert load(str(folder), dtype="float32", device="cpu").dtype == torch.float32
    assert load(folder, device_map="cpu").dtype == torch.bfloat16
    with pytest.raises(LoceditError, match=r"dtype='float31': choices: auto, float32"):
        load(folder, dtype="float31")


def test_the_path_never_tells_the_architecture(tmp_path: Path) -> None:
    folder = tmp_path / "gpt2-bert-pythia"
    shutil.move(saved(tmp_path, "gemma2"), folder)
    assert type(load(folder).module).__name__ == "Gemma2ForCausalLM"


def test_masked_models_load_as_masked_models_without_being_told(tmp_path: Path) -> None:
    folder = saved(tmp_path, "bert")
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = None
    (folder / "config.json").write_text(json.dumps(config))
    assert not load(folder).causal


def test_a_built_module_stays_the_users_own() -> None:
    module = tiny.module("gpt2").train()
    module.transformer.h[0].requires_grad_(False)
    model = load(module, tokenizer=tiny.tokenizer())
    assert model.module is module
    assert not module.training
    assert not module.transformer.h[0].mlp.c_fc.weight.requires_grad


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _cut_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def _missing_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _nan(folder: Path) -> None:
    module = tiny.module("llama")
    module.model.layers[2].mlp.down_proj.weight.data[3, 4] = float("nan")
    module.save_pretrained(folder)


def _infinite(folder: Path) -> None:
    module = tiny.module("llama")
    module.model.norm.weight.data[7] = -float("inf")
    module.save_pretrained(folder)


def _other_architecture(folder: Path) -> None:
    change_config(folder, model_type="t5", architectures=["T5ForConditionalGeneration"])


def _unknown_type(folder: Path) -> None:
    change_config(folder, model_type="zebra", architectures=["ZebraForCausalLM"])


def _other_shape(folder: Path) -> None:
    change_config(folder, intermediate_size=96)


def _no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def _only_an_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (_no_config, "not a model folder: it has no config.json .found: .*model.safetensors"),
        (_broken_config, "config.json"),
        (_no_weights, "cannot read the weights of"),
        (_cut_weights, "cannot read the weights of"),
        (_missing_weight, "lacks 1 weights of LlamaForCausalLM, first 'model.layers.1.mlp.up_proj.weight'"),
        (_nan, "'model.layers.2.mlp.down_proj.weight' holds NaN or infinite"),
        (_infinite, "'model.norm.weight' holds NaN or infinite"),
        (_other_architecture, "'T5ForConditionalGeneration' is not supported; supported: GPT2LMHeadModel"),
        (_unknown_type, "zebra"),
        (
            _other_shape,
            r"9 weights of other shapes .* first 'model.layers.0.mlp.down_proj.weight': .48, 80. instead of",
        ),
        (_no_tokenizer, "no fast tokenizer in .* needs a tokenizer.json"),
        (_only_an_adapter, "holds a PEFT adapter, not a model"),
    ],
)
def test_a_broken_folder_is_one_clear_line(harm: Any, said: str, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    assert load(folder, device="cpu").causal
    harm(folder)
    with pytest.raises(LoceditError, match=said) as caught:
        load(folder, device="cpu")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("path", ["./absent", "/absent/model", "~/absent-model", "runs/a/b", Path("absent")])
def test_what_looks_like_a_path_is_not_sent_to_the_hub(path: str | Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(LoceditError, match="does not exist"):
        load(path)


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing"])
def test_a_hub_id_that_cannot_be_reached_is_one_line(name: str) -> None:
    said = f"model '{name}': there is no such folder, and no answer from the Hugging Face hub: "
    with pytest.raises(LoceditError, match=said) as caught:
        load(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["AutoConfig", "AutoTokenizer"])
def test_retries_of_the_hub_are_not_shown(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client warned of each of its tries, twelve lines for a mistyped folder without a network."""
    hub, shown = logging.getLogger("huggingface_hub.utils._http"), list[bool]()

    def unreachable(*_: Any, **__: Any) -> None:
        shown.append(hub.isEnabledFor(logging.WARNING))
        raise OSError("We couldn't connect to the hub\nCheck your internet connection")

    folder = saved(tmp_path)
    monkeypatch.setattr(f"transformers.{kind}.from_pretrained", unreachable)
    before = hub.isEnabledFor(logging.WARNING)
    with pytest.raises(LoceditError):
        load("nothing" if kind == "AutoConfig" else folder, tokenizer="nothing", device="cpu")
    assert shown == [False]
    assert hub.isEnabledFor(logging.WARNING) == before


def test_modules_that_are_no_language_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LoceditError, match="Linear is not a Hugging Face language model"):
        load(torch.nn.Linear(2, 2), tokenizer=tiny.tokenizer())
    with pytest.raises(LoceditError, match="'LlamaModel' with .*layers.* is not supported"):
        load(tiny.module("llama").model, tokenizer=tiny.tokenizer())
    with pytest.raises(LoceditError, match="needs its tokenizer"):
        load(tiny.module("llama"))
    with pytest.raises(LoceditError, match="is a file"):
        (tmp_path / "model.bin").write_bytes(b"")
        load(tmp_path / "model.bin")
    with pytest.raises(LoceditError, match="device='warp:1' cannot be used"):
        load(tiny.module("llama"), tokenizer=tiny.tokenizer(), device="warp:1")


# --- fingerprints ----------------------------------------------------------------------------------------------------


def test_the_fingerprint_follows_the_weights_bit_by_bit() -> None:
    model = tiny.model("gpt2")
    first = model.fingerprint
    weight = model.parameter("transformer.h.0.mlp.c_fc.weight")
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
        changed = model.fingerprint
        assert changed != first
        assert changed == fingerprint_of(model.module)
        weight.copy_(kept)
    assert model.fingerprint == first == tiny.model("gpt2").fingerprint
    assert tiny.model("gpt2", seed=1).fingerprint != first
    weight.data.add_(1.0)  # .data does not count as a change in torch
    assert model.fingerprint != first


def test_an_unchanged_folder_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path)
    first = load(folder, device="cpu").fingerprint
    hashed: list[Tensor] = []
    original = fingerprints.digest
    monkeypatch.setattr(fingerprints, "digest", lambda tensor: hashed.append(tensor) or original(tensor))
    assert load(folder, device="cpu").fingerprint == first
    assert hashed == []
    assert load(folder, dtype="bfloat16", device="cpu").fingerprint != first
    hashed.clear()

    changed = load(folder, device="cpu")
    with torch.no_grad():
        changed.parameter("model.norm.weight").mul_(2.0)
    assert changed.fingerprint == fingerprint_of(changed.module) != first
    hashed.clear()
    assert load(folder, device="cpu").fingerprint == first
    assert hashed == []

    tiny.module("llama", seed=3).save_pretrained(folder)
    assert load(folder, device="cpu").fingerprint == tiny.model("llama", seed=3).fingerprint != first


def test_layers_on_disk_run_and_have_the_same_fingerprint(tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = load(saved(tmp_path), device_map=places)
    assert model.linear(1, "mlp.out").weight.is_meta
    whole = cached("llama")
    for _ in range(2):  # a forward pass makes new parameter objects of what is on disk
        with torch.no_grad():
            torch.testing.assert_close(model.logits(padded((14, 9))), whole.logits(padded((14, 9))), rtol=0, atol=1e-5)
        assert model.sites("neuron") == whole.sites("neuron")
        assert model.fingerprint == whole.fingerprint


def test_an_adapter_counts_as_weights() -> None:
    module = peft.get_peft_model(tiny.module("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model = load(module, tokenizer=tiny.tokenizer())
    first = model.fingerprint
    assert first != tiny.model("llama").fingerprint
    with torch.no_grad():
        next(p for n, p in module.named_parameters() if "lora_B" in n).fill_(0.1)
    assert model.fingerprint != first


# --- the bridge ------------------------------------------------------------------------------------------------------


def state(model: Model) -> dict[str, Any]:
    """Everything that a bridge could leave behind."""
    module = model.module
    return {
        "names": [name for name, _ in module.named_modules()],
        "modules": [id(m) for m in module.modules()],
        "parameters": {n: (id(p), p.requires_grad, p.grad is None) for n, p in module.named_parameters()},
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()),
        "attributes": [sorted(m.__dict__) for m in module.modules()],
        "config": {k: v for k, v in module.config.__dict__.items() if isinstance(v, str | int | float | bool | None)},
        "attention": module.config._attn_implementation,
    }


@by_architecture
def test_the_bridge_restores_the_model_bit_for_bit(architecture: str, tmp_path: Path) -> None:
    model = tiny.model(architecture)
    bits = {n: t.clone() for n, t in model.module.state_dict().items()}
    before, random_state = state(model), torch.get_rng_state()
    batch = padded((14, 14))
    with torch.no_grad():
        logits = model.logits(batch)
        with model.bridged() as bridge:
            by_bridge = bridge(batch.ids, return_type="logits")
            _, cache = bridge.run_with_cache(batch.ids)
            assert cache["blocks.1.attn.hook_pattern"].shape == (2, 4, 14, 14)
            assert bridge.tokenizer is model.tokenizer
        torch.testing.assert_close(by_bridge, logits, rtol=0, atol=1e-4)
        assert torch.equal(model.logits(batch), logits)
    assert state(model) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    after = model.module.state_dict()
    assert list(after) == list(bits)
    assert all(torch.equal(after[name], tensor) for name, tensor in bits.items())
    model.module.save_pretrained(tmp_path)
    again = type(model.module).from_pretrained(tmp_path)
    assert fingerprint_of(again) == model.fingerprint


def test_the_bridge_restores_after_an_exception_and_takes_back_gradients() -> None:
    model = tiny.model("gpt_neox")
    before = state(model)
    with pytest.raises(ZeroDivisionError), model.bridged() as bridge:
        bridge(tiny.ids(), return_type="logits").sum().backward()
        raise ZeroDivisionError
    assert state(model) == before


def test_what_transformer_lens_cannot_bridge_is_one_line() -> None:
    model = tiny.model("gpt_neox", attention_bias=False)
    before = state(model)
    with pytest.raises(LoceditError, match="cannot bridge this GPTNeoXForCausalLM"), model.bridged():
        raise AssertionError
    assert state(model) == before


def test_changing_weights_inside_the_bridge_is_an_error() -> None:
    model = tiny.model("llama")
    with pytest.raises(LoceditError, match="'model.norm.weight' was changed"), model.bridged():
        model.parameter("model.norm.weight").data[5] = 1.25


def test_importing_transformer_lens_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loader sets the transformers logger to ERROR and adds a warning filter when it is imported."""
    module = importlib.import_module("transformer_lens.model_bridge.sources.transformers.source")
    monkeypatch.setattr(logging.getLogger("transformers"), "level", logging.INFO)
    filters = list(warnings.filters)
    with _quiet_import():
        importlib.reload(module)
        assert logging.getLogger("transformers").level == logging.ERROR
        assert list(warnings.filters) != filters
    assert logging.getLogger("transformers").level == logging.INFO
    assert list(warnings.filters) == filters


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "phi3"])
def test_reading_the_anatomy_draws_no_random_numbers(architecture: str) -> None:
    """Splitting fused matrices makes layers, which start from random weights."""
    before = torch.get_rng_state()
    assert tiny.model(architecture).n_layers == 3
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_wrapped_by_peft_is_bridged_with_its_adapter() -> None:
    module = peft.get_peft_model(tiny.module("llama"), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model = load(module, tokenizer=tiny.tokenizer())
    batch = padded((14, 14))
    with torch.no_grad():
        logits = model.logits(batch)
        with model.bridged() as bridge:
            torch.testing.assert_close(bridge(batch.ids, return_type="logits"), logits, rtol=0, atol=1e-4)
        assert torch.equal(model.logits(batch), logits)
    assert not torch.allclose(logits, cached("llama").logits(batch), atol=0.1)
