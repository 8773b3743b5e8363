"""Run the live tests under the oldest, a middle and the newest transformers: `make versions`.

Each version gets an environment of its own in `.versions/`, which sees the packages of `.venv` and holds only what
that transformers needs otherwise (itself, its tokenizers, its huggingface_hub), about 150 MB and ten seconds each.
Prints one line per version; the exit code is 1 if any failed, 2 if an environment could not be made.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / ".versions"
SHOWN = 10  # failures of a version that are named
WANTED = {"5.2": "transformers==5.2.*", "5.4": "transformers==5.4.*", "newest": "transformers"}


def environment(name, requirement):
    """The python of an environment with that transformers, made if it is not there yet."""
    folder = ENVIRONMENTS / name
    python, stamp = folder / "bin" / "python", folder / "ready"
    project = Path(sysconfig.get_path("purelib"))
    pinned = hashlib.sha256((ROOT / "constraints.txt").read_bytes()).hexdigest()  # `.venv` changed: make it anew
    made_for = f"{requirement} on {project} with {pinned}\n"
    # the newest is looked up each time; without a network the last one found does
    if stamp.is_file() and stamp.read_text() == made_for and (name != "newest" or not newer_than(python)):
        return python
    shutil.rmtree(folder, ignore_errors=True)
    call([sys.executable, "-m", "venv", "--without-pip", str(folder)])
    site = next((folder / "lib").glob("python*/site-packages"))
    # a folder named in a .pth file is searched after the environment's own, and pip takes what is there as installed
    (site / "project.pth").write_text(f"{project}\n")
    install(python, requirement)
    stamp.write_text(made_for)
    return python


def newer_than(python):
    """Whether a newer transformers than the environment's has been published."""
    try:
        asked = install(python, "transformers", "--dry-run", quiet=False)
    except subprocess.CalledProcessError:
        return False
    return "Would install" in asked


def install(python, requirement, *options, quiet=True):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), "install", "--upgrade"]
    return call([*pip, *(["--quiet"] if quiet else []), *options, requirement])


def call(command):
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout


def test(python, tests):
    """Exit code, transformers' version, and what pytest printed."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = lambda *command: subprocess.run(  # noqa: E731
        [python, *command], cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    version = run("-c", "import transformers; print(transformers.__version__)").stdout.strip()
    done = run("-m", "pytest", "-p", "no:cacheprovider", *tests)
    return done.returncode, version, (done.stdout + done.stderr).strip()


def main(names):
    tests = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "tests").glob("test_live_*.py"))
    worst = 0
    for name in names or WANTED:
        try:
            python = environment(name, WANTED[name])
        except subprocess.CalledProcessError as error:
            print(
                f"transformers {name}: no environment: {(error.stderr.strip().splitlines() or [error])[-1]}", flush=True
            )
            worst = 2
            continue
        began = time.perf_counter()
        code, version, printed = test(python, tests)
        summary = printed.splitlines()[-1].strip("= ") if printed else f"exit code {code}"
        took = f" [{time.perf_counter() - began:.0f} s]"
        print(f"transformers {version or name}: {'passed' if code == 0 else 'FAILED'}: {summary}{took}", flush=True)
        if code:
            failures = [line for line in printed.splitlines() if line.startswith(("FAILED", "ERROR"))]
            print("\n".join(f"    {line}" for line in failures[:SHOWN]), flush=True)
            worst = max(worst, 1)
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
