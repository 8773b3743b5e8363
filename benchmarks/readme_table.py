"""Write the result table of ``held_out.py`` into the README, between its markers."""

from __future__ import annotations

import argparse
from pathlib import Path

from kv_gym.evaluation.report import markdown, merged
from kv_gym.evaluation.result import read_json

START, END = "<!-- results -->", "<!-- /results -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--result", type=Path, default=Path("benchmarks/results/held_out.json"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--task", default="multi_key 1024")
    parser.add_argument("--budget", type=float, default=1 / 8)
    arguments = parser.parse_args()
    data = read_json(arguments.result)
    rows = [row for row in merged(data) if row["task"] == arguments.task]
    shown = [row for row in rows if row["policy"] == "full_cache" or row["budget"] == arguments.budget]
    for row in shown:  # folders of trained policies are shown by their agent
        row["policy"] = f"learned ({Path(row['policy']).name.split('-')[0]})" if "/" in row["policy"] else row["policy"]
    questions = max(row["n"] for row in shown)
    text = (
        f"{arguments.task.replace('_', '-')} words, an eighth of the cache, {questions} questions unseen while "
        f"compressing (`{data['command']}`):\n\n{markdown(shown)}"
    )
    page = arguments.readme.read_text()
    before, after = page.split(START)[0], page.split(END)[1]
    arguments.readme.write_text(f"{before}{START}\n{text}{END}{after}")


if __name__ == "__main__":
    main()
