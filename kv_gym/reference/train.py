"""Trains the reference model from the project's own generator: ``python -m kv_gym.reference.train``.

A curriculum of context lengths. A quarter of every batch is a random segment and its repetition, so that
induction heads form; the loss is cross-entropy on the answers plus 0.3 times that on every token.
Interrupted training resumes from the checkpoint in the output folder.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from kv_gym.checksums import read_checked, write_checked
from kv_gym.reference.generator import FIRST_HELD_OUT_SEED, make_context
from kv_gym.reference.tokenizer import build_tokenizer, encode, word_ids


@dataclass(frozen=True)
class Stage:
    """A stretch of the curriculum: contexts of up to `tokens` words for `steps` batches."""

    tokens: int
    rows: int
    steps: int
    repeat_share: float = 0.25


STAGES = (
    Stage(64, 96, 1600),
    Stage(128, 48, 1700),
    Stage(256, 24, 300),
    Stage(512, 12, 100, 0.1),
    Stage(1024, 6, 500, 0.05),
)
TASK_WEIGHTS = {
    "single": 2, "multi_key": 4, "multi_value": 1, "multi_query": 1, "variable_tracking": 1, "most_common": 0.5,
    "dialogue": 1,
}  # fmt: skip


def reference_config():
    """Llama architecture: hidden 192, 4 layers, 6 query and 3 KV heads of size 32, tied embeddings."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(word_ids()), hidden_size=192, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=6, num_key_value_heads=3, head_dim=32, max_position_embeddings=2048,
        tie_word_embeddings=True, bos_token_id=1, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip


def make_batch(stage: Stage, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids `[rows, n]` (0 pads) and a mask of the tokens that are answers, same shape."""
    rows, answers = [], []
    for _ in range(stage.rows):
        ids, is_answer = [1], [False]
        if rng.random() < stage.repeat_share:
            segment = rng.choices(range(3, len(word_ids())), k=rng.randrange(8, stage.tokens // 2))
            ids += segment * 2
            is_answer += [False] * len(segment) + [False] + [True] * (len(segment) - 1)
        else:
            task = rng.choices(list(TASK_WEIGHTS), list(TASK_WEIGHTS.values()))[0]
            # mostly the longest contexts, some shorter, so that every length stays known
            length = stage.tokens if rng.random() < 0.7 else rng.randrange(2, stage.tokens // 32 + 1) * 32
            context = make_context(task, length, rng.randrange(FIRST_HELD_OUT_SEED), questions=max(2, length // 32))
            ids += encode(context.words)
            is_answer += [False] * length
            for question in context.questions:
                ids += encode((*question.question, *question.answer, "."))
                is_answer += [False] * len(question.question) + [True] * len(question.answer) + [False]
        rows.append(torch.tensor(ids))
        answers.append(torch.tensor(is_answer))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True), pad(answers, batch_first=True)


def batch_loss(decoder, head, ids: torch.Tensor, is_answer: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The training loss, and the share of answer tokens that are predicted."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = decoder(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        real = ids[:, 1:] != 0
        logits = head(hidden[real]).float()
    target, is_answer = ids[:, 1:][real], is_answer[:, 1:][real]
    losses = F.cross_entropy(logits, target, reduction="none")
    correct = (logits.detach()[is_answer].argmax(-1) == target[is_answer]).float().mean().item()
    return losses[is_answer].mean() + 0.3 * losses.mean(), correct


def rate_factor(step: int, total: int) -> float:
    """Share of the peak rate: a warm-up, a slow cosine, and a straight line down over the last 500 steps."""
    cosine = 0.05 + 0.95 * (1 + math.cos(math.pi * min(1.0, step / 5900))) / 2
    return min(1.0, (step + 1) / 100) * cosine * min(1.0, (total - step) / 500)


def train_reference_model(
    out: Path, stages=STAGES, rate: float = 1.5e-3, seed: int = 0, save_every: int = 50, compiled: bool = True
) -> None:
    """Train to the end of the curriculum, resuming from ``out/checkpoint.pt``; writes the model into ``out/model``.

    The shipped weights are seed 0: 4,200 steps, 31 M tokens, about an hour on 2 cores.

    Args:
        out: folder of checkpoint and model.
        stages: the curriculum.
        rate: peak learning rate.
        seed: of weights and texts.
        save_every: steps between checkpoints.
        compiled: compile the decoder (needs a C++ compiler; 1.4 times as fast at 64 tokens).
    """
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(reference_config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.05)
    total = sum(stage.steps for stage in stages)
    step, checkpoint = 0, out / "checkpoint.pt"
    out.mkdir(parents=True, exist_ok=True)
    if checkpoint.exists():
        saved = torch.load(io.BytesIO(read_checked(checkpoint, "remove it to train from the start")), weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    start, tokens, accuracy = time.time(), 0, 0.0
    schedule = [stage for stage in stages for _ in range(stage.steps)]
    decoder = torch.compile(model.model, dynamic=True) if compiled else model.model
    while step < total:
        # measured on 2 cores: plain products win to 128 tokens (20k against 14k tokens/s at 64), fused ones beyond
        model.set_attn_implementation("eager" if schedule[step].tokens <= 128 else "sdpa")
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_factor(step, total)
        ids, is_answer = make_batch(schedule[step], random.Random(f"{seed}/{step}"))
        loss, share = batch_loss(decoder, model.lm_head, ids, is_answer)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        tokens += ids.numel()
        accuracy += (share - accuracy) / 20
        if step % 50 == 0:
            speed = tokens / (time.time() - start)
            line = {"step": step, "tokens": schedule[step - 1].tokens, "loss": round(loss.item(), 3)}
            print(json.dumps(line | {"accuracy": round(accuracy, 3), "tokens_per_s": round(speed)}), flush=True)
        if step % save_every == 0 or step == total:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            data = io.BytesIO()
            torch.save(state, data)
            write_checked(checkpoint, data.getvalue())
    model.bfloat16().save_pretrained(out / "model")
    build_tokenizer().save_pretrained(out / "model")


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/reference"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train_reference_model(arguments.out, seed=arguments.seed)


if __name__ == "__main__":
    _main()
