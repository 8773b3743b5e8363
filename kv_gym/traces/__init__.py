"""Recorded contexts: what a model cached, and what its later queries attended to."""

from __future__ import annotations

from importlib import import_module

# name -> the file it lives in, imported on first use: recording takes transformers, reading does not
_HOMES = {
    "Continuation": "sequence",
    "Prompt": "prompts",
    "Sequence": "sequence",
    "StreamedTraces": "streamed",
    "TraceSet": "reader",
    "info": "summary",
    "load_model": "kv_gym.models.loading",
    "open_traces": "reader",
    "prompts_from_jsonl": "prompts",
    "prompts_from_text": "prompts",
    "read_prompts": "prompts",
    "record": "recorder",
    "record_sequence": "recorder",
    "show": "summary",
    "validate": "summary",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'kv_gym.traces' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name] if "." in _HOMES[name] else f"kv_gym.traces.{_HOMES[name]}"), name)
