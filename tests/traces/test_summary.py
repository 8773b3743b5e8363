"""Looking at traces, and recording a real pretrained model on real text."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from rich.console import Console
from traced_models import some_prompt, tiny_model
from typer.testing import CliRunner

from kv_gym.cli import app
from kv_gym.errors import UserError
from kv_gym.models import load_model
from kv_gym.traces import (
    Prompt,
    info,
    open_traces,
    prompts_from_text,
    record,
    show,
    validate,
)
from kv_gym.traces.safe_hdf5 import set_text
from kv_gym.traces.summary import FIT, SMALLEST, attention_figure, draw_attention

DATA = Path(__file__).parents[3] / "shared" / "data"
STORIES, NOVEL = DATA / "models" / "stories260K", DATA / "corpora" / "novels" / "Kipling_Kim_1901.txt"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    out = tmp_path_factory.mktemp("traces") / "set"
    prompts = [some_prompt((5, 18), "p0", context=24), Prompt("p1", [1, 2, 3], [], split="test")]
    record(tiny_model(), prompts, out, window=4, progress=False)
    return out


def text_of(renderable):
    console = Console(width=200)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_info_is_plain_data(recorded):
    told = info(recorded)
    assert json.loads(json.dumps(told)) == told
    assert told["sequences"] == 2
    assert (told["tokens"], told["longest"], told["continuations"]) == (27, 24, 2)
    assert told["splits"] == {"train": 1, "test": 1}
    assert told["tasks"] == {"noise": 1, "": 1}
    assert (told["kv_heads"], told["query_heads"], told["head_dim"], told["layers"]) == (2, 4, 8, [0, 1, 2])
    assert told["hash"] == open_traces(recorded).hash
    assert told["bytes"] == sum(path.stat().st_size for path in recorded.glob("*.h5"))


def test_validate_counts_what_it_read(recorded):
    told = validate(recorded)
    # p0: tokens, keys, values, queries, mass and two continuations of two arrays; p1 has no continuation
    assert (told["sequences"], told["arrays"], told["duplicates"]) == (2, 9 + 5, 0)


@pytest.mark.parametrize("change", ["id", "manifest"])
def test_validate_finds_another_id_and_another_manifest(recorded, tmp_path, change):
    folder = tmp_path / "set"
    shutil.copytree(recorded, folder)
    for path in [*folder.glob("*.h5")]:
        with h5py.File(path, "r+") as file:
            if change == "id":
                for name in [*file["sequences"]]:
                    file["sequences"].move(name, f"other-{name}")
            else:
                other = json.loads(file.attrs["manifest"]) | {"recipe": {"source": "elsewhere"}}
                set_text(file, manifest=json.dumps(other))
                (folder / "manifest.json").write_text(json.dumps(other))
    assert len(open_traces(folder)) == 2
    with pytest.raises(UserError, match="under another id or with another manifest"):
        validate(folder)


def test_validate_counts_copies_of_files(recorded, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(recorded, folder)
    for path in [*folder.glob("*.h5")]:
        shutil.copyfile(path, path.with_name(f"copy-of-{path.name}"))
    assert validate(folder)["duplicates"] == len(open_traces(folder)) == 2


def test_show_keeps_the_tokens_that_the_future_uses_most(recorded):
    sequence = open_traces(recorded)[0]
    best = sequence.utility("max")[2, 1].argsort()[::-1][:3]
    shown = text_of(show(recorded, "p0", layer=2, head=1, budgets=(3,)))
    assert "p0 (noise, train): 24 tokens, continuations: 2; layer 2, KV head 1" in shown
    assert "what the oracle keeps there" in shown.splitlines()[1]
    words = [word for word in shown.splitlines()[-1].split() if word != "·"]
    assert words == [str(sequence.tokens[i]) for i in sorted(best)]
    share = sequence.utility("max")[2, 1][best].sum() / sequence.utility("max")[2, 1].sum()
    assert f"utility kept {share:.3f}" in shown
    assert "budget 1/4" in text_of(show(recorded, 0))


def test_show_refuses_what_is_not_there(recorded):
    for arguments, reason in [
        (("p9",), "no sequence 'p9'"),
        (("2",), "no sequence '2'"),
        (("²",), "no sequence '²'"),
        (("9" * 5000,), "no sequence '99"),
        ((1,), "without continuations"),
        ((0, 3), "no layer 3"),
        ((0, 0, 2), "head 2"),
    ]:
        with pytest.raises(UserError, match=reason):
            show(recorded, *arguments)


def test_heat_maps_hold_the_recorded_attention(recorded):
    sequence = open_traces(recorded)[0]
    words = [f"w{i}" for i in range(24)]
    bars, heads, blocks = attention_figure(sequence, words).axes[:3]
    # a row per layer and head: the maximum over query heads, mean over queries, then over continuations
    for layer in range(3):
        for head in range(2):
            for token in range(24):
                shares = [c.future[layer, head, token, :, 0].sum() / len(c.tokens) for c in sequence.continuations]
                drawn = heads.images[0].get_array()[2 * layer + head, token]
                assert drawn == pytest.approx(max(SMALLEST, sum(shares) / 2), rel=1e-5)
    row = 0
    for c in sequence.continuations:
        for block, queries in enumerate(c.block_queries):
            for token in range(24):
                mean = sum(c.future[layer, head, token, block, 1] for layer in range(3) for head in range(2)) / 6
                drawn = blocks.images[0].get_array()[row, token]
                assert drawn == pytest.approx(max(SMALLEST, mean / queries), rel=1e-5)
            row += 1
    assert row == len(blocks.images[0].get_array())
    heights = [bar.get_height() for bar in bars.patches]
    np.testing.assert_allclose(heights, sequence.utility("max").mean((0, 1)), rtol=1e-6)
    assert [label.get_text() for label in blocks.get_xticklabels()] == words
    assert [label.get_text() for label in heads.get_yticklabels()] == ["0", "1", "2"]


def test_of_many_tokens_those_with_most_attention_are_named(recorded):
    sequence = open_traces(recorded)[0]
    many = 20 * FIT
    wide = lambda array, axis: np.repeat(array, -(-many // 24), axis)[(slice(None),) * axis + (slice(many),)]  # noqa: E731
    continuations = tuple(replace(c, future=wide(c.future, 2)) for c in sequence.continuations)
    longer = replace(
        sequence, tokens=wide(sequence.tokens, 0), keys=wide(sequence.keys, 2), values=wide(sequence.values, 2),
        continuations=continuations,
    )  # fmt: skip
    blocks = attention_figure(longer, [str(i) for i in range(many)]).axes[2]
    named = [int(label.get_text()) for label in blocks.get_xticklabels()]
    assert named == sorted(named) and min(np.diff(named)) >= 20
    worth = longer.utility("max").mean((0, 1))
    assert int(worth.argmax()) in named and f"({len(named)} of {many} are named" in blocks.get_xlabel()


def test_show_draws_a_picture(recorded, tmp_path):
    done = CliRunner().invoke(app, ["trace", "show", str(recorded), "--out", str(tmp_path / "new" / "p0.png")])
    assert done.exit_code == 0 and "picture of all layers and heads" in done.output
    assert (tmp_path / "new" / "p0.png").read_bytes()[:4] == b"\x89PNG"
    traces = open_traces(recorded)
    for number, out, reason in [
        (0, tmp_path / "p0.svg", "ends in .png"),
        (0, tmp_path / "new" / "p0.png" / "p0.png", "cannot make folder"),
        (1, tmp_path / "p1.png", "without continuations"),
    ]:
        with pytest.raises(UserError, match=reason):
            draw_attention(traces[number], ["$"] * len(traces[number].tokens), out)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert draw_attention(traces[0], ["$^{", "\n", "a" * 99] * 8, tmp_path / "odd.png").stat().st_size > 1000


@pytest.mark.skipif(not (STORIES.is_dir() and NOVEL.is_file()), reason=f"no pretrained model and novel under {DATA}")
def test_a_real_model_on_a_real_novel(tmp_path):
    model, tokenizer = load_model(STORIES, device="cpu")
    prompts = list(prompts_from_text(NOVEL, tokenizer, 192, 48, count=2))
    assert tokenizer.decode(prompts[0].context_ids).startswith("<s>")
    traces = record(model, prompts, tmp_path / "set", tokenizer=tokenizer, progress=False)
    assert validate(tmp_path / "set")["sequences"] == 2
    sequence = traces[1]
    assert (sequence.keys.shape, sequence.continuations[0].future.shape) == ((5, 4, 192, 8), (5, 4, 192, 3, 2))
    # each query spends 1 in all, over context and continuation
    assert (sequence.utility("mean").sum(-1) < 1).all()

    model.set_attn_implementation("eager")
    with torch.no_grad():
        ids = torch.tensor([prompts[1].context_ids + prompts[1].continuation_ids[0]])
        weights = torch.stack(model(ids, output_attentions=True).attentions)[:, 0, :, 192:, :192]
    expected = weights.unflatten(1, (4, 2)).amax(2).mean(2)
    np.testing.assert_allclose(sequence.utility("max"), expected, atol=1e-6)
    shown = text_of(show(tmp_path / "set", 1, tokenizer=tokenizer))
    assert "budget 1/8" in shown
    assert "▁" in shown
