"""The bundled model: small, offline, and right about what it has read."""

import json

import pytest
import torch

from kv_gym.files import MODEL

pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason="the reference model is not in this checkout")


def test_it_is_small_and_in_bfloat16():
    from safetensors import safe_open

    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= 8 * 2**20
    with safe_open(MODEL / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    assert json.loads((MODEL / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_plain_transformers_load_and_ask_it(monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)
    text = "the lamp was old . code Alice 4 7 . Bob sold the boat . size Alice 81 5 . question code Alice"
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    said = model.float().generate(**inputs, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(said[0, -2:]) == "4 7"


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [512, 1024])
@pytest.mark.parametrize("task", ["single", "multi_key"])
def test_it_recalls_what_held_out_contexts_say(task, tokens):
    from kv_gym.evaluation.configurations import full_cache
    from kv_gym.evaluation.measure import measure
    from kv_gym.evaluation.tasks import parse_tasks
    from kv_gym.models import load_model

    with torch.no_grad():
        row = measure(load_model(MODEL)[0], parse_tasks(f"{task}:{tokens}:unseen"), [full_cache()])[0]
    assert row["questions"] == 512 and row["accuracy"] >= 0.98
