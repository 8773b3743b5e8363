"""`kv-gym push`: what is pushed is what its id names, with a card; a folder stands in for the Hub."""

import json
import shutil

import pytest
import torch
from live_models import tiny

from kv_gym import open_traces, push_to_hub
from kv_gym.errors import UserError
from kv_gym.files import bundled
from kv_gym.fit import load_fit
from kv_gym.models.fingerprint import Fingerprint
from kv_gym.policies.scorer import GroupedScorer, Scorer


@pytest.fixture
def model():
    return tiny().float()


@pytest.fixture
def fit(tmp_path, model):
    """The folder of a finished fit, with a policy that was not really trained."""
    folder = tmp_path / "fit"
    fingerprint = Fingerprint.of(model)
    scorer = Scorer(GroupedScorer(len(fingerprint.layers) * 2, 8, hidden=4), fingerprint, (4, 64))
    scorer.save_pretrained(folder / "policy")
    state = {"format": 1, "finished": True, "settings": {}, "seconds": {}, "budget": 0.5, "allocation": "uniform"}
    (folder / "fit.json").write_text(json.dumps(state))
    (folder / "README.md").write_text('# A fit\n\n| a | table |\n|---|---|\n\nload_fit(model, "this-folder")\n')
    (folder / "traces").mkdir()
    (folder / "traces" / "secret.h5").write_text("not to be published")
    return folder


def test_a_fit_is_a_model_with_its_tables(hub, fit, model):
    assert push_to_hub(fit, "ann/fit") == "https://hub.example/ann/fit"
    names = sorted(file.relative_to(hub / "ann/fit").as_posix() for file in (hub / "ann/fit").rglob("*.*"))
    assert names == ["README.md", "fit.json", "policy/README.md", "policy/policy.json", "policy/policy.safetensors"]
    card = (hub / "ann/fit/README.md").read_text()
    assert card.startswith("---\nlibrary_name: kv_gym\n") and "| a | table |" in card and '"ann/fit"' in card
    shutil.rmtree(fit)
    with load_fit(model, "ann/fit@main") as cache, torch.no_grad():
        model(torch.arange(20)[None], past_key_values=cache)
        assert cache.kept().unique().tolist() == [10]
    with pytest.raises(UserError, match=r"no folder ann/fat, and no fit of that name.*404"):
        load_fit(model, "ann/fat")


def test_traces_are_a_dataset(hub):
    assert push_to_hub(bundled("traces"), "ann/sample") == "https://hub.example/datasets/ann/sample"
    card = (hub / "datasets/ann/sample/README.md").read_text()
    assert 'open_traces("ann/sample")' in card and "| sequences |" in card
    mine = open_traces("ann/sample")
    assert mine.hash == open_traces().hash and len(mine) == len(open_traces())
    with pytest.raises(UserError, match=r"no traces at ann/other, and no dataset of that name.*404.*kv-gym record"):
        open_traces("ann/other")
    with pytest.raises(UserError, match=r"holds no manifest\.json; expected traces that `kv-gym push` wrote"):
        (hub / "datasets/ann/empty").mkdir()
        open_traces("ann/empty")


def test_results_are_a_dataset_of_rows(hub, tmp_path, report_rows):
    (tmp_path / "live.json").write_text(json.dumps({"rows": report_rows}))
    push_to_hub(tmp_path / "live.json", "ann/results", private=True)
    lines = (hub / "datasets/ann/results/rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["policy"] for line in lines] == [row["policy"] for row in report_rows]
    assert "| " in (hub / "datasets/ann/results/README.md").read_text()


@pytest.fixture
def report_rows():
    from kv_gym import evaluate

    return evaluate(["recency"], [0.5], traces=open_traces(), split="all", progress=False)["rows"]


def test_what_cannot_be_pushed(hub, tmp_path, fit, monkeypatch):
    for path, repo_id, message in (
        (fit, "ann/fit@v2", "'ann/fit@v2' is no id of the Hub; expected owner/name"),
        (tmp_path / "nowhere", "ann/fit", "there is nothing at .*nowhere"),
        (fit / "traces", "ann/fit", "holds no policy.json, fit.json, manifest.json or rows of results"),
    ):
        with pytest.raises(UserError, match=message):
            push_to_hub(path, repo_id)
    (fit / "fit.json").write_text('{"format": 1, "finished": false, "settings": {}, "seconds": {}}')
    with pytest.raises(UserError, match="is not finished"):
        push_to_hub(fit, "ann/fit")
    assert not hub.exists()
    monkeypatch.undo()  # the real huggingface_hub, offline
    with pytest.raises(UserError, match=r"the traces could not be pushed to ann/sample \(OfflineModeIsEnabled"):
        push_to_hub(bundled("traces"), "ann/sample")
