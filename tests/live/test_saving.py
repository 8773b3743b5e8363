"""A saved cache goes on to the digit in another process; damaged, newer and foreign files are refused."""

import json
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from live_models import LIVE, feed, prefilled, tiny, tokens
from safetensors import safe_open
from safetensors.torch import save_file

from kv_gym import EvictingCache, make_policy
from kv_gym.checksums import described_tensors_hash
from kv_gym.errors import UserError
from kv_gym.live import PolicyGroup
from kv_gym.models.fingerprint import Fingerprint
from kv_gym.policies.scorer import GroupedScorer, Scorer

SETTINGS = {
    "equal": {"policy": "h2o", "budget": 0.5},
    "every": {"policy": "snapkv", "budget": 9, "trigger": "every:3", "sinks": 1, "recent": 2},
    "scores": {"policy": "knorm", "budget": 9, "trigger": "every:2"},
    "ragged": {"policy": "tova", "budget": 0.5, "allocation": "global", "trigger": "every:4"},
    "block": {"policy": "keydiff", "budget": 6, "trigger": "block:5"},
    "output": {"policy": "caote", "budget": 0.5, "trigger": "every:3"},
    "foreign": {"policy": "h2o", "budget": 1.0},
}
CONTINUE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from live_models import feed, tiny, tokens
from kv_gym import EvictingCache

out = {}
for family, file in json.loads(sys.argv[2]):
    model = tiny(family)
    with EvictingCache.load(file, model) as cache:
        logits = [feed(model, piece, cache) for piece in torch.split(tokens(2, 30, seed=5), [1, 1, 5, 1, 9, 13], 1)]
        cache.compress()
        logits.append(feed(model, tokens(2, 1, seed=6), cache))
        kept = [cache.kept_positions(layer).tolist() for layer in cache.evicting_layers]
    out[file] = [torch.cat(logits, 1).sum(-1).tolist(), torch.cat(logits, 1)[..., 0].tolist(), kept]
print(json.dumps(out))
"""


def begun(family, settings, padded):
    model = tiny(family)
    cache = EvictingCache(model, **settings)
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[0, : 6 * padded] = 0
    with torch.no_grad():
        model(tokens(2, 20), attention_mask=mask, past_key_values=cache)
    for step in range(3):
        feed(model, tokens(2, 1, seed=step), cache)
    return model, cache


@pytest.mark.slow
def test_a_fresh_process_continues_exactly(tmp_path):
    """Equal, ragged and padded slots, hybrid layers, evictions to come; nothing in what follows is another number."""
    cases = [("llama", name, 0) for name in SETTINGS] + [("llama", "every", 1), ("llama", "scores", 1)]
    cases += [("gemma3", "every", 0), ("gemma3", "ragged", 0), ("phi3", "foreign", 0)]
    asked, expected = [], {}
    for family, name, padded in cases:
        model, cache = begun(family, SETTINGS[name], padded)
        file = str(cache.save(tmp_path / f"{family}-{name}-{padded}.safetensors"))
        pieces = torch.split(tokens(2, 30, seed=5), [1, 1, 5, 1, 9, 13], 1)
        logits = [feed(model, piece, cache) for piece in pieces]
        cache.compress()
        logits = torch.cat([*logits, feed(model, tokens(2, 1, seed=6), cache)], 1)
        kept = [cache.kept_positions(layer).tolist() for layer in cache.evicting_layers]
        expected[file] = [logits.sum(-1).tolist(), logits[..., 0].tolist(), kept]
        asked.append((family, file))
    call = [sys.executable, "-c", CONTINUE, str(Path(__file__).parents[1] / "support"), json.dumps(asked)]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected


@pytest.mark.parametrize("name", LIVE)
def test_every_policy_can_be_saved(tmp_path, name):
    model = tiny()
    cache = prefilled(model, name, 10, n=24, batch=2, trigger="every:4")
    again = EvictingCache.load(cache.save(tmp_path / "a.safetensors"), model)
    assert again.config == cache.config
    assert (again.seen, again.nbytes()) == (cache.seen, cache.nbytes())
    for piece in torch.split(tokens(2, 9, seed=1), [1, 6, 2], 1):
        assert torch.equal(feed(model, piece, again), feed(model, piece, cache))
    for layer in range(3):
        assert torch.equal(again.kept_positions(layer), cache.kept_positions(layer))


def test_tokens_can_still_be_taken_back_and_forks_made(tmp_path):
    model = tiny()
    cache = prefilled(model, PolicyGroup((make_policy("h2o"), make_policy("snapkv"))), 1.0)
    again = EvictingCache.load(cache.save(tmp_path / "a.safetensors"), model)
    for policy in ("h2o", "snapkv"):
        with cache.fork(policy=policy, budget=7) as one, again.fork(policy=policy, budget=7) as two:
            one.compress(), two.compress()
            assert torch.equal(one.kept_positions(1), two.kept_positions(1))
    cache = prefilled(model, "knorm", 8)
    feed(model, tokens(1, 4), cache)
    again = EvictingCache.load(cache.save(tmp_path / "b.safetensors"), model)
    again.crop(-3)
    assert again.kept_positions(0)[0, 0, -2:].tolist()[1] == 32
    with pytest.raises(UserError, match="cannot be cropped by the newest 2 tokens but by 1"):
        again.crop(-2)


def test_a_policy_that_no_file_can_name_is_given_again(tmp_path):
    model = tiny()
    policy, other = (
        Scorer(GroupedScorer(heads=6, head_dim=8, hidden=4), Fingerprint.of(model), (16, 64)) for _ in range(2)
    )
    cache = prefilled(model, policy, 8)
    file = cache.save(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="with policy 'scorer', which no file can name: give its folder"):
        EvictingCache.load(file, model)
    for wrong in (other, "knorm"):
        with pytest.raises(UserError, match="was saved with policy 'scorer', and '"):
            EvictingCache.load(file, model, wrong)
    folder = policy.save_pretrained(tmp_path / "policy")
    again = EvictingCache.load(file, model, folder)
    assert torch.equal(feed(model, tokens(1, 3), again), feed(model, tokens(1, 3), cache))


def test_what_cannot_be_saved_or_read_is_refused(tmp_path, monkeypatch):
    model = tiny()
    with pytest.raises(UserError, match="the cache is empty"):
        EvictingCache(model).save(tmp_path / "a")
    cache = prefilled(model)
    with pytest.raises(UserError, match="cannot be written"):
        cache.save(tmp_path / "no" / "folder")
    with pytest.raises(UserError, match="there is no file"):
        EvictingCache.load(tmp_path / "none", model)
    (tmp_path / "b").write_bytes(b"")
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"b cannot be read now \(.*Input/output error"):
        patch.setattr("kv_gym.live.saving.safe_open", Mock(side_effect=OSError(5, "Input/output error")))
        EvictingCache.load(tmp_path / "b", model)
    (tmp_path / "b").unlink()
    file = cache.save(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    with pytest.raises(UserError, match="weights hash"):
        EvictingCache.load(file, tiny(seed=1))
    with pytest.raises(UserError, match=r"of torch\.float64 and the model of torch\.float32"):
        EvictingCache.load(file, tiny().float())
    assert model.config._attn_implementation == "kv_gym_sdpa"  # of `cache` alone
    cache.detach()
    assert model.config._attn_implementation == "sdpa"


def rewritten(file, change):
    """The file with `change(tensors, about)` applied, and a checksum that holds."""
    with safe_open(file, "pt") as stored:
        about = json.loads(stored.metadata()["kv_gym"])
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    change(tensors, about)
    text = json.dumps(about)
    digest = described_tensors_hash(text, sorted(tensors.items()))
    save_file(tensors, file, {"kv_gym": text, "sha256": digest})
    return file


def test_every_flipped_byte_is_noticed(tmp_path):
    model, cache = begun("llama", SETTINGS["equal"], 0)
    whole = bytearray(cache.save(tmp_path / "a").read_bytes())
    for place in range(len(whole) - 1, 0, -max(1, len(whole) // 60)):
        changed = whole.copy()
        changed[place] ^= 4
        (tmp_path / "a").write_bytes(changed)
        with pytest.raises(UserError, match=r"damaged|newer|no JSON|holds no cache"):
            EvictingCache.load(tmp_path / "a", model)


def put(name, value, *where):
    def change(tensors, about):
        tensors[name] = tensors[name].clone()
        tensors[name][where or ...] = value

    return change


def header(*path, value):
    def change(tensors, about):
        for step in path[:-1]:
            about = about[step]
        about[path[-1]] = value

    return change


def shaped(name, change):
    return lambda tensors, about: tensors.update({name: change(tensors[name]).contiguous()})


DAMAGE = {
    "newer": (header("format", value=5), "cache format 5, newer than 4"),
    "another kind": (header("kind", value="x"), "holds no cache"),
    "keys that are NaN": (put("0.slots.keys", float("nan"), 0, 0, 1), "holds NaN"),
    "infinite values": (put("1.slots.values", float("inf"), 0, 0, 1), "not finite"),
    "NaN in state": (put("1.slots.0/mass", float("nan")), "holds NaN"),
    "negative position": (put("0.slots.positions", -1, 0, 0, 0), "never seen"),
    "position of the future": (put("0.slots.positions", 40, 0, 0, 0), "never seen"),
    "a token twice": (put("0.slots.positions", 3, 0, 1), "a token twice"),
    "no keys": (lambda tensors, about: tensors.pop("0.slots.keys"), "damaged"),
    "no state": (lambda tensors, about: tensors.pop("2.slots.0/mass"), "a layer holds"),
    "another state": (lambda tensors, about: tensors.update({"0.slots.0/x": torch.ones(2)}), "a layer holds"),
    "more tensors": (
        lambda tensors, about: tensors.update({"9.x": torch.ones(2)}),
        "tensors of layers that",
    ),
    "queries not needed": (lambda tensors, about: tensors.update({"0.queries": torch.ones(2)}), "a layer holds"),
    "narrower keys": (shaped("0.slots.keys", lambda t: t[..., :4]), "has shape"),
    "fewer heads": (shaped("0.slots.keys", lambda t: t[:, :1]), "has shape"),
    "fewer rows": (shaped("0.slots.values", lambda t: t[:1]), "has shape"),
    "no dimensions": (shaped("0.slots.keys", lambda t: t.flatten()[0]), "damaged"),
    "keys of integers": (shaped("0.slots.keys", lambda t: t.long()), "are of torch.int64|are of torch.float64"),
    "positions of floats": (shaped("0.slots.positions", lambda t: t.double()), "positions are of torch.float64"),
    "longer than it is": (header("layers", "0", "length", value=10**6), "1000000 is no number"),
    "negative length": (header("layers", "0", "length", value=-1), "-1 is no number"),
    "negative seen": (header("seen", value=-5), "-5 is no number"),
    "endless seen": (header("seen", value=2**60), "is no number"),
    "rows beyond seen": (header("rows", value=[23, 99]), "99 is no number"),
    "rows of text": (header("rows", value="ab"), "damaged"),
    "no rows": (header("rows", value=[]), "damaged"),
    "fired in the future": (header("fired", value=[23, 99]), "99 is no number"),
    "fewer fired": (header("fired", value=[20]), "damaged"),
    "too loose": (header("loose", value=19), "fewer tokens than came"),
    "a factor of zero": (header("layers", "1", "scaling", value=0.0), "a factor of 0.0"),
    "a layer less": (lambda tensors, about: about["layers"].pop("2"), "other layers than the model"),
    "no layers": (header("layers", value=None), "damaged"),
    "no budget": (lambda tensors, about: about.pop("budget"), "damaged"),
    "budget zero": (header("budget", value=0), "budget 0 is not above zero"),
    "negative sinks": (header("sinks", value=-1), "-1 is no number"),
    "another trigger": (header("trigger", value="x"), "trigger 'x' is unknown"),
    "another policy": (header("policy", "name", value="os"), "'os' is no bundled policy"),
    "a class path": (header("policy", "name", value="os:system"), "no bundled policy"),
    "an oracle": (header("policy", value={"name": "oracle", "settings": {}}), "is an oracle"),
    "another setting": (header("policy", "settings", value={"x": 1}), "damaged|has no setting"),
    "another allocation": (header("allocation", "name", value="x"), "unknown allocation"),
    "a file to read": (header("allocation", "name", value="shares:/etc/passwd"), "which no file can name"),
    "another model": (header("model", value={}), "fingerprint"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_refused(tmp_path, name):
    change, sentence = DAMAGE[name]
    model, cache = begun("llama", SETTINGS["equal"], 0)
    file = rewritten(cache.save(tmp_path / "a"), change)
    with pytest.raises(UserError, match=sentence) as refused:
        EvictingCache.load(file, model)
    assert "\n" not in str(refused.value)
    cache.detach()
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "change",
    [
        put("0.lengths", -1, 0, 0),
        put("0.lengths", 10**6, 0, 0),
        put("0.lengths", 2**62),
        put("0.capacities", 10**6, 0, 0),
        put("0.capacities", 2**62),
        shaped("0.lengths", lambda t: t[:, :1]),
        shaped("0.lengths", lambda t: t.int()),
        shaped("0.slots.keys", lambda t: t[:-1]),
        lambda tensors, about: tensors.pop("0.capacities"),
    ],
)
def test_damaged_ragged_files_are_refused(tmp_path, change):
    model, cache = begun("llama", SETTINGS["ragged"], 0)
    file = rewritten(cache.save(tmp_path / "a"), change)
    with pytest.raises(UserError, match="damaged"):
        EvictingCache.load(file, model)


def test_bytes_that_are_no_file_are_refused(tmp_path):
    model, cache = begun("llama", SETTINGS["equal"], 0)
    file = cache.save(tmp_path / "a")
    whole = file.read_bytes()
    for content in (b"", whole[:5], whole[:200], whole[:-1], b"\xff" * 100, whole[:8] + b"[" + whole[9:]):
        file.write_bytes(content)
        with pytest.raises(UserError, match="damaged"):
            EvictingCache.load(file, model)
