"""Live equals replay: what a live cache keeps in a fresh process is what the policy keeps of a trace from the disk."""

import json
import subprocess
import sys

import pytest
import torch
from live_models import LIVE, tiny, tokens

from kv_gym import make_policy
from kv_gym.budgets import protection_for, select
from kv_gym.traces import Prompt, open_traces, record

# a trace holds no output projections
REPLAYED = [name for name in LIVE if not make_policy(name).needs_output]
BUDGETS = [9, 0.25, 0.6]
DECODE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
from kv_gym import EvictingCache

folder, ids, policies, budgets = json.loads(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
kept = {}
for policy in policies:
    for budget in budgets:
        with EvictingCache(model, policy, budget) as cache, torch.no_grad():
            model(torch.tensor([ids]), past_key_values=cache)
            kept[f"{policy} {budget}"] = [cache.kept_positions(layer)[0].tolist() for layer in cache.evicting_layers]
print(json.dumps(kept))
"""


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The reopened trace, and what a fresh process kept."""
    folder = tmp_path_factory.mktemp("live_replay")
    model = tiny("qwen3").float()
    model.save_pretrained(folder / "model")
    ids = tokens(1, 150)[0].tolist()
    prompt = Prompt("a", ids, [tokens(1, 8, seed=1)[0].tolist()])
    stats = {make_policy(name).statistics for name in REPLAYED} - {""}
    record(model, [prompt], folder / "traces", stats=stats, progress=False)
    asked = json.dumps([str(folder / "model"), ids, REPLAYED, BUDGETS])
    done = subprocess.run([sys.executable, "-c", DECODE, asked], capture_output=True, text=True, check=True)
    return open_traces(folder / "traces")[0], json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", REPLAYED)
def test_live_equals_replay(both, name, budget):
    sequence, live = both
    policy = make_policy(name)
    sinks, recent = protection_for(policy, None, None)
    for layer in range(3):
        kept = select(policy, sequence.view(layer, budget, policy=policy.statistics), sinks, recent)[0]
        replayed = [torch.nonzero(head)[:, 0].tolist() for head in kept]
        assert live[f"{name} {budget}"][layer] == replayed
