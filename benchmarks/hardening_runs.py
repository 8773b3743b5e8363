"""Long commands that are killed, run out of disk, are not permitted, or are not alone, for `hardening.py`.

Every command runs in a forked process that ends as an interpreter ends. What it leaves is compared with what the same
command leaves when nothing disturbs it.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hardening_sandbox import cpu_seconds, fork, silence

from kv_gym import cli
from kv_gym.traces import open_traces, validate

UNSTABLE = ("seconds", "milliseconds", "command", "versions", "sha256")
"""Parts of results that differ from run to run: times, and checksums of files with times in them."""
MOST_SECONDS = 900  # for one command, on a machine that does other things too


@dataclass(frozen=True)
class Command:
    """A command with what it leaves.

    Attributes:
        name: shown in the table.
        arguments: of `kv-gym`; OUT stands for the folder, or the file, that it writes.
        left: what is compared of it, as plain data.
        inputs: files, relative to the samples, that it reads.
    """

    name: str
    arguments: str
    left: Callable[[Path], Any]
    inputs: tuple[str, ...]

    def argv(self, samples: Path, out: Path) -> list[str]:
        """The arguments for a place."""
        return self.arguments.replace("SAMPLES", str(samples)).replace("OUT", str(out)).split()


def _left_traces(out: Path) -> Any:
    validate(out)
    return open_traces(out).hash


def _left_policy(out: Path) -> Any:
    weights = hashlib.sha256((out / "policy.safetensors").read_bytes()).hexdigest()
    return weights, _stable(json.loads((out / "policy.json").read_text())), (out / "checkpoint.pt").exists()


def _left_fit(out: Path) -> Any:
    return (
        _left_policy(out / "policy"),
        _stable(json.loads((out / "fit.json").read_text())),
        _left_traces(out / "traces"),
    )


def _left_rows(out: Path) -> Any:
    return [_stable(json.loads(line)) for line in (out / "rows.jsonl").read_text().splitlines()]


def _left_file(out: Path) -> Any:
    return _stable(json.loads(out.read_text())) if out.suffix == ".json" else out.stat().st_size > 1000


def _left_page_policy(out: Path) -> Any:
    return hashlib.sha256((out / "weights.safetensors").read_bytes()).hexdigest()


def _stable(data: Any) -> Any:
    if isinstance(data, dict):
        return {name: _stable(value) for name, value in data.items() if name not in UNSTABLE}
    return [_stable(value) for value in data] if isinstance(data, list) else data


RESUMED = (
    Command("record", "record --model SAMPLES/model --prompts SAMPLES/long_prompts.jsonl --out OUT --shard-size 2 "
            "--device cpu --no-progress", _left_traces, ("long_prompts.jsonl", "model/model.safetensors")),
    Command("train", "train joint --traces SAMPLES/traces --out OUT --steps 60 --hidden 8 --set every=5 --no-progress",
            _left_policy, ("traces/manifest.json",)),
    Command("fit", "fit --model SAMPLES/model --data SAMPLES/continuations.jsonl --out OUT --agent joint --steps 12 "
            "--tolerance 0.9 --budgets 1/2,1/4 --set every=4 --set hidden=4 --device cpu --no-progress",
            _left_fit, ("continuations.jsonl", "model/config.json")),
    Command("leaderboard", "leaderboard SAMPLES/leaderboard.yml --out OUT --workers 1 --no-progress", _left_rows,
            ("leaderboard.yml", "token_ids.jsonl")),
)  # fmt: skip
"""Commands that continue after an interruption."""

OTHERS = (
    Command("calibrate", "calibrate h2o --traces SAMPLES/traces --out OUT/file.json --no-progress",
            lambda out: _left_file(out / "file.json"), ("traces/manifest.json",)),
    Command("export", "export SAMPLES/policy --out OUT", _left_policy, ("policy/policy.safetensors",)),
    Command("export --tensors", "export SAMPLES/policy --tensors OUT/file.safetensors",
            lambda out: _left_file(out / "file.safetensors"), ("policy/policy.json",)),
    Command("evaluate", "evaluate --traces SAMPLES/traces --split all --policies recency,h2o --json OUT/file.json "
            "--no-progress", lambda out: _left_file(out / "file.json"), ("traces/manifest.json",)),
    Command("report", "report SAMPLES/results.json --out OUT/file.html", lambda out: _left_file(out / "file.html"),
            ("results.json",)),
    Command("pages train", "pages train clone SAMPLES/requests.keys --out OUT --capacity 4 --rounds 1 --steps 2 "
            "--hidden 4", _left_page_policy, ("requests.keys",)),
    Command("pages simulate", "pages simulate SAMPLES/requests.keys --policies lru,fifo --capacity 4 "
            "--json OUT/file.json", lambda out: _left_file(out / "file.json"), ("requests.keys",)),
)  # fmt: skip


class Runs:
    """Disturbed runs of commands.

    Args:
        samples: folder of samples, see `hardening_samples.py`.
        log: file of JSON lines with what came of each run; those that stand there are not repeated.
        seed: of all random moments.
    """

    def __init__(self, samples: Path, log: Path, seed: int):
        self.samples, self.log, self.seed = samples, log, seed
        self.rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
        self._undisturbed: dict[str, tuple[Any, float, int]] = {}

    def run(self, most: int | None, until: float) -> None:
        """Go on until there are `most` kills, or the monotonic clock shows `until`."""
        self._each_once(until)
        number = 0
        while time.monotonic() < until and (most is None or sum(row.get("kills", 0) for row in self.rows) < most):
            command = RESUMED[number % len(RESUMED)]
            self._once(f"kill {number}", command, self._kills)
            number += 1

    def _each_once(self, until: float) -> None:
        for command in (*RESUMED, *OTHERS):
            kinds: dict[str, Callable[..., dict]] = {
                "full disk": self._full_disk, "largest file": self._largest_file, "read-only folder": self._read_only,
                "unreadable input": self._unreadable,
            }  # fmt: skip
            if command in RESUMED:
                signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
                kinds |= {each.name: lambda *given, each=each: self._signal(each, *given) for each in signals}
                kinds["two writers"] = self._two_writers
            for kind, work in kinds.items():
                if time.monotonic() < until:
                    self._once(kind, command, work)

    def _once(self, kind: str, command: Command, work: Callable[[Command, Path, random.Random], dict]) -> None:
        """Do a run whose result is not known yet; it ends with ``outcome``: ``ok``, or what is wrong."""
        key = {"kind": kind, "command": command.name}
        if any(key.items() <= row.items() for row in self.rows):
            return
        place = self.log.parent / "run"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        row = key | work(command, place, random.Random(f"{self.seed} {kind} {command.name}"))
        shutil.rmtree(place)
        self.rows.append(row)
        with self.log.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def undisturbed(self, command: Command) -> tuple[Any, float, int]:
        """What a command leaves, the CPU seconds that it takes, and the bytes of the largest file."""
        if command.name not in self._undisturbed:
            place = self.log.parent / "undisturbed"
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            if self._stop(self._start(command, place), signal.SIGKILL, MOST_SECONDS) != 0:
                raise RuntimeError(f"{command.name} fails though nothing disturbs it: {self._said(place)[-500:]}")
            left, spent = command.left(place / "out"), float((place / "seconds").read_text())
            largest = max(file.stat().st_size for file in (place / "out").rglob("*") if file.is_file())
            self._undisturbed[command.name] = left, spent, largest
            shutil.rmtree(place)
        return self._undisturbed[command.name]

    # one run each

    def _kills(self, command: Command, place: Path, draw: random.Random) -> dict:
        """Kill it up to three times on its way, then let it end."""
        _, seconds, _ = self.undisturbed(command)
        kills = 0
        for _ in range(draw.randint(1, 3)):
            kills += self._stop(self._start(command, place), signal.SIGKILL, draw.random() * seconds) is None
        return {"kills": kills} | self._ends_well(command, place)

    def _signal(self, number: signal.Signals, command: Command, place: Path, draw: random.Random) -> dict:
        _, seconds, _ = self.undisturbed(command)
        code = self._stop(self._start(command, place), number, (0.2 + 0.6 * draw.random()) * seconds)
        if "Traceback" in (said := self._said(place)):
            return {"outcome": f"traceback: {said[-300:]}"}
        return {"code": code, "said": _last_line(said)} | self._ends_well(command, place)

    def _full_disk(self, command: Command, place: Path, draw: random.Random) -> dict:
        """On a file system that holds a part of what it writes; not without the right to mount one."""
        _, _, largest = self.undisturbed(command)
        disk = place / "disk"
        disk.mkdir()
        size = (int(largest * (0.3 + 0.5 * draw.random())) // 4096 + 1) * 4096  # whole pages
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True)
        if mounted.returncode:
            return {"outcome": "ok", "said": "left out: no right to mount a small disk"}
        if size > largest:  # then another file leaves no room
            (disk / "other").write_bytes(bytes(size))
        try:
            refused = self._refused(command, place, disk)
            partial = [file.name for file in disk.rglob("*.tmp*")]
            if (disk / "out").is_dir():
                shutil.copytree(disk / "out", place / "out")
        finally:
            subprocess.run(["umount", disk], check=True)
        if partial and refused["outcome"] == "ok":
            return refused | {"outcome": f"partial files stay: {partial}"}
        return refused if refused["outcome"] != "ok" else refused | self._ends_well(command, place)

    def _largest_file(self, command: Command, place: Path, draw: random.Random) -> dict:
        """With a limit on the size of files, and an earlier result where the command replaces one."""
        _, _, largest = self.undisturbed(command)
        earlier = self._earlier(command, place)
        limit = max(512, int(largest * (0.1 + 0.8 * draw.random())))  # what it prints must fit
        refused = self._refused(command, place, None, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        if earlier and refused["outcome"] == "ok" and _content(place / "out") != earlier:
            return refused | {"outcome": "the earlier output was touched"}
        return refused if refused["outcome"] != "ok" else refused | self._ends_well(command, place)

    def _read_only(self, command: Command, place: Path, draw: random.Random) -> dict:
        earlier = self._earlier(command, place)
        for folder in (place / "out", place):
            if folder.exists():
                folder.chmod(0o555)
        refused = self._refused(command, place, None, _without_rights)
        for folder in (place, place / "out"):
            if folder.exists():
                folder.chmod(0o755)
        if refused["outcome"] == "ok" and _content(place / "out") != earlier:
            return refused | {"outcome": "the earlier output was touched"}
        return refused if refused["outcome"] != "ok" else refused | self._ends_well(command, place)

    def _unreadable(self, command: Command, place: Path, draw: random.Random) -> dict:
        input_file = self.samples / draw.choice(command.inputs)
        (place / "out").mkdir()
        shutil.chown(place / "out", 65534) if os.getuid() == 0 else None
        input_file.chmod(0)
        try:
            refused = self._refused(command, place, None, _without_rights)
        finally:
            input_file.chmod(0o644)
        if refused["outcome"] == "ok" and any(file.is_file() for file in (place / "out").rglob("*")):
            return refused | {"outcome": "it left something behind"}
        return refused

    def _two_writers(self, command: Command, place: Path, draw: random.Random) -> dict:
        first = self._start(command, place)
        time.sleep(draw.random())
        second = self._start(command, place)
        codes = [self._stop(process, signal.SIGKILL, MOST_SECONDS) for process in (first, second)]
        said = self._said(place)
        if "Traceback" in said or not set(codes) <= {0, 2}:
            return {"outcome": f"exit codes {codes}: {said[-300:]}"}
        return {"codes": codes, "said": _last_line(said)} | self._ends_well(command, place)

    # what they are made of

    def _start(
        self, command: Command, place: Path, out: Path | None = None, before: Callable[[], None] = lambda: None
    ) -> int:
        """Run the command in a forked process; its id.

        Args:
            command: what to run.
            place: folder for what it prints, in the file ``said``.
            out: folder in which it writes ``out``; None: `place`.
            before: called in the process before the command.
        """

        def body() -> int:
            silence(place / "said")
            clock = (place / "seconds").open("w")  # while there are rights to open it
            torch.set_num_threads(1)
            "".encode("utf-8-sig")  # a codec is a module, which may not be readable without rights
            os.environ["HF_HUB_OFFLINE"] = "1"
            sys.argv = ["kv-gym", *command.argv(self.samples, (out or place) / "out")]
            before()
            code = 0
            try:
                cli.main()
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 1
            print(time.process_time(), file=clock, flush=True)
            ctypes.pythonapi.Py_Exit(code)  # libraries end as they do with the interpreter
            return code

        return fork(body)

    def _stop(self, process: int, number: signal.Signals, seconds: float) -> int | None:
        """Send a signal after so much CPU time; the exit code, None where the signal ended it."""
        began = time.monotonic()
        sent = False
        while True:
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                return None if sent and code == -number else code
            if not sent and (cpu_seconds(process) >= seconds or time.monotonic() - began > MOST_SECONDS):
                os.kill(process, number)
                sent = True
            time.sleep(0.005)

    def _refused(
        self, command: Command, place: Path, out: Path | None = None, before: Callable[[], None] = lambda: None
    ) -> dict:
        """Run it where it must fail: ``ok`` if it says why in one sentence and exits with 2."""
        (place / "said").unlink(missing_ok=True)
        code = self._stop(self._start(command, place, out, before), signal.SIGKILL, MOST_SECONDS)
        said = self._said(place)
        sentences = [line for line in said.splitlines() if line.startswith("kv-gym: ") and ": note: " not in line]
        if code == 2 and len(sentences) == 1 and "Traceback" not in said and said.strip().endswith(sentences[0]):
            return {"outcome": "ok", "said": sentences[0][:300]}
        return {"outcome": f"exit code {code}: {said[-500:]}"}

    def _ends_well(self, command: Command, place: Path) -> dict:
        """Run it to the end; ``ok`` if it leaves what it leaves undisturbed, and no partial files."""
        code = self._stop(self._start(command, place), signal.SIGKILL, MOST_SECONDS)
        if code != 0:
            return {"outcome": f"afterwards, exit code {code}: {self._said(place)[-300:]}"}
        if command.left(place / "out") != self.undisturbed(command)[0]:
            return {"outcome": "another result than undisturbed"}
        partial = [file.name for file in (place / "out").rglob("*.tmp*")]
        return {"outcome": f"partial files stay: {partial}"} if partial else {"outcome": "ok"}

    def _earlier(self, command: Command, place: Path) -> dict[str, str]:
        """Leave an earlier result where the command replaces one; those that continue would be done at once."""
        if command in RESUMED:
            return {}
        self._stop(self._start(command, place), signal.SIGKILL, MOST_SECONDS)
        for file in (place / "out").rglob("*"):
            file.chmod(0o666)
        return _content(place / "out")

    def _said(self, place: Path) -> str:
        file = place / "said"
        return file.read_text(errors="replace") if file.is_file() else ""

    def counts(self) -> dict[str, dict[str, int]]:
        """By command, and of all: kills, those after which the result was equal, other runs, those as expected."""
        found = {}
        for name in [*(command.name for command in (*RESUMED, *OTHERS)), "all"]:
            rows = [row for row in self.rows if name in (row["command"], "all")]
            killed, others = ([row for row in rows if ("kills" in row) == kind] for kind in (True, False))
            found[name] = {
                "kills": sum(row["kills"] for row in killed),
                "equal afterwards": sum(row["kills"] for row in killed if _is_ok(row)),
                "other disturbances": len(others),
                "as expected": sum(map(_is_ok, others)),
            }
        return found


def _is_ok(row: dict) -> bool:
    return row["outcome"] == "ok"


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1][:200]


def _without_rights() -> None:
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)


def _content(folder: Path) -> dict[str, str]:
    """Hash of every file in a folder."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
