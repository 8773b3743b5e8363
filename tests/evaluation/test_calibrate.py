"""Thresholds fixed ahead: found right, kept on contexts they were not found on, the same live as in replay."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from live_models import tiny, tokens

from kv_gym import EvictingCache, Policy, make_policy
from kv_gym.budgets import ScoredLayer, parse_allocation, protection_for, select_slots
from kv_gym.budgets.calibrated import Calibrated, policy_identity
from kv_gym.errors import UserError
from kv_gym.evaluation import calibrate
from kv_gym.evaluation.calibrate import threshold
from kv_gym.evaluation.measure import replay
from kv_gym.traces import Prompt, open_traces, record

SHARES = [0.5, 0.25, 0.125]


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """A model and traces: 24 contexts to calibrate on, 12 held out; texts of few words, so that heads have habits."""
    folder = tmp_path_factory.mktemp("calibrate")
    model = tiny("qwen3").float()
    prompts = [
        Prompt(f"p{i}", (tokens(1, 96, seed=i)[0] % 11).tolist(), [[1, 2, 3]], split="train" if i < 24 else "test")
        for i in range(36)
    ]
    record(model, prompts, folder / "traces", stats=("h2o",), progress=False)
    return model, folder, open_traces(folder / "traces")


def kept_shares(rule, policy, sequences, share):
    """The share of its slots that each context keeps, one slot after another in plain Python."""
    sinks, recent = protection_for(policy, None, None)
    room, n = int(share * 96), 96
    first = min(sinks, room // 2)
    last = min(recent, room // 2 - first)
    edge = rule.thresholds[rule.shares.index(share)]
    shares = []
    for sequence in sequences:
        kept = 0
        for layer in range(3):
            scores = policy.score(sequence.view(layer, policy=policy.statistics))[0]
            kept += sum(
                position < first or position >= n - last or score >= edge
                for head in scores.tolist()
                for position, score in enumerate(head)
            )
        shares.append(kept / (6 * n))
    return shares


def test_a_threshold_by_hand():
    contexts = [torch.tensor([[[9.0, 1, 8, 2]], [[7.0, 6, 0, 3]]]), torch.tensor([[[5.0, 5, 4, 4]], [[1.0, 1, 1, 1]]])]
    # half of 16 slots: 9 8 7 6 5 5 are six, both fours make eight
    assert threshold(contexts, 0.5, 0, 0) == 4.0
    # a quarter of 16
    assert threshold(contexts, 0.25, 0, 0) == 6.0
    # a budget of two slots protects the first of each head; of the others 8 6 5 make seven, both fours nine: the fewer
    assert threshold(contexts, 0.5, 1, 0) == 5.0
    # first and newest protected, all the others wanted
    assert threshold(contexts, 1.0, 1, 1) == 0.0


@pytest.mark.parametrize(("name", "tolerance"), [("h2o", 0.1), ("snapkv", 0.1)])
def test_the_total_floats_around_the_budget_on_contexts_held_out(name, tolerance, traced):
    """Within a tenth of the budget on the mean of twelve held-out contexts; exact to a slot where it was calibrated."""
    _, _, traces = traced
    policy = make_policy(name)
    policy = replace(policy, window=8) if name == "snapkv" else policy
    rule = calibrate(policy, traces, SHARES, progress=False)
    about = json.loads(rule.about)
    assert list(rule.thresholds) == sorted(rule.thresholds, reverse=True)
    for share in SHARES:
        trained = torch.tensor(kept_shares(rule, policy, traces.select("train"), share), dtype=torch.float64)
        at = rule.shares.index(share)
        assert abs(trained.mean() - share) < 1 / (24 * 6 * 96) + 1e-9
        assert about["kept_mean"][at] == pytest.approx(float(trained.mean()))
        assert about["kept_deviation"][at] == pytest.approx(float(trained.std(correction=0)))
        held_out = torch.tensor(kept_shares(rule, policy, traces.select("test"), share))
        reported = {row["allocation"]: row["kept_share"] for row in replay(
            {name: policy}, traces.select("test"), [share], allocations=["uniform", rule]
        )}  # fmt: skip
        assert reported == pytest.approx({"uniform": int(share * 96) / 96, "calibrated": float(held_out.mean())})
        assert abs(held_out.mean() - share) < tolerance * share
        assert held_out.std() > 0  # it does float


@pytest.mark.parametrize("trigger", ["prefill", "every:5"])
@pytest.mark.parametrize("budget", [0.5, 0.3, 12])
@pytest.mark.parametrize("name", ["h2o", "snapkv"])
def test_live_equals_replay_and_no_layer_waits(name, budget, trigger, traced):
    model, folder, traces = traced
    calibrate(name, traces, SHARES, folder / f"{name}.json", progress=False)
    rule = parse_allocation(f"calibrated:{folder}/{name}.json")
    assert not rule.whole_model
    policy = make_policy(name)
    held_out = [traces["p30"], traces["p31"]]
    ids = torch.tensor([sequence.tokens.tolist() for sequence in held_out])
    with EvictingCache(model, name, budget, allocation=rule, trigger=trigger) as cache, torch.no_grad():
        model(ids, past_key_values=cache)
        for row, sequence in enumerate(held_out):
            views = [sequence.view(layer, budget, policy=policy.statistics) for layer in range(3)]
            masks = select_slots(policy, rule, views, *protection_for(policy, None, None))
            for layer, mask in enumerate(masks):
                for head in range(2):
                    live = cache.kept_positions(layer)[row, head]
                    assert live[live >= 0].tolist() == mask[0, head].nonzero()[:, 0].tolist()
        kept = cache.kept().clone()
        assert len(set(kept.flatten().tolist())) > 1
        for step in range(4):
            model(tokens(2, 1, seed=step), past_key_values=cache)
        assert torch.equal(cache.kept(), kept + 4)


def test_thresholds_between_two_shares_are_interpolated_over_the_logarithm():
    rule = Calibrated("{}", 1, 1, (0.125, 0.25, 0.5), (8.0, 4.0, 1.0))
    assert rule.threshold(25, 100) == 4.0
    assert rule.threshold(50, 100) == 1.0
    assert rule.threshold(1414, 4000) == pytest.approx(2.5, abs=1e-3)  # half-way between a quarter and a half
    assert rule.threshold(12, 100) == 8.0  # an eighth of 100, rounded down to slots
    for room in (11, 51, 99):
        with pytest.raises(UserError, match=rf"{room} of 100 tokens is a share of .* from 0\.125 to 0\.5"):
            rule.threshold(room, 100)


@dataclass(frozen=True)
class Positions(Policy):
    """The position is the score."""

    comparable = True

    def score(self, view):
        return view.positions.float()


def test_a_budget_for_all_tokens_keeps_all_and_protected_slots_always_stay(traced):
    view = traced[2]["p0"].view(0)
    policy = Positions()
    rule = Calibrated(json.dumps(policy_identity(policy)), 1, 2, (0.125, 0.5), (90.0, 90.0))
    for budget, expected in [(96, 96), (500, 96), (24, 6 + 3), (12, 6 + 3)]:
        cut_view = view.with_budget(torch.full((1, 2), budget))
        layer = ScoredLayer.of(policy.score(cut_view), rule, cut_view, 3, 0)
        assert rule.slots([layer])[0].tolist() == [[expected] * 2]


def test_what_does_not_fit_is_refused(traced, tmp_path):
    model, _, traces = traced
    with pytest.raises(UserError, match=r"'keydiff' have no scale .* global:zscore"):
        calibrate("keydiff", traces, SHARES, progress=False)
    with pytest.raises(UserError, match="budget 64 counts slots"):
        calibrate("h2o", traces, [64], progress=False)
    with pytest.raises(UserError, match="no share"):
        calibrate("h2o", traces, [], progress=False)
    with pytest.raises(UserError, match="no context in split 'valid'"):
        calibrate("h2o", traces, SHARES, split="valid", progress=False)
    with pytest.raises(UserError, match="holds no statistics of policy 'lfu'"):
        calibrate("lfu", traces, SHARES, progress=False)
    rule = calibrate("h2o", traces, SHARES, tmp_path / "h2o.json", progress=False)
    with pytest.raises(UserError, match="thresholds for policy 'h2o', and the policy here is policy 'snapkv'"):
        EvictingCache(model, "snapkv", 0.25, allocation=rule)
    with pytest.raises(UserError, match="other settings or weights"):
        EvictingCache(model, make_policy("h2o", reduce="mean"), 0.25, allocation=rule)
    with pytest.raises(UserError, match="no scale"):
        EvictingCache(model, "knorm", 0.25, allocation=f"calibrated:{tmp_path}/h2o.json")
    wider = tiny("qwen3", num_key_value_heads=4).float()
    with EvictingCache(wider, "h2o", 0.25, allocation=rule) as cache, pytest.raises(UserError, match="2 KV heads, and"):
        wider(tokens(1, 40), past_key_values=cache)


@pytest.mark.parametrize(
    "change",
    [{"format": 2}, {"shares": []}, {"shares": [0.5, 0.25, 0.125]}, {"thresholds": [1.0]}, {"thresholds": "abc"},
     {"shares": [0.1, 0.2, 1.5]}, {"thresholds": [1.0, float("nan"), 0.0]}, {"layers": None}],
)  # fmt: skip
def test_damaged_files_are_refused_with_one_sentence(change, tmp_path):
    good = Calibrated("{}", 3, 2, (0.125, 0.25, 0.5), (3.0, 2.0, 1.0))
    data = json.loads(good.save(tmp_path / "t.json").read_text())
    read = parse_allocation(f"calibrated:{tmp_path}/t.json")
    assert replace(read, file="") == good
    (tmp_path / "t.json").write_text(json.dumps(data | change))
    with pytest.raises(UserError, match=r"thresholds|newer than") as error:
        parse_allocation(f"calibrated:{tmp_path}/t.json")
    assert "\n" not in str(error.value)
    (tmp_path / "t.json").write_text("[" * 10)
    with pytest.raises(UserError, match="expected thresholds"):
        parse_allocation(f"calibrated:{tmp_path}/t.json")
    with pytest.raises(UserError, match="cannot be read"):
        parse_allocation("calibrated:/nowhere.json")


def test_a_policy_is_known_by_settings_and_weights_not_by_how_it_was_trained():
    from kv_gym.models.fingerprint import Fingerprint
    from kv_gym.policies.scorer import GroupedScorer, Scorer

    fingerprint = Fingerprint("llama", "w", "{}", (0,), 2, 1, 4)
    torch.manual_seed(0)
    one = Scorer(GroupedScorer(1, 4, 8), fingerprint, (1, 9), training={"seed": 1})
    assert policy_identity(one) == policy_identity(replace(one, training={}))
    assert policy_identity(one) == json.loads(json.dumps(policy_identity(one)))
    other = Scorer(GroupedScorer(1, 4, 8), fingerprint, (1, 9))
    assert policy_identity(one) != policy_identity(other)
    caote = make_policy("caote", over="h2o")
    assert policy_identity(caote) != policy_identity(make_policy("caote", over="tova"))


def test_the_command_writes_a_file_that_evaluate_takes(traced, monkeypatch, capsys):
    from kv_gym import cli

    _, folder, _ = traced
    file = folder / "from_cli.json"
    arguments = ["calibrate", "h2o", "--traces", str(folder / "traces"), "--budgets", "1/4,1/8", "--out", str(file)]
    monkeypatch.setattr("sys.argv", ["kv-gym", *arguments, "--no-progress"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    shown = capsys.readouterr().out
    assert "1/8" in shown and "24 contexts of 96 to 96 tokens" in shown
    monkeypatch.setattr(
        "sys.argv",
        ["kv-gym", "evaluate", "--policies", "h2o", "--traces", str(folder / "traces"), "--budgets", "1/8",
         "--allocation", f"uniform,calibrated:{file}", "--no-progress"],
    )  # fmt: skip
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    assert "calibrated" in capsys.readouterr().out
