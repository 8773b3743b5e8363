"""The command line of benchmarks that measure rows into a file, and write a page of docs/ from the committed ones."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kv_gym.evaluation.rows import read_result
from kv_gym.files import atomic_write

ROOT = Path(__file__).parents[1]


def measure_or_write(
    parser: argparse.ArgumentParser,
    results: Path,
    page: Path,
    run: Callable[[Path, int], None],
    text: Callable[[Mapping[str, Any]], str],
) -> None:
    """Do what the command line says.

    Args:
        parser: with the option ``--contexts``; ``--json`` and ``--page`` are added to it.
        results, page: the committed results and the page made of them, below the repository's root.
        run: measures so many contexts into a file.
        text: makes the page of results.
    """
    parser.add_argument("--json", type=Path, help="measure, and write the rows to this file")
    parser.add_argument("--page", action="store_true", help=f"write {page} from the committed results alone")
    arguments = parser.parse_args()
    if arguments.json is not None:
        run(arguments.json, arguments.contexts)
    if arguments.page or arguments.json == results:
        with atomic_write(ROOT / page) as part:
            part.write_text(text(read_result(ROOT / results)), encoding="utf-8")
