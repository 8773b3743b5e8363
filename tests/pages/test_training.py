"""Trained page policies: they learn what there is to learn, are read back whole, and LRU stands in where it should."""

import json
import sys
import warnings
from itertools import count
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from kv_gym.cli import app
from kv_gym.errors import UserError
from kv_gym.pages import PageRankingPolicy, RequestTrace, make_page_policy, simulate, train_pages
from kv_gym.pages.cache import Candidates, PageCache
from kv_gym.pages.policies.learned import Learned
from kv_gym.pages.shadow import ShadowLRU
from kv_gym.training.pages.network import CandidateHeads, CandidateScorer, StackedCandidates
from kv_gym.training.pages.recording import record_decisions

CAPACITY = 60


def loop_and_wonders(loops=40, pages=50, seed=0):
    """Fifty pages asked for again and again, in another order each time, with as many pages that come once."""
    random, once = np.random.default_rng(seed), count(pages)
    keys = [key for _ in range(loops) for page in random.permutation(pages).tolist() for key in (page, next(once))]
    return RequestTrace.from_keys(keys, "loop and wonders")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clone")
    trace = loop_and_wonders()
    return trace, folder, train_pages("clone", trace, folder, CAPACITY, rounds=2, steps=150, decisions=1500)


def test_it_learns_to_evict_what_comes_once(trained):
    trace, folder, _ = trained
    rates = {
        str(policy): simulate(trace, policy, CAPACITY, warm_up=0.7).hit_rate
        for policy in ("lru", folder, "tail_oracle", "belady")
    }
    lru, learned, tail, best = rates.values()
    assert learned > lru + 0.1 and learned > lru + 0.7 * (tail - lru), rates
    assert tail <= best <= 0.5


def test_it_is_read_back_as_it_was(trained):
    trace, folder, policy = trained
    again = make_page_policy(str(folder))
    assert isinstance(again, Learned) and again.card == policy.card and again.name == "learned"
    assert again.card.validation.keys() == {"learned", "lru", "tail_oracle"} and not again.card.fallback
    assert simulate(trace, again, CAPACITY).hits == simulate(trace, policy, CAPACITY).hits
    assert make_page_policy(f"{folder}:limit=0.5").limit == 0.5


def test_numpy_computes_what_torch_computes():
    torch.manual_seed(0)
    network = CandidateScorer(3, 8)
    features, mask = torch.rand(1, 5, 3), torch.ones(1, 5, dtype=torch.bool)
    network.normalise(features, mask)
    policy = Learned(card_of(features=("age", "hits", "order"), hidden=8), network.weights())
    ours, theirs = policy.score(features[0].numpy()), network(features, mask)[0].detach().numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    wider = torch.cat((features, torch.rand(1, 2, 3)), 1)
    partly = network(wider, torch.tensor([[True] * 5 + [False] * 2]))[0, :5].detach().numpy()
    np.testing.assert_allclose(ours, partly, atol=1e-5)


def card_of(**changes):
    from kv_gym.pages.policies.learned import LearnedCard

    known = {"candidates": 4, "trace": "t", "semantics": "objects", "capacity": 4, "seed": 0, "kv_gym": "0"}
    return LearnedCard(**known | changes)


def test_lru_stands_in_after_the_time_limit(trained):
    trace, folder, _ = trained
    policy = Learned.load(folder, limit=0.5)
    ticks = count()
    policy.clock = lambda: float(next(ticks))  # every decision takes a second
    late = simulate(trace, policy, CAPACITY)
    assert late.hits == simulate(trace, "lru", CAPACITY).hits
    assert late.late_share == late.row()["late_share"] == 1.0 and policy.late == policy.decisions > 0
    seconds = iter([0.0, 0.4] * 10**6)
    policy.clock = lambda: next(seconds)
    early = simulate(trace, policy, CAPACITY)
    assert (early.late_share, early.hits) == (0.0, simulate(trace, str(folder), CAPACITY).hits)
    assert simulate(trace, str(folder), CAPACITY).late_share is None


def test_lru_stands_in_where_a_trace_turns_against_the_policy(trained):
    """Pages that come once are gone at once, as was learned; then every page comes twice, just before LRU drops it."""
    _, folder, _ = trained
    before = loop_and_wonders(20).pages.tolist()
    after = [key for i in range(4000) for key in (10**6 + i, 10**6 + i - 27)]
    trace = RequestTrace.from_keys(before + after, "turns")
    lru, alone, guarded = (
        simulate(trace, policy, CAPACITY, warm_up=0.6) for policy in ("lru", f"{folder}:shadow=0", str(folder))
    )
    assert lru.hit_rate > 0.45 and alone.hit_rate < 0.1 and alone.shadow_share is None
    assert guarded.hit_rate > lru.hit_rate - 0.01 and guarded.row()["shadow_share"] > 0.5
    assert simulate(trained[0], str(folder), CAPACITY).shadow_share == 0  # where the policy is better, it decides
    with pytest.raises(UserError, match="a shadow of -1 pages"):
        make_page_policy(f"{folder}:shadow=-1")


def test_lru_stands_in_where_validation_says_so():
    """Later pages of a request are asked for again soon after it: nothing beats LRU."""
    trace = RequestTrace.from_keys([key for i in range(200) for key in (i, i + 1, i)], "walk")
    weights = {name: np.ones(shape, np.float32) for name, shape in card_of(features=("age",), hidden=2).shapes.items()}
    policy = Learned(card_of(features=("age",), hidden=2, fallback=True), weights)
    assert simulate(trace, policy, 3).hits == simulate(trace, "lru", 3).hits


def test_drawn_candidates_let_young_pages_leave(tmp_path):
    """Random candidates reach pages that come once long before they are old; the oracle among them gains by it."""
    trace = loop_and_wonders()
    tail, drawn = (simulate(trace, f"tail_oracle:drawn={count}", CAPACITY).hits for count in (0, 12))
    assert drawn > tail and drawn > simulate(trace, "tail_oracle:drawn=12:noise=20", CAPACITY).hits
    policy = train_pages("clone", trace, tmp_path, CAPACITY, drawn=12, rounds=2, steps=60, decisions=500)
    assert policy.drawn == 12 and "order" not in policy.card.features
    again = [simulate(trace, str(tmp_path), CAPACITY).hits for _ in range(2)]
    assert again[0] == again[1] > simulate(trace, "lru", CAPACITY).hits
    with pytest.raises(UserError, match="16 of 16 candidates cannot be drawn"):
        train_pages("clone", trace, tmp_path, CAPACITY, drawn=16)


def test_lrb_learns_it_while_the_cache_runs():
    trace = loop_and_wonders()
    rates = [simulate(trace, policy, CAPACITY, warm_up=0.7).hit_rate for policy in ("lru", "lrb:sample=1.0")]
    assert rates[1] > rates[0] + 0.1, rates


def test_lrb_learns_from_requests_of_many_objects():
    keys = np.random.default_rng(0).integers(0, 40, 2000)
    trace = RequestTrace.from_keys(keys, "requests of 20", starts=range(0, 2000, 20))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 0.1 < simulate(trace, "lrb:sample=1.0", 10).hit_rate < 0.4


def test_lrb_goes_on_learning_while_lru_decides(monkeypatch):
    monkeypatch.setattr(ShadowLRU, "follow", lambda shadow, cache, begin, end: setattr(cache, "leave_to_lru", True))
    policy, trace = make_page_policy("lrb:sample=1.0"), loop_and_wonders()
    assert simulate(trace, policy, CAPACITY).hits == simulate(trace, "lru", CAPACITY).hits
    assert policy._fitted


def test_lrb_counts_hits_of_objects_or_of_bytes():
    """Pages that are asked for equally often: most objects are found where the large ones leave."""
    keys = np.random.default_rng(0).integers(0, 60, 2000)
    trace = RequestTrace.from_keys(keys, "large and small", sizes=np.where(keys % 2, 20, 1))
    rates = [simulate(trace, f"lrb:sample=1.0:goal={goal}", 200, warm_up=0.5).hit_rate for goal in ("objects", "bytes")]
    assert rates[0] > rates[1] + 0.05, rates
    for wrong in ("goal=hits", "credit=-1", "forget=1.0"):
        with pytest.raises(UserError, match=f"lrb with {wrong}"):
            make_page_policy(f"lrb:{wrong}")


def test_lrb_has_trees(monkeypatch):
    with pytest.raises(UserError, match="lrb with trees=-1 cannot run; expected 0 or more"):
        make_page_policy("lrb:trees=-1")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "lightgbm", None)
        with pytest.raises(UserError, match=r"lightgbm is missing: pip install 'kv-gym\[trees\]'"):
            simulate(loop_and_wonders(), "lrb:trees=3", CAPACITY)
    pytest.importorskip("lightgbm", reason="lightgbm is not installed (pip install 'kv-gym[trees]')")
    trace = loop_and_wonders(loops=20)
    trees = simulate(trace, "lrb:trees=5:sample=2:candidates=16:drawn=15:shadow=4096", CAPACITY, warm_up=0.7).hit_rate
    assert trees > simulate(trace, "lru", CAPACITY, warm_up=0.7).hit_rate + 0.1


@pytest.mark.parametrize(("agent", "steps"), [("dqn", 120), ("ppo", 40)])
def test_reinforcement_learning_learns_it_too(tmp_path, agent, steps):
    trace = loop_and_wonders()
    policy = train_pages(agent, trace, tmp_path, CAPACITY, rounds=1, decisions=1200, steps=steps)
    assert policy.card.agent == agent and policy.card.validation["learned"] > policy.card.validation["lru"] + 0.1
    alone = simulate(trace, Learned.load(tmp_path, shadow=0), CAPACITY, warm_up=0.7).hit_rate
    beside_lru = simulate(trace, str(tmp_path), CAPACITY, warm_up=0.7).hit_rate  # LRU decides where it lost at first
    assert alone > 0.2 and simulate(trace, "lru", CAPACITY, warm_up=0.7).hit_rate < beside_lru <= alone


def test_double_targets_and_dueling_values_by_hand():
    """Preferences for leaving are the scores' opposites, less their mean over the candidates that are there."""
    heads = CandidateHeads(StackedCandidates(gym.make("KVPage-v0", action="index").observation_space), 8, dueling=True)
    torch.manual_seed(0)
    features, mask = torch.rand(1, 16, 10), torch.arange(16)[None] < 3
    heads.scorer.normalise(features, mask)
    stacked = torch.cat((features, mask[..., None].float()), -1).flatten(1)
    scores, pooled = heads.scorer.score_and_pool(features, mask)
    expected = heads.value(pooled) - scores + scores[mask].mean()
    torch.testing.assert_close(heads(stacked)[mask], expected[mask])
    assert (heads(stacked)[~mask] == -1e8).all()
    nobody = torch.zeros_like(stacked)  # after the trace's end: a finite value, for the target
    assert heads(nobody).abs().max() < 1e3


def test_an_exported_policy_decides_as_it_did(trained, tmp_path):
    pytest.importorskip("onnx", reason="onnx is not installed (pip install 'kv-gym[onnx]')")
    trace, folder, policy = trained
    file = tmp_path / "policy.onnx"
    done = CliRunner().invoke(app, ["pages", "export", str(folder), "--out", str(file)])
    assert done.exit_code == 0, done.output
    exported = make_page_policy(f"{file}:limit=0")
    features = np.random.default_rng(0).random((7, len(policy.card.features)), np.float32)
    np.testing.assert_allclose(exported.score(features), policy.score(features), atol=1e-5)
    assert exported.card == policy.card and make_page_policy(str(file)).limit == 500e-6
    short = trace.part(0, 600)
    assert simulate(short, exported, CAPACITY).hits == simulate(short, str(folder), CAPACITY).hits
    for damage, complaint in ((b"x" * 99, "holds no network"), (b"", "holds no network")):
        file.write_bytes(damage)
        with pytest.raises(UserError, match=complaint):
            make_page_policy(str(file))
    with pytest.raises(UserError, match="kv-gym pages export"):
        make_page_policy(str(tmp_path / "other.onnx"))


def test_recorded_decisions_know_the_next_use():
    trace = RequestTrace.from_keys(list("abcabdabe" * 4), "letters")
    policy = make_page_policy("tail_oracle:candidates=4")
    made, rate = record_decisions(trace, policy, 3, "objects", ("age",), 100, np.random.default_rng(0), 30)
    assert rate == simulate(trace, policy, 3, warm_up=30 / 36).hit_rate
    assert made.features.shape == (len(made.mask), 4, 1) and (made.mask.sum(1) == 3).all()
    # the first decision: d is asked for, and a, b, c are cached; next uses are a at 6, b at 7, c at 11
    assert made.distance[0, :3].tolist() == [11 - 5, 6 - 5, 7 - 5]
    np.testing.assert_allclose(made.features[0, :3, 0], np.log1p([3, 2, 1]) / 10, rtol=1e-6)
    few, _ = record_decisions(trace, policy, 3, "objects", ("age",), 2, np.random.default_rng(0), 30)
    assert len(few.mask) == 2


def test_candidates_remember_what_left():
    trace = RequestTrace.from_keys(list("abcaab"), "letters")
    cache = PageCache(trace, 2)
    for _ in cache.serve(0, 6):
        cache.evict(cache.shown()[0])
    pages = Candidates(cache, [0, 1])
    assert (pages.seen.tolist(), pages.period.tolist()) == ([3, 2], [1, 4])


def test_the_command_trains_and_says_how_it_went(tmp_path):
    requests = tmp_path / "keys.txt"
    requests.write_text("".join(f"{key}\n" for key in loop_and_wonders(20).pages))
    words = ["clone", requests, "--out", tmp_path / "out", "--capacity", CAPACITY, "--steps", 30, "--rounds", 1]
    done = CliRunner().invoke(app, ["pages", "train", *map(str, words)])
    assert done.exit_code == 0, done.output
    assert "tail_oracle 0." in done.output and (tmp_path / "out" / "policy.json").is_file()


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda folder: flip(folder / "weights.safetensors"), "is damaged or not the one"),
        (lambda folder: (folder / "weights.safetensors").unlink(), "cannot be read"),
        (lambda folder: (folder / "policy.json").unlink(), "kv-gym pages train"),
        (lambda folder: rewrite(folder, format="other"), "format is 'other'"),
        (lambda folder: rewrite(folder, colour="red"), "unknown key 'colour'"),
        (lambda folder: rewrite(folder, features=["colour"]), "expected some of age"),
        (lambda folder: rewrite(folder, hidden=8), "holds other tensors"),
    ],
)
def test_a_damaged_or_foreign_policy_is_one_sentence(trained, tmp_path, damage, complaint):
    trained[2].save(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=complaint):
        make_page_policy(str(tmp_path))


def flip(file: Path):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def rewrite(folder: Path, **changes):
    file = folder / "policy.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"agent": "clown"}, "unknown page agent 'clown'; known: clone, dqn, ppo"),
        ({"features": ["colour"]}, "expected some of age"),
        ({"rounds": 0}, "rounds"),
        ({"candidates": 1}, "nothing to decide"),
        ({"candidates": 10**30}, "candidates is 10+; expected less than or equal to 1024"),
        ({"hidden": 10**30}, "hidden is 10+; expected less than or equal to 4096"),
        ({"seed": -1}, "seed is -1; expected a number from 0"),
        ({"capacity": 10**6}, "nothing leaves a cache of 1000000"),
        ({"semantics": "blocks"}, "objects"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, changes, complaint):
    settings = {"agent": "clone", "requests": loop_and_wonders(4), "out": tmp_path, "capacity": CAPACITY} | changes
    with pytest.raises(UserError, match=complaint):
        train_pages(**settings)
    with pytest.raises(UserError, match="a warm-up of 1"):
        simulate(loop_and_wonders(4), "lru", CAPACITY, warm_up=1)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="is a file"):
        train_pages("clone", loop_and_wonders(4), tmp_path / "out", CAPACITY)


class Newest(PageRankingPolicy):
    """A policy of a user, without settings."""

    def rank(self, candidates):
        return candidates.age


def test_a_class_of_a_user_needs_no_settings():
    trace = RequestTrace.from_keys(list("abcabc"), "letters")
    assert simulate(trace, f"{__name__}:Newest", 2).hits == 2
    with pytest.raises(UserError, match="has no setting 'depth'; its settings: none"):
        make_page_policy(f"{__name__}:Newest:depth=3")
