"""Load a transformers decoder and its tokenizer the way recording and live decoding need them.

Nothing that is loaded can run code: weights are safetensors or GGUF only, and ``trust_remote_code`` is off everywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kv_gym.errors import UserError, short_reason
from kv_gym.files import MODEL, SURROGATE, exists, read_json
from kv_gym.models.attention import refuse_unsupported

_DTYPES = ("auto", "float32", "float16", "bfloat16")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
_MOST_LAYERS = 4096
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def load_model(path_or_id: str | Path, device: str | None = None, dtype: str = "auto") -> tuple[Any, Any]:
    """A model in evaluation mode and its tokenizer. Code that comes with a model is never run.

    Args:
        path_or_id: a folder with ``config.json``, a ``.gguf`` file or a folder with one, from which nothing but local
            files is read; or a model's name on the Hub. Weights of a GGUF file are dequantised. A folder with nothing
            but a PEFT adapter gives the model that its ``adapter_config.json`` names, with the adapter merged.
        device: such as ``cpu`` or ``cuda``; ``auto`` spreads the model over all GPUs (needs accelerate); None takes
            CUDA where there is one.
        dtype: ``float32``, ``float16``, ``bfloat16``, or ``auto``: float32 on a CPU, the checkpoint's own on CUDA.

    Returns:
        The model, and its tokenizer, or None where it comes without the files of one.

    Raises:
        UserError: no such model, device or dtype, missing weights, files that cannot be read, a GGUF file without the
            extra ``gguf``, an adapter without peft or of a kind that cannot be merged, or a model that kv_gym does not
            support.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, logging

    if dtype not in _DTYPES:
        raise UserError(f"dtype {dtype!r} is not known; expected one of {', '.join(_DTYPES)}")
    if _holds_adapter_alone(Path(path_or_id)):
        return _load_adapted(Path(path_or_id), device, dtype)
    spread = device == "auto"
    if spread and find_spec("accelerate") is None:
        raise UserError("device 'auto' spreads a model over all GPUs, which needs accelerate: pip install accelerate")
    target = usable_device(None if spread else device)
    source = _Source.find(path_or_id)
    logging.disable_progress_bar()  # its bar would stand between ours
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what is missing is said below, in one sentence
    loaded_dtype = "float32" if dtype == "auto" and target.type == "cpu" else dtype
    try:
        config = AutoConfig.from_pretrained(**source.arguments, trust_remote_code=False)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise UserError(f"a model of type {config.model_type!r} is no decoder; expected a causal language model")
        source.refuse_other_size(config)
        with redirect_stderr(StringIO()) if source.gguf else nullcontext():  # another bar, which has no switch
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                **source.arguments, **source.loading_options(), config=config, dtype=loaded_dtype,
                device_map="auto" if spread else None,
                trust_remote_code=False, attn_implementation="sdpa", output_loading_info=True,
            )  # fmt: skip
    except Exception as error:  # of a damaged folder, transformers lets through whatever its parts raise
        hub = "" if source.local else " (and there is no folder of this name)"
        raise UserError(f"cannot load model {path_or_id}{hub}: {_reason(error)}") from None
    finally:
        logging.set_verbosity(verbosity)
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        named = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise UserError(
            f"model {path_or_id} comes without the weights {named}, which would be random numbers: copy all of its "
            "files, or save it again with save_pretrained"
        )
    refuse_unsupported(model)
    return (model if spread else model.to(target)).eval(), _load_tokenizer(source)


def _holds_adapter_alone(folder: Path) -> bool:
    return exists(folder / "adapter_config.json") and not exists(folder / "config.json")


def _load_adapted(folder: Path, device: str | None, dtype: str) -> tuple[Any, Any]:
    """The model that an adapter was made for, with the adapter merged, and the folder's tokenizer or the model's."""
    if find_spec("peft") is None:
        raise UserError(f"folder {folder} holds a PEFT adapter, which needs peft: pip install peft")
    config = read_json(folder / "adapter_config.json", "expected the configuration of a PEFT adapter")
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(base, str) or not base or _holds_adapter_alone(Path(base)):
        raise UserError(
            f"{folder / 'adapter_config.json'} names no model under base_model_name_or_path: write the folder or the "
            "name of the model that the adapter was trained on"
        )
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"folder {folder} holds no adapter_model.safetensors: save the adapter with save_pretrained")
    model, tokenizer = load_model(base, device, dtype)
    from peft import PeftModel

    try:
        adapted: Any = PeftModel.from_pretrained(model, str(folder)).merge_and_unload().eval()
    except Exception as error:  # peft lets through whatever its parts raise
        raise UserError(f"cannot merge the adapter in {folder} into {base}: {_reason(error)}") from None
    if any(any(folder.glob(part)) for part in ("tokenizer*", "vocab*", "*.model")):
        arguments = {"pretrained_model_name_or_path": folder, "local_files_only": True}
        tokenizer = _load_tokenizer(_Source(str(folder), arguments))
    return adapted, tokenizer


@dataclass(frozen=True)
class _Source:
    """Where a model is loaded from.

    Attributes:
        name: what the user gave.
        arguments: of transformers' ``from_pretrained``, for configuration, model and tokenizer alike.
        local: it lies on this machine.
        gguf: it is a GGUF file.
        tokenizer: it may come with a tokenizer.
    """

    name: str
    arguments: dict[str, Any]
    local: bool = True
    gguf: bool = False
    tokenizer: bool = True

    @classmethod
    def find(cls, path_or_id: str | Path) -> _Source:
        """Look at what a path or name stands for; a GGUF file is refused here by what its header says."""
        path, name = Path(path_or_id), str(path_or_id)
        if exists(path) and path.is_dir():
            files = sorted(path.glob("*.gguf"))
            if (path / "config.json").is_file():
                # transformers 5.2 makes up a tokenizer of three words where a folder has none
                has_tokenizer = any(any(path.glob(part)) for part in ("tokenizer*", "vocab*", "*.model"))
                arguments = {"pretrained_model_name_or_path": path_or_id, "local_files_only": True}
                return cls(name, arguments, tokenizer=has_tokenizer)
            if len(files) > 1:
                raise UserError(
                    f"folder {path_or_id} holds {len(files)} GGUF files and no config.json; name one of them, such as "
                    f"{files[0]}"
                )
            if not files:
                raise UserError(
                    f"folder {path_or_id} holds no config.json and no GGUF file; expected a model that save_pretrained "
                    "wrote, or one file NAME.gguf"
                )
            path = files[0]
        elif not (exists(path) and path.is_file()) or path.suffix.lower() != ".gguf":
            if exists(path) or not _HUB_NAME.fullmatch(name):
                raise UserError(
                    f"there is no model folder {path_or_id}; expected one with config.json, a GGUF file, or a name on "
                    "the Hub"
                )
            return cls(name, {"pretrained_model_name_or_path": name, "local_files_only": False}, local=False)
        arguments = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, "local_files_only": True}
        return cls(name, arguments, gguf=True, tokenizer=_read_gguf_header(path))

    def refuse_other_size(self, config) -> None:
        """Refuse a folder whose configuration is of a far larger model before memory is taken for that.

        Raises:
            ValueError: it has more layers than any model, or more than twice as many parameters as the files of weights
                have bytes; none takes less than four bits.
        """
        from transformers import AutoModelForCausalLM

        if (layers := getattr(config.get_text_config(), "num_hidden_layers", 0)) > _MOST_LAYERS:
            raise ValueError(f"config.json describes {layers} layers")
        files = list(Path(self.name).glob("*.safetensors")) if self.local and not self.gguf else []
        if not files or getattr(config, "quantization_config", None):
            return
        size = sum(file.stat().st_size for file in files)
        with torch.device("meta"):
            described = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        count = sum(parameter.numel() for parameter in described.parameters())
        if count > 2 * size + 2**24:  # loading finds out better reasons where that takes little memory
            raise ValueError(f"config.json describes {count} parameters, and the files of weights hold {size} bytes")

    def loading_options(self) -> dict[str, Any]:
        """Arguments of ``from_pretrained`` for the model alone: safetensors only, or plain weights of a GGUF file."""
        if not self.gguf:
            return {"use_safetensors": True}
        import transformers

        # older versions dequantise always and have no such class
        kind = getattr(transformers, "GgufConfig", None)
        return {} if kind is None else {"quantization_config": kind(dequantize=True)}


def _read_gguf_header(file: Path) -> bool:
    """Whether a GGUF file holds a tokenizer; one that cannot be loaded is refused before its weights are read."""
    if any(find_spec(package) is None for package in ("gguf", "accelerate")):
        raise UserError(f"reading {file} needs the extra gguf: pip install 'kv-gym[gguf]'")
    from gguf import GGUFReader

    try:
        fields = GGUFReader(file).fields
        parts = int(fields["split.count"].contents()) if "split.count" in fields else 1
        fields["general.architecture"].contents()  # transformers knows it or refuses it, before it reads weights
    except Exception:  # of a damaged file, its reader lets through what numpy raises
        raise UserError(f"{file} is damaged or no GGUF file; expected a whole one with its architecture") from None
    if parts > 1:
        raise UserError(f"{file} is one of {parts} parts of a model; join them first with llama-gguf-split --merge")
    return "tokenizer.ggml.model" in fields


def _load_tokenizer(source: _Source) -> Any:
    from transformers import AutoTokenizer

    if not source.tokenizer:
        return None
    try:
        return AutoTokenizer.from_pretrained(**source.arguments, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises nothing more special
        if not source.local and not _on_hub(source.name, _TOKENIZER_FILES):
            return None  # a model may come without one: prompts are then given as token ids
        raise UserError(
            f"the tokenizer of model {source.name} cannot be read: {_reason(error)}; repair its files, or upgrade "
            "transformers if a newer version wrote them"
        ) from None


def _on_hub(name: str, files: Sequence[str]) -> bool:
    """Whether a model on the Hub, or its copy in the Hub's cache, has one of these files."""
    from transformers.utils import cached_file

    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return any(cached_file(name, file, **quiet) is not None for file in files)


def recorded_tokenizer(name: str, expected_hash: str) -> Any:
    """The tokenizer with the hash `expected_hash`, where it is on this machine, else None; never a download.

    Args:
        name: what a trace set calls its model. Only a name of the Hub's form is looked up, in the Hub's cache: the
            set may be a stranger's, and no path that it names is opened.
        expected_hash: what :func:`tokenizer_hash` gave.
    """
    if not expected_hash:
        return None
    from transformers import AutoTokenizer

    is_path = Path(name).exists() or not _HUB_NAME.fullmatch(name)
    for source in (MODEL,) if is_path else (MODEL, name):
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        except Exception:  # as in `_load_tokenizer`
            continue
        if tokenizer_hash(tokenizer) == expected_hash:
            return tokenizer
    return None


def tokenizer_hash(tokenizer) -> str:
    """SHA-256 of what a tokenizer does, or "" for none."""
    if tokenizer is None:
        return ""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(rules.encode()).hexdigest()


def usable_device(device: str | None) -> torch.device:
    """A device that exists; None takes CUDA where there is one. Each process of torchrun has a GPU of its own.

    Raises:
        UserError: an unknown or missing device.
    """
    try:
        resolved = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"device {device!r} is not known; expected cpu, cuda or cuda:N") from None
    if resolved == torch.device("cuda") and "LOCAL_RANK" in os.environ:
        resolved = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {device!r} is not there ({torch.cuda.device_count()} CUDA devices found); use cpu")
    return resolved


def token_rows(model, rows: Sequence[Sequence[int]]) -> Tensor:
    """Token ids `[rows, tokens]` int64 on the model's device.

    Args:
        model: a transformers decoder.
        rows: lists of one length.

    Raises:
        UserError: an id that the model has no embedding for, which would end in an error of the device.
    """
    vocabulary = model.config.get_text_config().vocab_size
    largest = max((max(row) for row in rows if row), default=0)
    smallest = min((min(row) for row in rows if row), default=0)
    if largest >= vocabulary or smallest < 0:
        wrong = largest if largest >= vocabulary else smallest
        raise UserError(
            f"a text holds token id {wrong} and the model knows ids below {vocabulary}, from 0: make its ids "
            "with the tokenizer of this model"
        )
    return torch.tensor([list(row) for row in rows], dtype=torch.int64, device=model.device)


def refuse_too_long(model, tokens: int, what: str) -> None:
    """Raise a UserError where `what` has more tokens than the model has positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and tokens > limit:
        raise UserError(
            f"{what} has {tokens} tokens and the model {limit} positions: give a shorter one, or a model for longer "
            "contexts"
        )


def end_tokens(model) -> set[int]:
    """The tokens at which the model's generation ends."""
    ends = model.generation_config.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def plain_ids(tokenizer, text: str) -> list[int]:
    """Token ids of a text, without any token that the tokenizer sets before or behind it.

    Raises:
        UserError: a tokenizer that fails; or half of a surrogate pair, as which bytes of a command line that are no
            UTF-8 arrive.
    """
    if SURROGATE.search(text):
        raise UserError("a text holds half of a surrogate pair or bytes that are no UTF-8; expected text in UTF-8")
    try:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    except Exception as error:  # the tokenizers library raises nothing more special
        raise UserError(f"the model's tokenizer cannot read a text: {short_reason(error)}") from None


def text_ids(tokenizer, text: str) -> list[int]:
    """:func:`plain_ids` of a text in words that the tokenizer knows.

    Raises:
        UserError: most of the text is unknown to the tokenizer.
    """
    ids = plain_ids(tokenizer, text)
    unknown = ids.count(tokenizer.unk_token_id) if tokenizer.unk_token_id is not None else 0
    if unknown > len(ids) / 2:
        raise UserError(
            f"{unknown} of {len(ids)} tokens are unknown to the model's tokenizer; expected text in the words that it "
            "was made for"
        )
    return ids


def beginning_ids(tokenizer) -> list[int]:
    """The token that the tokenizer sets before a text, if any; an end token that it may add is left out."""
    ids = list(tokenizer("")["input_ids"])
    return ids[:1] if ids[:1] == [tokenizer.bos_token_id] else []


def _reason(error: Exception) -> str:
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    return short_reason(f"{first} {more[0]}" if first.endswith(":") and more else first)
