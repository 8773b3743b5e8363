"""Makes `traces/requests/sample.jsonl.gz`: the first requests of Mooncake's conversation trace, without their lengths.

    python traces/recipes/requests.py conversation_trace.jsonl.gz

The trace is Apache-2.0 (kvcache-ai/Mooncake, FAST25-release); see `traces/requests/NOTICE`.
"""

import gzip
import json
import sys
from itertools import islice
from pathlib import Path

REQUESTS = 1500
FILE = Path(__file__).parents[1] / "requests" / "sample.jsonl.gz"


def main(source: str) -> None:
    """Write the sample, byte for byte the same every time."""
    lines = []
    with gzip.open(source, "rt", encoding="utf-8") as log:
        for line in islice(log, REQUESTS):
            entry = json.loads(line)
            lines.append(json.dumps({"timestamp": entry["timestamp"], "hash_ids": entry["hash_ids"]}) + "\n")
    FILE.write_bytes(gzip.compress("".join(lines).encode(), 9, mtime=0))


if __name__ == "__main__":
    main(sys.argv[1])
