"""Record the bundled sample: ``python traces/recipes/sample.py`` writes `traces/sample` (remove the old one first).

One context of 256 tokens with everything that a trace can hold, the statistics of every policy with memory among it,
and a few short ones that are light: no queries and no statistics. Little more than 2 MB in all, for it ships in the
wheel. Contexts come from seeds 996 to 999.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from kv_gym.models import load_model
from kv_gym.policies import list_policies, make_policy
from kv_gym.reference import MODEL
from kv_gym.reference.prompts import reference_prompts
from kv_gym.traces import record_sequence, validate
from kv_gym.traces.recorder import make_manifest
from kv_gym.traces.writer import TraceWriter

SEED = 999
FULL = ("multi_key", 256, "train")
LIGHT = (("multi_key", 64, "train"), ("dialogue", 64, "train"), ("multi_key", 96, "test"))  # task, words, split


def main() -> None:
    """Record, check and describe the sample."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL), help="folder of the reference model")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "sample")
    arguments = parser.parse_args()

    model, tokenizer = load_model(arguments.model, device="cpu", dtype="float32")
    policies = [make_policy(name) for name in list_policies() if name != "scorer"]
    # one policy for each: d2o's sums are h2o's, and a policy over another one has that one's
    remembered = {policy.statistics: policy for policy in policies if policy.statistics == policy.name}.values()
    recipe = {"command": "python traces/recipes/sample.py", "seed": SEED, "full": FULL, "light": LIGHT}
    writer = TraceWriter(arguments.out, make_manifest(model, tokenizer, "auto", {"light": len(LIGHT)}, recipe))
    prompts = []
    for i, (task, words, split) in enumerate((FULL, *LIGHT)):
        [prompt] = reference_prompts(task, words, count=1, continuations=8, seed=SEED - i)
        prompts.append(replace(prompt, id=f"{i}-{task}-{words}-{split}", split=split))
    if missing := writer.missing(prompts):
        with writer.shard(0, [prompt.id for _, prompt in missing]) as shard:
            for place, prompt in missing:
                everything = {"window": 32, "stats": remembered} if place == 0 else {"window": 0, "stats": ()}
                shard.add(record_sequence(model, prompt, **everything), place)
    for name, value in validate(arguments.out).items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
