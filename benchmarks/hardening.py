"""Every file format under mutation, and every long command under kills, full disks, signals and other writers.

Part one damages a small valid sample of each format that kv_gym reads (`hardening_samples.py`) in ways that a disk, a
network, an editor or an attacker would (`hardening_mutations.py`), and reads it in a forked process with limits on time
and memory. Each mutation ends as one of:

    refused      one sentence (UserError)
    unchanged    the same data was read
    accepted     other data was read, and by right: no hash covers them, or the whole file was forged with its hashes
    traceback    any other exception, or a refusal that is no plain sentence
    signal       the process died
    hang         more than 20 seconds of CPU time
    memory       more than ten times the file (500 times where text becomes tokens) above what reading the sample takes,
                 and 16 MiB
    changed      other data was read although a hash should have told

Run: ``python benchmarks/hardening.py --minutes 60 --seed 0 --out runs/hardening``. The same folder goes on where it was
interrupted; every mutation depends on the seed, its format and its number alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hardening_mutations import mutate, restore
from hardening_runs import Runs
from hardening_samples import Format, digest, formats, make_samples
from hardening_sandbox import SLACK, attempt, in_fork, limit_memory, work_off

from kv_gym.evaluation.rows import versions, write_json
from kv_gym.markdown import pipe_table

BATCH = 20  # mutations for each forked process
OUTCOMES = ("refused", "unchanged", "accepted", "traceback", "signal", "hang", "memory", "changed")
FAULTS = OUTCOMES[3:]
FORGED = ("hdf5_structure",)  # with right checksums of the container: `trace validate` is there to find these


class Mutations:
    """Mutations of all formats, in rounds.

    Args:
        samples: folder of valid samples.
        log: file of JSON lines with what came of each mutation; those that stand there are not repeated.
        seed: of all mutations.
    """

    def __init__(self, samples: Path, log: Path, seed: int):
        self.samples, self.log, self.seed = samples, log, seed
        self.formats = {each.name: each for each in formats(samples)}
        self.rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []

    def run(self, most: int | None, until: float) -> None:
        """Go on until there are `most` mutations, or the monotonic clock shows `until`."""
        counts = Counter(row["format"] for row in self.rows)
        while time.monotonic() < until and (most is None or len(self.rows) < most):
            name = min(self.formats, key=lambda each: counts[each])
            size = BATCH if most is None else min(BATCH, most - len(self.rows))
            jobs = [{"format": name, "number": counts[name] + n} for n in range(size)]
            found = work_off(jobs, self._read_all)
            counts[name] += size
            self.rows += found
            with self.log.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in found)

    def _read_all(self, jobs: Iterable[dict]) -> Iterator[tuple[dict, dict]]:
        """Make and read the mutations of one format; called in a forked process."""
        jobs = list(jobs)
        form = self.formats[jobs[0]["format"]]
        with tempfile.TemporaryDirectory(dir=self.log.parent) as name:
            folder = Path(name)
            for needed in {*form.needs, Path(form.file).parts[0]}:
                copy = shutil.copytree if (self.samples / needed).is_dir() else shutil.copyfile
                copy(self.samples / needed, folder / needed)
            form.read(folder)  # imports and caches
            expected = digest(form.read(folder))
            gc.freeze()  # what is there by now is never garbage
            limit_memory()
            usual = attempt(lambda: digest(form.read(folder)), expected, SLACK)
            for job in jobs:
                yield job, self._read_one(form, folder, job["number"], expected, usual["bytes"])

    def _read_one(self, form: Format, folder: Path, number: int, expected: str, usual: int) -> dict[str, Any]:
        file, original = folder / form.file, self.samples / form.file
        try:
            how = mutate(file, form.kind, random.Random(f"{self.seed} {form.name} {number}"))
        except Exception as error:  # a mutation that this file does not allow leaves it as it was
            how = f"none ({type(error).__name__})"
        size = max(each.lstat().st_size for each in (file, original) if os.path.lexists(each))
        most = usual + form.bytes_for_each * size + SLACK
        result = attempt(lambda: digest(form.read(folder)), expected, most)
        restore(file, original)
        if result["outcome"] == "changed":
            result["detail"] = form.right or ("forged with the container's checksums" if how in FORGED else "")
            if form.name == "trace shard, validated":
                result["detail"] = ""
            result["outcome"] = "accepted" if result["detail"] else "changed"
        if result["outcome"] in ("refused", "unchanged"):
            result["detail"] = result["detail"][:120]
        return result | {"mutation": how}

    def counts(self) -> dict[str, dict[str, int]]:
        """How many mutations of each format, and of all, ended in which way."""
        found = {}
        for name in [*self.formats, "all"]:
            counts = Counter(row["outcome"] for row in self.rows if name in (row["format"], "all"))
            found[name] = {"mutations": counts.total()} | {outcome: counts[outcome] for outcome in OUTCOMES}
        return found


def markdown(counts: Mapping[str, Any]) -> str:
    """The counts of mutations and of runs as Markdown tables; ``counts`` as in the file of results."""
    firsts = {"mutations": "format", "runs": "command"}
    tables = []
    for part, first in firsts.items():
        rows = [[name, *(f"{count:,}" for count in row.values())] for name, row in counts[part].items()]
        tables.append(pipe_table([first, *counts[part]["all"]], rows))
    return "\n\n".join(tables)


def _samples(out: Path) -> Path:
    """The folder of samples, made where it is not there or not whole."""
    samples, ready = out / "samples", out / "samples.ready"
    if not ready.exists():
        shutil.rmtree(samples, ignore_errors=True)
        in_fork(lambda: make_samples(samples))
        for file in (samples, *samples.rglob("*")):  # commands read it as another user, too
            file.chmod(0o755 if file.is_dir() else 0o644)
        ready.touch()
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="time to spend")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder to go on in (default: a new one that is removed)")
    parser.add_argument("--mutations", type=int, help="at most so many (default: as many as half of the time allows)")
    parser.add_argument("--kills", type=int, help="at most so many (default: as many as the time allows)")
    parser.add_argument("--json", type=Path, help="also write the counts to this file")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # no TemporaryDirectory: its finaliser would remove the folder at the end of every forked command
    out = args.out or Path(tempfile.mkdtemp())
    try:
        samples = _samples(out)
        mutations = Mutations(samples, out / f"mutations-{args.seed}.jsonl", args.seed)
        runs = Runs(samples, out / f"runs-{args.seed}.jsonl", args.seed)
        began = time.monotonic()
        mutations.run(args.mutations, began + 30 * args.minutes)
        runs.run(args.kills, began + 60 * args.minutes)
        counts = {"mutations": mutations.counts(), "runs": runs.counts()}
        print(markdown(counts))
        faults = [row for row in mutations.rows if row["outcome"] in FAULTS]
        faults += [row for row in runs.rows if row["outcome"] != "ok"]
        for row in faults[:20]:
            print(json.dumps(row))
        if args.json:
            write_json(args.json, {"seed": args.seed, "versions": versions()} | counts)
    finally:
        if args.out is None:
            shutil.rmtree(out, ignore_errors=True)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
