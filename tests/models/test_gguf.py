"""Models in GGUF files: loaded as from a folder, or refused in one sentence before their weights are read."""

import numpy as np
import pytest
import torch
from traced_models import tiny_model

from kv_gym.errors import UserError
from kv_gym.models import Fingerprint, load_model, loading

gguf = pytest.importorskip("gguf")
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_gguf(model, file, architecture="llama", **fields):
    """A Llama model as llama.cpp writes it: rows of the query and key projections in its rotary order."""
    config, weights = model.config, {name: w.float().numpy() for name, w in model.state_dict().items()}
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    for name, value in fields.items():
        writer.add_uint16(name.replace("_", "."), value)
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    for i in range(config.num_hidden_layers):
        names |= {f"blk.{i}.{short}": f"model.layers.{i}.{name}" for short, name in BLOCK.items()}
    for short, name in names.items():
        tensor = weights[f"{name}.weight"]
        if short.endswith(("attn_q", "attn_k")):
            tensor = tensor.reshape(-1, 2, config.head_dim // 2, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"{short}.weight", np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", tie_word_embeddings=False)


@pytest.mark.parametrize("named", ["file", "folder"])
def test_a_gguf_file_is_the_model_that_it_was_made_of(model, tmp_path, named, capfd):
    file = write_gguf(model, tmp_path / "tiny.gguf")
    loaded, tokenizer = load_model(file if named == "file" else tmp_path, dtype="float32")
    assert tokenizer is None and not capfd.readouterr().err
    assert Fingerprint.of(loaded) == Fingerprint.of(model)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_a_gguf_file_that_cannot_be_loaded_is_refused_by_its_header(model, tmp_path, monkeypatch):
    write_gguf(model, tmp_path / "seen.gguf", "clip")
    with pytest.raises(UserError, match=r"^cannot load model .*: GGUF model with architecture clip is not supported"):
        load_model(tmp_path)
    write_gguf(model, tmp_path / "part.gguf", split_count=3)
    with pytest.raises(
        UserError, match=r"holds 2 GGUF files and no config.json; name one of them, such as .*part.gguf"
    ):
        load_model(tmp_path)
    with pytest.raises(UserError, match="is one of 3 parts of a model; join them"):
        load_model(tmp_path / "part.gguf")
    whole = (tmp_path / "seen.gguf").read_bytes()
    for content in (b"version https://git-lfs", b"", whole[:40], whole[:400], b"GGUF" + b"\xff" * 40):
        (tmp_path / "bad.gguf").write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.gguf is damaged or no GGUF file"):
            load_model(tmp_path / "bad.gguf")
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"reading .*seen\.gguf needs the extra gguf: pip install 'kv-gym\[gguf\]'"):
        load_model(tmp_path / "seen.gguf")
