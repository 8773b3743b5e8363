"""What installing the core brings, and how long importing it takes: ``python benchmarks/install_size.py --json FILE``.

Makes a virtual environment in a temporary folder, installs the package without extras and with the versions of
constraints.txt, and counts every distribution's files, without bytecode. torch comes from the index that pip is set to:
its builds for a GPU bring some gigabytes more. `kv_gym` is imported in new processes of the Python that runs this;
the time is the CPU's, which is longer while other work shares caches and cores, so the least of several counts.
``--import-only`` measures the time again and leaves the sizes of FILE as they are.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from kv_gym.files import atomic_write

ROOT = Path(__file__).parents[1]
MOST_SECONDS = 0.5  # of the CPU, for `import kv_gym`
# run by the new environment's Python
SIZES = """
import importlib.metadata, json, os
rows = {}
for found in importlib.metadata.distributions():
    files = [found.locate_file(file) for file in found.files or ()]
    rows[found.name] = [found.version, sum(os.path.getsize(file) for file in files if os.path.isfile(file))]
print(json.dumps(rows))
"""
IMPORT = "import time; began = time.process_time(); import kv_gym; print(time.process_time() - began)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the sizes and the time; says what changed in this file")
    parser.add_argument("--imports", type=int, default=9, help="processes that import kv_gym")
    parser.add_argument("--import-only", action="store_true", help="install nothing: sizes are those of FILE")
    arguments = parser.parse_args()
    if arguments.import_only and arguments.json is None:
        parser.error("--import-only needs --json FILE")
    found = json.loads(arguments.json.read_text()) if arguments.import_only else sizes()
    found |= import_time(arguments.imports)
    print(f"{len(found['distributions'])} distributions, {found['megabytes']:,.0f} MB; "
          f"import kv_gym: {found['import_seconds']['least']:.2f} s (at most {MOST_SECONDS})")  # fmt: skip
    if arguments.json is None:
        return
    before = json.loads(arguments.json.read_text())["distributions"] if arguments.json.is_file() else {}
    now = found["distributions"]
    for word, names in (("new", now.keys() - before.keys()), ("gone", before.keys() - now.keys())):
        print(f"{word}: {', '.join(sorted(names)) or 'none'}")
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(arguments.json) as part:
        part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def import_time(imports: int) -> dict:
    """Seconds of the CPU for `import kv_gym`, the least and the median of several processes."""
    run = [sys.executable, "-c", IMPORT]
    seconds = sorted(
        float(subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True).stdout) for _ in range(imports)
    )
    found = {"least": round(seconds[0], 3), "median": round(seconds[len(seconds) // 2], 3), "imports": imports}
    return {"import_seconds": found}


def sizes() -> dict:
    """Install into a new environment, and look at it."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder) / "bin" / "python")
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
        subprocess.run([*install, "-c", "constraints.txt", "."], cwd=ROOT, check=True, stdout=sys.stderr)
        listed = subprocess.run([python, "-c", SIZES], cwd=folder, check=True, capture_output=True, text=True).stdout
        there = {name: row for name, row in json.loads(listed).items() if name not in ("pip", "setuptools")}
    return {
        "command": "python benchmarks/install_size.py",
        "python": sys.version.split()[0],
        "megabytes": round(sum(size for _, size in there.values()) / 1e6, 1),
        "distributions": {
            name: {"version": version, "megabytes": round(size / 1e6, 2)}
            for name, (version, size) in sorted(there.items(), key=lambda item: -item[1][1])
        },
    }


if __name__ == "__main__":
    main()
