"""Traces that are recorded when they are asked for, and never written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kv_gym.errors import UserError
from kv_gym.models.loading import refuse_too_long
from kv_gym.models.wrapped_model import transformers_model
from kv_gym.policies import Policy, make_policy
from kv_gym.traces.prompts import Prompt
from kv_gym.traces.reader import TraceSet
from kv_gym.traces.recorder import LEAST_SLOTS, make_manifest, record_sequence
from kv_gym.traces.schema import Entry, prompt_hash
from kv_gym.traces.sequence import Sequence


class StreamedTraces(TraceSet):
    """A trace set without files: a context is recorded when it is asked for.

    It stands wherever a trace set does, :func:`kv_gym.training.train` in particular: what `memory` has no room for is
    dropped, and recorded again when it is drawn. Its hash is that of prompts, model and settings, so that an
    interrupted run goes on.

    Args:
        model: transformers decoder to record.
        prompts: contexts with continuations.
        tokenizer: whose hash the manifest is to carry, or None.
        slots, slot_seed, hidden, window, blocks: as for :func:`kv_gym.traces.record`.
        stats: policies with memory whose statistics to record, none by default.

    Raises:
        UserError: no prompts, two of one id, or one that is longer than the model's positions.
    """

    def __init__(
        self,
        model,
        prompts: Iterable[Prompt],
        tokenizer=None,
        *,
        slots: int | None = None,
        slot_seed: int = 0,
        hidden: bool = False,
        window: int = 32,
        blocks: int = 32,
        stats: Iterable[str | Policy] = (),
    ):
        self._model = transformers_model(model)
        listed = list(prompts)
        self._prompts = {prompt.id: prompt for prompt in listed}
        if not listed or len(self._prompts) < len(listed):
            raise UserError(
                f"{len(listed)} prompts have {len(self._prompts)} ids; expected at least one, and every id once"
            )
        if slots is not None and slots < LEAST_SLOTS:
            raise UserError(f"slots is {slots}; expected at least {LEAST_SLOTS}")
        for prompt in listed:
            refuse_too_long(self._model, prompt.tokens, f"prompt {prompt.id} with its longest continuation")
        self._settings: dict[str, Any] = {
            "slots": slots,
            "slot_seed": slot_seed,
            "hidden": hidden,
            "window": window,
            "blocks": blocks,
        }
        # settings that say a text's tokens, such as kvzip's instruction, are those of this tokenizer
        known = [
            make_policy(each) if tokenizer is None else make_policy(each).with_tokenizer(tokenizer) for each in stats
        ]
        if known:
            self._settings["stats"] = sorted(policy.statistics for policy in known)
        given = {name: value for name, value in self._settings.items() if value is not None}
        manifest = make_manifest(self._model, tokenizer, "auto", given, None)
        about = json.dumps([manifest["fingerprint"], self._settings])
        entries = []
        for ordinal, prompt in enumerate(listed):
            tokens, content = len(prompt.context_ids), prompt_hash(prompt.context_ids, prompt.continuation_ids)
            entry = {name: getattr(prompt, name) for name in ("id", "task", "split", "text_hash")}
            entry |= {"tokens": tokens, "slots": min(tokens, slots or tokens), "prompt": content, "ordinal": ordinal}
            digest = hashlib.sha256((content + about).encode()).hexdigest()
            counts = {"continuations": len(prompt.continuation_ids)}
            entries.append(Entry.model_validate(entry | counts | {"path": Path(), "digest": digest}))
        self._stats = tuple(known)
        super().__init__(entries, manifest)

    def _read(self, entry: Entry) -> Sequence:
        return record_sequence(self._model, self._prompts[entry.id], **self._settings | {"stats": self._stats})
