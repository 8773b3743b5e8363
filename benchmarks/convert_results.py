"""Bring the committed results to the names of today: ``python benchmarks/convert_results.py [FOLDER]``.

Only names change, never a number. Running it again changes nothing. Commands that made the results stay as they were
typed, since they ran with the version that the row names.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

RESULTS = Path(__file__).parent / "results"

RENAMED_POLICIES = {"uniform_order": "random"}
RENAMED_FIELDS = {"asked": "questions", "right": "correct"}  # of rows
RENAMED_COLUMNS = {"arm": "configuration"}  # of measurements


def convert(text: str, rows: bool) -> str:
    """JSON or JSON lines with today's names, those of rows where it holds `rows`; all else stays byte for byte."""
    for old, new in RENAMED_POLICIES.items():
        text = re.sub(f'"{old}"', f'"{new}"', text)
    for old, new in (RENAMED_FIELDS if rows else RENAMED_COLUMNS).items():
        text = text.replace(f'"{old}":', f'"{new}":')
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS)
    for file in sorted(parser.parse_args().folder.rglob("*.json*")):
        before = file.read_text(encoding="utf-8")
        after = convert(before, rows=file.suffix == ".jsonl")
        if after != before:
            file.write_text(after, encoding="utf-8")
            print(f"converted {file}")


if __name__ == "__main__":
    main()
