"""What the installed transformers calls the cache: `cache` since 5.24, `past_key_values` before.

5.24 still takes the older name, of arguments as of outputs, and warns once of it (`FutureWarning`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any


def with_cache(cache: Any) -> dict[str, Any]:
    """The keyword that hands a cache to a model's forward or to `generate()`: ``model(ids, **with_cache(cache))``."""
    return {_cache_name(): cache}


def cache_argument(arguments: Mapping[str, Any]) -> Any:
    """The cache among a forward's arguments, by either of its names, or None."""
    return arguments.get("cache", arguments.get("past_key_values"))


def output_cache(output: Any) -> Any:
    """The cache that a forward with ``use_cache=True`` gave back."""
    return getattr(output, _cache_name())


@functools.cache
def _cache_name() -> str:
    from transformers.modeling_outputs import BaseModelOutputWithPast  # here: transformers takes seconds

    names = {field.name for field in dataclasses.fields(BaseModelOutputWithPast)}
    return "cache" if "cache" in names else "past_key_values"
