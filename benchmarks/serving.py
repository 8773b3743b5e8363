"""Time of a reply through the server, compared with the same generation in Python.

Random prompts of one length, new ones for every measurement, and replies of one length, in turns: in Python with the
session that the server uses, by OpenAI's client at once, and streamed. The clock stops with the last token. Needs the
packages fastapi, uvicorn, prometheus_client and openai.

Run: ``python benchmarks/serving.py --json benchmarks/results/serving.json``
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from statistics import median

import torch
from openai import OpenAI

from kv_gym.files import MODEL
from kv_gym.live.conversation import TextSession
from kv_gym.models import load_model
from kv_gym.models.loading import beginning_ids, plain_ids
from kv_gym.serving import make_server

POLICY, BUDGET = "keydiff", "1/8"


def measure(model, tokenizer, tokens: int, new: int, rounds: int) -> dict:
    """Median seconds of a reply in each way, and the ratios to Python."""
    draw = torch.Generator().manual_seed(0)
    ends = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = None  # replies of one length
    seconds: dict[str, list[float]] = {"python": [], "server": [], "stream": []}

    def prompt() -> str:
        return tokenizer.decode(torch.randint(10, len(tokenizer), (tokens,), generator=draw))

    def in_python() -> None:
        session = TextSession(model, tokenizer, POLICY, BUDGET)
        with session.cache:
            session.reply(beginning_ids(tokenizer) + plain_ids(tokenizer, prompt()), new)
            session.cut()

    settings = {"policy": POLICY, "budget": BUDGET, "port": 0, "name": "model", "max_tokens": new}
    with make_server(model, tokenizer, **settings, note=lambda _: None) as server:
        client = OpenAI(base_url=server.url, api_key="unused")

        def served(stream: bool) -> None:
            reply = client.completions.create(
                model="model", prompt=prompt(), max_tokens=new, temperature=0, stream=stream
            )
            if stream:
                assert list(reply)[-1].choices[0].finish_reason == "length"
            else:
                assert reply.usage.completion_tokens == new

        ways = {"python": in_python, "server": lambda: served(False), "stream": lambda: served(True)}
        for number in range(rounds + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                if number:  # the first round warms up
                    seconds[name].append(time.perf_counter() - start)
    model.generation_config.eos_token_id = ends
    typical = {name: median(times) for name, times in seconds.items()}
    ratios = {f"{name}_ratio": typical[name] / typical["python"] for name in ("server", "stream")}
    return {"tokens": tokens, "new": new, "rounds": rounds, **typical, **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=str(MODEL), help="folder or hub id (default: the bundled model)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model)
    rows = [measure(model, tokenizer, tokens, new, args.rounds) for tokens, new in ((64, 32), (512, 64))]
    print("| prompt | reply | Python, ms | server, ms | streamed, ms | server / Python | streamed / Python |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        times = " | ".join(f"{1000 * row[name]:.0f}" for name in ("python", "server", "stream"))
        print(f"| {row['tokens']} | {row['new']} | {times} | {row['server_ratio']:.2f} | {row['stream_ratio']:.2f} |")
    if args.json is not None:
        machine = {"cores": os.cpu_count(), "load_average": round(os.getloadavg()[0], 1)}
        args.json.write_text(json.dumps({"model": Path(args.model).name, **machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
