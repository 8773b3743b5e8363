"""Models in wrappers: PEFT, quantised, offloaded and compiled ones are served as the transformers model inside."""

import copy

import pytest
import torch
from live_models import tiny, tokens

from kv_gym import EvictingCache
from kv_gym.errors import UserError
from kv_gym.models.fingerprint import Fingerprint
from kv_gym.models.loading import load_model
from kv_gym.models.wrapped_model import transformers_model
from kv_gym.traces import Prompt, record_sequence

peft = pytest.importorskip("peft")
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def lora(model, scale=0.0, **settings):
    """A model with an adapter whose effect grows with `scale`; 0 changes nothing."""
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**LORA | settings)).eval()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(1)).mul_(scale)
    return adapted


@pytest.mark.parametrize(("policy", "allocation"), [("knorm", "global:softmax"), ("kvzip", "uniform")])
def test_generate_of_a_peft_model_evicts_as_the_model_inside(policy, allocation):
    model = tiny()
    padding = torch.tensor([[0] * 5 + [1] * 20, [1] * 25])
    kept, texts = [], []
    for caller in (model, lora(model)):
        with EvictingCache(caller, policy, 0.25, allocation=allocation) as cache:
            inputs = {"input_ids": tokens(2, 25), "attention_mask": padding}
            texts.append(caller.generate(**inputs, past_key_values=cache, max_new_tokens=3, do_sample=False))
            kept.append([cache.kept_positions(layer) for layer in cache.evicting_layers])
    assert torch.equal(*texts) and cache.kept().max() <= 11
    assert all(torch.equal(*pair) for pair in zip(*kept, strict=True))


def test_recording_through_a_wrapper():
    model, prompt = tiny(), Prompt("a", list(range(20)), [[5, 6, 7]])
    plain, wrapped = (record_sequence(each, prompt) for each in (model, lora(model)))
    assert (plain.keys == wrapped.keys).all() and (
        plain.continuations[0].future == wrapped.continuations[0].future
    ).all()


def test_other_wrappers_are_unwrapped():
    model = tiny()
    for wrapper in (torch.nn.DataParallel(model), torch.nn.Sequential(model), lora(model).base_model):
        assert type(transformers_model(wrapper)) is type(model)
    with pytest.raises(UserError, match="prefix-tuning adapter, which replaces the cache"):
        EvictingCache(peft.get_peft_model(tiny(), peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")))


def test_a_forward_past_the_hooks_is_refused():
    model = tiny()
    cache = EvictingCache(model, "knorm", 8)
    del model.model.forward
    with pytest.raises(UserError, match="past the hooks on LlamaModel"):
        model(tokens(1, 20), past_key_values=cache)


def test_one_fingerprint_with_and_without_a_wrapper():
    model = tiny().float()
    same, other = lora(model), lora(model, scale=1.0)
    assert Fingerprint.of(same) == Fingerprint.of(model) != Fingerprint.of(other)
    with other.disable_adapter():
        assert Fingerprint.of(other) == Fingerprint.of(model)
    changed = Fingerprint.of(other)
    assert Fingerprint.of(lora(model, 1.0, use_dora=True)) not in (changed, Fingerprint.of(model))
    other.merge_adapter()
    assert Fingerprint.of(other) == changed
    other.unmerge_adapter()
    assert Fingerprint.of(other.merge_and_unload()) == changed
    trained = lora(model, modules_to_save=["lm_head"])
    assert Fingerprint.of(trained) == Fingerprint.of(model)
    trained.base_model.model.lm_head.modules_to_save["default"].weight.data.zero_()
    assert Fingerprint.of(trained) != Fingerprint.of(model)


def test_one_fingerprint_in_memory_and_on_a_disk(tmp_path):
    from accelerate import disk_offload

    model = tiny().float()
    expected = Fingerprint.of(model)
    disk_offload(model, tmp_path)
    assert Fingerprint.of(model) == expected
    with pytest.raises(UserError, match="has no values"):
        Fingerprint.of(tiny().to("meta"))


def test_a_folder_with_an_adapter_alone_is_the_adapted_model(tmp_path):
    model = tiny().float()
    model.save_pretrained(tmp_path / "base")
    adapted = lora(model, scale=1.0)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    loaded, tokenizer = load_model(tmp_path / "adapter", "cpu")
    assert type(loaded) is type(model) and tokenizer is None
    ids = tokens(1, 9)
    assert torch.allclose(loaded(ids).logits, adapted(ids).logits, atol=1e-5)
    assert not torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-2)
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no adapter_model\.safetensors: save the adapter"):
        load_model(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="names no model under base_model_name_or_path"):
        load_model(tmp_path / "adapter")
