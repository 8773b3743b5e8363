"""A model, a file of prompts, and how much may be lost: the smallest cache that does, and answers from it.

Run: ``python examples/fit_my_model.py --model path/to/model --data prompts.jsonl`` (bundled model and task by default).
"""

import argparse

import torch

from kv_gym.fit import fit, load_fit
from kv_gym.fit.data import read_data
from kv_gym.models import load_model
from kv_gym.reference import MODEL


def answer(model, cache, context: list[int], question: list[int], size: int) -> list[int]:
    """Greedy tokens that follow a question to a context that the cache has read and cut."""
    with cache.fork() as fork:  # the same context for every question
        ids = torch.tensor([[*context, *question]])
        said = model.generate(ids, past_key_values=fork, max_new_tokens=size, do_sample=False, pad_token_id=0)
    return said[0, -size:].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="folder or hub id of a transformers decoder")
    parser.add_argument("--data", default="reference", help="JSON lines with context, question and answer")
    parser.add_argument("--out", default="runs/fit")
    parser.add_argument("--tolerance", type=float, default=0.01, help="share of the questions that may be lost")
    parser.add_argument("--count", type=int, default=160, help="contexts to train on, at most")
    parser.add_argument("--steps", type=int, help="of the optimiser")
    arguments = parser.parse_args()

    model, tokenizer = load_model(arguments.model)
    more = {} if arguments.steps is None else {"steps": arguments.steps}
    done = fit(
        model, arguments.data, arguments.out, tokenizer=tokenizer, tolerance=arguments.tolerance,
        count=arguments.count, **more,
    )  # fmt: skip
    print(*done["verdict"], sep="\n")

    asked = read_data(arguments.data, tokenizer, count=arguments.count).test[0]
    context = list(asked.context_ids)
    with load_fit(model, arguments.out) as cache, torch.no_grad():
        model(torch.tensor([context]), past_key_values=cache)
        print(f"{cache.kept().sum()} slots hold {len(context)} tokens of {cache.kept().numel()} heads")
        for question in asked.questions:
            said = answer(model, cache, context, list(question.question_ids), len(question.answer_ids))
            print("right" if said == list(question.answer_ids) else "wrong", said)


if __name__ == "__main__":
    main()
