"""Load a transformers decoder and its tokenizer the way recording and live decoding need them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from kv_gym.errors import UserError
from kv_gym.models.attention import refuse_unserved

_DTYPES = ("auto", "float32", "float16", "bfloat16")


def load_model(path_or_id: str | Path, device: str | None = None, dtype: str = "auto") -> tuple[Any, Any]:
    """A model in evaluation mode and its tokenizer, or None where it has none. Weights are safetensors only.

    Args:
        path_or_id: a folder, from which nothing but local files is read, or a model's name on the Hub.
        device: such as ``cpu`` or ``cuda``; None takes CUDA where there is one.
        dtype: ``float32``, ``float16``, ``bfloat16``, or ``auto``: float32 on a CPU, the checkpoint's own on CUDA.

    Raises:
        UserError: no such model, device or dtype, or a model that kv_gym cannot serve.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, logging

    if dtype not in _DTYPES:
        raise UserError(f"dtype {dtype!r} is not known; expected one of {', '.join(_DTYPES)}")
    place = usable_device(device)
    local = Path(path_or_id).is_dir()
    if local and not (Path(path_or_id) / "config.json").is_file():
        raise UserError(f"folder {path_or_id} holds no config.json; expected a model that save_pretrained wrote")
    if not local and (Path(path_or_id).exists() or str(path_or_id).count("/") > 1 or str(path_or_id).startswith(".")):
        raise UserError(f"there is no model folder {path_or_id}; expected one with config.json, or a name on the Hub")
    logging.disable_progress_bar()  # its bar would stand between ours
    wanted = "float32" if dtype == "auto" and place.type == "cpu" else dtype
    try:
        config = AutoConfig.from_pretrained(path_or_id, local_files_only=local)
        model = AutoModelForCausalLM.from_pretrained(
            path_or_id, config=config, dtype=wanted, local_files_only=local, use_safetensors=True,
            attn_implementation="sdpa",
        )  # fmt: skip
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        missing = "" if local else " (and there is no folder of this name)"
        raise UserError(f"cannot load model {path_or_id}{missing}: {reason}") from None
    refuse_unserved(model)
    model.to(place)  # type: ignore[arg-type]  # transformers' wrapper hides the argument from mypy
    return model.eval(), _tokenizer(path_or_id, local)


def usable_device(device: str | None) -> torch.device:
    """A device that is there; None takes CUDA where there is one."""
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"device {device!r} is not known; expected cpu, cuda or cuda:N") from None
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {device!r} is not there ({torch.cuda.device_count()} CUDA devices found); use cpu")
    return place


def tokenizer_hash(tokenizer) -> str:
    """SHA-256 of what a tokenizer does, or "" for none."""
    if tokenizer is None:
        return ""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(rules.encode()).hexdigest()


def _tokenizer(path_or_id: str | Path, local: bool) -> Any:
    from transformers import AutoTokenizer

    # transformers 5.2 makes up a tokenizer of three words where a folder has none
    if local and not any(any(Path(path_or_id).glob(name)) for name in ("tokenizer*", "vocab*", "*.model")):
        return None
    try:
        return AutoTokenizer.from_pretrained(path_or_id, local_files_only=local)
    except (OSError, ValueError, KeyError, ImportError):
        return None  # a model may come without one: prompts are then given as token ids
