"""Run kv_gym's policies inside kvpress, beside a press of its own, on held-out questions of the reference model.

`make kvpress` makes the environment (kvpress needs transformers below 5.3); then
`.venv-kvpress/bin/python examples/kvpress_press.py agents/trained/joint snapkv`.
"""

import argparse
import copy

import torch
from kvpress import KeyDiffPress
from transformers import DynamicCache

from kv_gym.evaluation.tasks import reference_tasks
from kv_gym.interop import PolicyPress
from kv_gym.models import load_model
from kv_gym.reference import MODEL


def main(policies, ratio=0.75, contexts=4):
    """Share of questions that each press's compressed context answers, printed and returned."""
    model, _ = load_model(MODEL)
    presses = {"kvpress's KeyDiffPress": KeyDiffPress(ratio)}
    presses |= {name: PolicyPress(ratio, policy=name) for name in policies}
    asked = reference_tasks(count=contexts)
    results = {}
    for name, press in presses.items():
        right = [answers(model, press, context, question) for context in asked for question in context.questions]
        results[name] = sum(right) / len(right)
        print(f"{name:24} {results[name]:6.1%} of {len(right)} answers from {1 - ratio:.0%} of the cache")
    return results


_compressed = {}


@torch.no_grad()
def answers(model, press, context, question):
    """Whether greedy decoding gives the whole answer; the question was unseen while the context was compressed."""
    key = id(press), context.context_ids
    if key not in _compressed:
        _compressed[key] = DynamicCache()
        with press(model):
            model(torch.tensor([context.context_ids]), past_key_values=_compressed[key])
    ids = torch.tensor([[*question.question_ids, *question.answer_ids]])
    # the compressed cache has forgotten how long the text was: say where the question stands
    places = torch.arange(ids.shape[1] - 1)[None] + len(context.context_ids)
    cache = copy.deepcopy(_compressed[key])
    logits = model(ids[:, :-1], past_key_values=cache, position_ids=places).logits[0]
    return logits[len(question.question_ids) - 1 :].argmax(-1).tolist() == list(question.answer_ids)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policies", nargs="*", default=["keydiff", "snapkv"], help="names, folders or hub ids")
    parser.add_argument("--contexts", type=int, default=4)
    arguments = parser.parse_args()
    main(arguments.policies, contexts=arguments.contexts)
