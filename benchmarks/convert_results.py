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


def convert(text: str) -> str:
    """JSON or JSON lines with today's names; everything else stays byte for byte."""
    for old, new in RENAMED_POLICIES.items():
        text = re.sub(f'"{old}"', f'"{new}"', text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS)
    for file in sorted(parser.parse_args().folder.rglob("*.json*")):
        before = file.read_text(encoding="utf-8")
        after = convert(before)
        if after != before:
            file.write_text(after, encoding="utf-8")
            print(f"converted {file}")


if __name__ == "__main__":
    main()
