"""The agent `joint`: what it learns with each loss, its held-out reward, what it refuses."""

import numpy as np
import pytest
import torch
from known_traces import known_worth, write_known_traces
from traced_models import VOCABULARY, tiny_model

from kv_gym.errors import UserError
from kv_gym.evaluation.measure import replay
from kv_gym.policies import make_policy
from kv_gym.traces import Prompt, open_traces, record
from kv_gym.training import train, trainer
from kv_gym.training.joint import LOSSES, kept_by_one_threshold
from kv_gym.training.registry import agent_settings
from kv_gym.training.targets import FROM_MODEL

FAST = {"steps": 60, "every": 30, "hidden": 16, "rate": 0.02, "progress": False}


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    return write_known_traces(tmp_path_factory.mktemp("known") / "traces")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A tiny random model and eight of its contexts."""
    model = tiny_model("qwen3")
    draw = lambda seed, n: torch.randint(VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed)).tolist()  # noqa: E731
    prompts = [Prompt(f"c{i}", draw(i, 24), [draw(100 + 3 * i + k, 5) for k in range(3)]) for i in range(8)]
    folder = tmp_path_factory.mktemp("joint") / "traces"
    record(model, prompts, folder, progress=False)
    return model, open_traces(folder)


def way_to_the_oracle(policy, traces):
    """0: as good as a random order; 1: as good as the best ranking, one threshold at a quarter of the slots."""
    policies = {"learned": policy, "oracle": make_policy("oracle"), "random": make_policy("random")}
    sequences = open_traces(traces).select(split="test")
    rule = "global" if policy.comparable else "uniform"
    kept = {}
    for name, candidate in policies.items():
        chosen = "global:raw" if name == "random" else rule
        (row,) = replay({name: candidate}, sequences, [0.25], sinks=0, recent=0, allocations=[chosen])
        kept[name] = row["utility_kept"]
    return (kept["learned"] - kept["random"]) / (kept["oracle"] - kept["random"])


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_learns_the_known_ranking_of_all_slots(traces, tmp_path, loss):
    untrained = train("joint", traces, tmp_path / "untrained", loss=loss, **(FAST | {"rate": 0.0, "steps": 1}))
    trained = train("joint", traces, tmp_path / "trained", loss=loss, **(FAST | {"steps": 120}))
    assert way_to_the_oracle(untrained, traces) < 0.5
    assert way_to_the_oracle(trained, traces) > 0.9
    assert trained.comparable and trained.absolute == (loss == "poisson")


def test_poisson_scores_are_logarithms_of_the_expected_worth(traces, tmp_path):
    """On contexts it was not trained on, over all slots and over those that it holds to be worth most."""
    policy = train("joint", traces, tmp_path / "policy", loss="poisson", **FAST)
    scored, utility = [], []
    for sequence in open_traces(traces).select(split="test"):
        scored.append(torch.cat([policy.score(sequence.view(layer)) for layer in range(2)]).exp().numpy())
        utility.append(known_worth(sequence.keys) / 3)  # of 6 queries, who pay twice the known worth in all
    rates, known = np.concatenate(scored).ravel(), np.concatenate(utility).ravel()
    best = np.argsort(-rates)[: len(rates) // 4]
    assert rates.mean() == pytest.approx(known.mean(), rel=0.1)
    assert rates[best].mean() == pytest.approx(known[best].mean(), rel=0.1)
    assert known[best].mean() > 3 * known.mean()


def test_the_reward_is_the_share_of_the_best_kept_worth(traces, tmp_path):
    policy = train("joint", traces, tmp_path / "policy", **(FAST | {"steps": 5, "protect": [2, 3]}))
    sequence = open_traces(traces)[0]
    utility = known_worth(sequence.keys)
    scores = torch.cat([policy.score(sequence.view(layer)) for layer in range(2)]).double()
    scores[..., :2] = scores[..., -3:] = float("inf")  # protected: 2 + 3 in each of 4 heads of 40 slots
    for total, share in zip(
        (40, 80), kept_by_one_threshold(policy, sequence, torch.from_numpy(utility), (1 / 4, 1 / 2)), strict=True
    ):
        kept = utility.ravel()[np.argsort(-scores.numpy().ravel(), kind="stable")[:total]].sum()
        assert share == pytest.approx(kept / np.sort(utility.ravel())[-total:].sum(), rel=1e-5)


def test_checkpoints_are_chosen_by_the_target(recorded, tmp_path):
    """The held-out reward is that of the target, not of attention, and of the continuations that were asked for."""
    model, traces = recorded
    for settings in ({"target": "output"}, {"continuations": 1}):
        chosen = (
            {name: value for name, value in FAST.items() if name != "progress"} | {"steps": 3, "every": 3} | settings
        )
        policy = train("joint", traces, tmp_path / "-".join(settings), model=model, progress=False, **chosen)
        run = trainer.Trainer("joint", agent_settings("joint", **chosen), 0, traces, model=model)
        run.setup()
        (sequence,) = run.validation
        utility = torch.from_numpy(run.learner.utility(sequence))
        shares = kept_by_one_threshold(policy, sequence, utility, (1 / 8, 1 / 16, 1 / 32, 1 / 64))
        assert policy.training["held_out_reward"] == pytest.approx(sum(shares) / 4, rel=1e-6)
        other = kept_by_one_threshold(
            policy, sequence, torch.from_numpy(sequence.utility()), (1 / 8, 1 / 16, 1 / 32, 1 / 64)
        )
        assert other != pytest.approx(shares)


@pytest.mark.parametrize("target", FROM_MODEL)
def test_targets_of_the_model_train_and_ask_for_it(recorded, tmp_path, target):
    model, traces = recorded
    settings = FAST | {"steps": 3, "every": 3, "target": target}
    with pytest.raises(UserError, match=f"agent 'joint' with target '{target}' reads the model: name the one"):
        train("joint", traces, tmp_path / "none", **settings)
    with pytest.raises(UserError, match="weights hash"):
        train("joint", traces, tmp_path / "other", model=tiny_model("qwen3", seed=1), **settings)
    policy = train("joint", traces, tmp_path / "policy", model=model, **settings)
    assert policy.training["settings"]["target"] == target


def test_the_target_is_the_best_that_there_is_to_learn_from(recorded, tmp_path):
    """With the model what its layers are to the loss, without it attention alone; the policy's settings say which."""
    model, traces = recorded
    settings = FAST | {"steps": 3, "every": 3}
    seeing = train("joint", traces, tmp_path / "with", model=model, **settings)
    blind = train("joint", traces, tmp_path / "without", **settings)
    assert seeing.training["settings"]["target"] == "layers" and blind.training["settings"]["target"] == "mean"
    named = train("joint", traces, tmp_path / "named", model=model, target="layers", **settings)
    for name, weight in named.network.state_dict().items():
        assert torch.equal(weight, seeing.network.state_dict()[name])
    assert any(not torch.equal(w, seeing.network.state_dict()[n]) for n, w in blind.network.state_dict().items())


def test_more_continuations_than_were_recorded(traces, tmp_path):
    with pytest.raises(UserError, match="has 1 continuations and 2 are asked for"):
        train("joint", traces, tmp_path / "policy", continuations=2, **FAST)
