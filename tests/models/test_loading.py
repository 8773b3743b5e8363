"""Loading models and tokenizers: what cannot be used is refused in one sentence, and no code of a model is run."""

import ast
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from traced_models import some_prompt, tiny_model

import kv_gym
from kv_gym.errors import UserError
from kv_gym.files import MODEL
from kv_gym.models import load_model
from kv_gym.models.loading import recorded_tokenizer, token_rows, tokenizer_hash
from kv_gym.traces import record_sequence

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"


@pytest.fixture
def folder(tmp_path):
    """A copy of the reference model."""
    shutil.copytree(MODEL, tmp_path / "model")
    return tmp_path / "model"


def change(file: Path, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_models_that_cannot_be_found_or_used(tmp_path):
    for place, reason in [
        (tmp_path / "missing", "no model folder"),
        (tmp_path, "holds no config.json"),
        ("./missing", "no model folder"),
        ("nobody/no-such-model", "cannot load model nobody/no-such-model"),
    ]:
        with pytest.raises(UserError, match=reason):
            load_model(place)
    with pytest.raises(UserError, match="dtype 'int8'"):
        load_model(MODEL, dtype="int8")
    with pytest.raises(UserError, match="device 'toaster'"):
        load_model(MODEL, device="toaster")


def test_a_saved_model_records_the_same(tmp_path):
    model = tiny_model()
    for parameter in model.parameters():  # `model.bfloat16()` would round the rotary frequencies as well
        parameter.data = parameter.data.bfloat16()
    model.save_pretrained(tmp_path / "tiny")
    loaded, tokenizer = load_model(tmp_path / "tiny", device="cpu")
    assert tokenizer is None
    assert loaded.dtype == torch.float32, "float32 on a CPU, whatever the checkpoint holds"
    prompt = some_prompt((6,), context=24)
    np.testing.assert_array_equal(record_sequence(loaded, prompt).keys, record_sequence(model.float(), prompt).keys)


def test_a_configuration_of_a_far_larger_model_is_refused_before_memory_is_taken(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 10**9}))
    with pytest.raises(UserError, match=r"config\.json describes \d+ parameters, and the files of weights hold"):
        load_model(folder, device="cpu")
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2**31, "layer_types": None}))
    with pytest.raises(UserError, match=r"config\.json describes 2147483648 layers"):
        load_model(folder, device="cpu")
    with pytest.raises(UserError, match="there is no model folder x/x/"):
        load_model("x/" * 3000)  # longer than any path


def test_missing_weights_are_refused_by_name(folder, capfd):
    change(folder / "config.json", tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"comes without the weights lm_head\.weight, which would be random numbers"):
        load_model(folder)
    change(folder / "config.json", tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    save_file({name: w for name, w in weights.items() if "layers.3." not in name}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"without the weights model\.layers\.3\.\S+, \S+, \S+ and 6 more, which"):
        load_model(folder)
    assert not capfd.readouterr().err, "the sentence says it all"


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("config.json", "{", "not a valid JSON file"),
        ("config.json", "[" * 10**5, "maximum recursion depth"),
        ("config.json", {"num_attention_heads": 5}, "192.* is not a multiple of the number of attention heads .5"),
        ("config.json", {"hidden_size": "x"}, "'hidden_size' expected int, got str"),
        ("model.safetensors", LFS_POINTER, "header too large"),
    ],
)
def test_files_that_cannot_be_read_are_refused_in_one_sentence(folder, file, content, reason):
    if isinstance(content, dict):
        change(folder / file, **content)
    else:
        (folder / file).write_text(content)
    with pytest.raises(UserError, match=rf"^cannot load model {folder}: .*{reason}.*$"):
        load_model(folder)


@pytest.mark.parametrize("content", [LFS_POINTER, '{"version": "9.0", "model": {"type": "Newer"}}'])
def test_a_tokenizer_that_cannot_be_read_is_not_taken_for_none(folder, content):
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=f"^the tokenizer of model {folder} cannot be read: .*; repair its files"):
        load_model(folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert load_model(folder)[1] is None


def test_code_that_comes_with_a_model_is_never_run_nor_asked_about(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run the code"))
    ran = tmp_path / "ran"
    (folder / "custom.py").write_text(f"open({str(ran)!r}, 'w')\n")
    change(folder / "tokenizer_config.json", tokenizer_class="T", auto_map={"AutoTokenizer": ["custom.T", None]})
    with pytest.raises(UserError, match="contains custom code"):
        load_model(folder)
    assert recorded_tokenizer(str(folder), "another hash") is None
    change(folder / "config.json", model_type="custom", auto_map={"AutoConfig": "custom.C"})
    with pytest.raises(UserError, match="contains custom code"):
        load_model(folder)
    assert not ran.exists()


def test_every_loader_of_transformers_is_told_to_run_no_code():
    asked = 0
    for file in Path(kv_gym.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("Auto"):
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert keywords.get("trust_remote_code") == "False", f"{file}, line {node.lineno}"
                asked += 1
    assert asked >= 4


def test_a_path_that_a_trace_set_names_is_never_opened(folder, tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    opened = []
    load = AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained", lambda name, **options: (opened.append(name), load(name, **options))[1]
    )
    known = tokenizer_hash(load(MODEL))
    assert tokenizer_hash(recorded_tokenizer(str(folder), known)) == known and opened == [MODEL]
    opened.clear()
    monkeypatch.chdir(tmp_path)
    for name in (str(folder), "model", "./model", "../x", "a/b/c", "", "model/../model"):
        assert recorded_tokenizer(name, "another hash") is None
    assert set(opened) == {MODEL}
    assert recorded_tokenizer("nobody/no-such-model", "another hash") is None and opened[-1] == "nobody/no-such-model"


def test_token_ids_outside_of_the_vocabulary_are_refused():
    model = tiny_model()
    vocabulary = model.config.vocab_size
    assert token_rows(model, [[0, vocabulary - 1]]).tolist() == [[0, vocabulary - 1]]
    for wrong in (-1, vocabulary):
        with pytest.raises(UserError, match=f"token id {wrong} and the model knows ids below {vocabulary}"):
            token_rows(model, [[0, wrong]])
