"""Runs a model over continuations of recorded contexts whose slots can be switched off, with gradients.

Every slot has a gate: 1 keeps it, 0 evicts it, and the gradient of the gate says what the slot contributes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from kv_gym.devices import number_tensor, to_device
from kv_gym.errors import UserError
from kv_gym.models.attention import AttentionCall, attach, detach, full_layers
from kv_gym.models.cache_name import with_cache
from kv_gym.models.storeless_layer import StorelessLayer
from kv_gym.traces.sequence import Sequence

WORTHWHILE = 0.8  # of the slots: a layer that reads more of them reads all, which spares the selection


@dataclass(frozen=True)
class RecordedContexts:
    """Contexts of one model, padded to the longest; C contexts, L layers, H KV heads, n slots, d head dim.

    Attributes:
        keys, values: `[C, L, H, n, d]`.
        lengths: `[C]` int64 tokens of each context; what lies beyond is padding.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor

    @classmethod
    def of(
        cls,
        sequences: list[Sequence],
        device: torch.device | str = "cpu",
        tensors: Callable[[Sequence], tuple[Tensor, Tensor]] | None = None,
    ) -> RecordedContexts:
        """Stack the contexts on a device.

        Args:
            sequences: the contexts.
            device: where they are read.
            tensors: gives keys and values `[L, H, n, d]` of a context, for those that are on the device already; None:
                as they were recorded.

        Raises:
            UserError: a context of which only some slots were recorded.
        """
        for sequence in sequences:
            sequence.refuse_sampled("training through the model")
        lengths = number_tensor([len(sequence.tokens) for sequence in sequences], torch.device(device))
        n = max(len(sequence.tokens) for sequence in sequences)

        def stacked(parts: list[Tensor]) -> Tensor:
            padded = torch.stack([pad(part, (0, 0, 0, n - part.shape[2])) for part in parts])
            return to_device(padded, torch.device(device))

        pairs = [(tensors or recorded_tensors)(sequence) for sequence in sequences]
        return cls(stacked([keys for keys, _ in pairs]), stacked([values for _, values in pairs]), lengths)


def recorded_tensors(sequence: Sequence) -> tuple[Tensor, Tensor]:
    """Keys and values `[L, H, n, d]` as they were recorded, without a copy."""
    return torch.from_numpy(sequence.keys), torch.from_numpy(sequence.values)


def padded_continuations(
    sequences: list[Sequence], indices: list[list[int]], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Tokens of continuations, padded at the end, and a float mask of the real ones: both `[C, Q, m]`.

    Args:
        sequences: C contexts.
        indices: which of its continuations each context reads, Q for each.
        device: of the results.
    """
    rows = [
        torch.from_numpy(sequence.continuations[i].tokens)
        for sequence, chosen in zip(sequences, indices, strict=True)
        for i in chosen
    ]
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).float()
    shape = len(sequences), len(indices[0]), -1
    return to_device(tokens.view(shape), torch.device(device)), to_device(mask.view(shape), torch.device(device))


class MaskedContextLayer(StorelessLayer):
    """One layer: the contexts' slots, each times its gate, and the continuations' own tokens."""

    def __init__(self, keys: Tensor, values: Tensor, gates: Tensor, length: int):
        """`keys`, `values` `[C, H, n, d]`, `gates` `[C, H, n]`, and the tokens that count as seen."""
        self.context, self.gates, self.length = (keys, values), gates, length
        self.keys = self.values = None
        self.is_initialized = True

    def attend(self, call: AttentionCall) -> tuple[Tensor, None]:
        """Attention over gated slots and all earlier tokens of the continuation.

        The exponential of every slot is multiplied by its gate before the weights are divided by their sum.
        """
        dtype = torch.promote_types(call.query.dtype, torch.float32)
        device = call.query.device  # that of the layer: a model may lie on several
        keys, values, gates = (to_device(tensor, device).to(dtype) for tensor in (*self.context, self.gates))
        contexts, heads = keys.shape[:2]
        rows, query_heads, m, d = call.query.shape
        group = query_heads // heads
        query = call.query.to(dtype) * call.scaling
        # the queries of all continuations of a context together: [C, H, rows of C * group * m, d]
        by_context = query.reshape(contexts, -1, heads, group, m, d).transpose(1, 2).flatten(2, 4)
        past = by_context @ keys.transpose(-1, -2)
        own = torch.einsum("rhgid,rhjd->rhgij", query.view(rows, heads, group, m, d), call.key.to(dtype))
        later = torch.ones(m, m, dtype=torch.bool, device=own.device).triu(1)
        own = own.masked_fill(later, float("-inf"))
        highest = torch.maximum(
            _by_row(past.detach().amax(-1), contexts, rows, group, m), own.detach().amax(-1)
        )  # [R, H, G, m]
        past = past.sub_(_by_context(highest, contexts)[..., None]).exp_()
        # gates multiply the values, not the weights, which are by far the largest arrays here
        gated = past @ torch.cat((values * gates[..., None], gates[..., None]), -1)
        gated = _by_row(gated, contexts, rows, group, m)
        own = (own - highest[..., None]).exp()
        own_output = torch.einsum("rhgij,rhjd->rhgid", own, call.value.to(dtype))
        attended = (gated[..., :-1] + own_output) / (gated[..., -1:] + own.sum(-1, keepdim=True))
        return attended.flatten(1, 2).transpose(1, 2).to(call.query.dtype), None

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """The new tokens alone; transformers' mask is not used."""
        return (query_length if isinstance(query_length, int) else query_length.shape[0]), 0

    def get_seq_length(self) -> int:
        """Tokens that count as seen."""
        return self.length


def _by_row(tensor: Tensor, contexts: int, rows: int, group: int, m: int) -> Tensor:
    """`[C, H, rows of C * G * m, ...]`, the queries of a context together, to `[R, H, G, m, ...]`."""
    heads = tensor.shape[1]
    split = tensor.view(contexts, heads, rows // contexts, group, m, *tensor.shape[3:])
    return split.transpose(1, 2).flatten(0, 1)


def _by_context(tensor: Tensor, contexts: int) -> Tensor:
    """The inverse of :func:`_by_row`, for `[R, H, G, m]`."""
    return tensor.unflatten(0, (contexts, -1)).transpose(1, 2).flatten(2, 4)


class MaskedContextCache(Cache):
    """Contexts whose slots have gates; every forward of it runs one batch of continuations."""

    def __init__(self, contexts: RecordedContexts, gates: Tensor, read: Tensor | None = None):
        """`gates` is `[C, L, H, n]`, 0 where a slot is evicted, padding included; `read` says which slots are read.

        A slot that is not read has to have a gate of 0, and gets no gradient.
        """
        longest, layers = contexts.keys.shape[3], gates.shape[1]
        counts = [longest] * layers if read is None else read.sum(-1).amax((0, 2)).tolist()
        super().__init__(
            layers=[
                MaskedContextLayer(
                    *_slots_read(contexts, gates, layer, read if count < WORTHWHILE * longest else None, count), longest
                )
                for layer, count in enumerate(counts)
            ]
        )


def _slots_read(
    contexts: RecordedContexts, gates: Tensor, layer: int, read: Tensor | None, count: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Keys, values and gates of a layer, of the first `count` slots that every head reads (None: of all)."""
    keys, values, layer_gates = contexts.keys[:, layer], contexts.values[:, layer], gates[:, layer]
    if read is None:
        return keys, values, layer_gates
    # heads that read fewer slots than another are given some whose gates are 0
    slots = read[:, layer].int().argsort(dim=-1, descending=True, stable=True)[..., : max(1, count)]
    wide = slots[..., None].expand(-1, -1, -1, keys.shape[-1])
    return keys.gather(2, wide), values.gather(2, wide), layer_gates.gather(2, slots)


@contextmanager
def frozen_model(model) -> Iterator[None]:
    """Prepare a model for masked contexts, its weights fixed; everything is restored at the end.

    Raises:
        UserError: some layers of the model do not cache all tokens, so a recorded context does not hold what a
            continuation reads.
    """
    config = model.config.get_text_config()
    if len(full_layers(config)) != config.num_hidden_layers:
        raise UserError(
            f"{type(model).__name__} has layers without full attention, whose caches traces do not hold: train an "
            "agent that needs no model, such as joint"
        )
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    training = model.training
    attach(model)
    try:
        for weight in weights:
            weight.requires_grad_(False)
        model.eval()
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)
        model.train(training)
        detach(model)


def continuation_logits(
    model, contexts: RecordedContexts, gates: Tensor, tokens: Tensor, read: Tensor | None = None
) -> Tensor:
    """Logits `[C, Q, m, vocabulary]` of Q continuations of each context, under :func:`frozen_model`.

    Args:
        model: the transformers decoder that was recorded.
        contexts: C recorded contexts.
        gates: `[C, L, H, n]`.
        tokens: `[C, Q, m]` int64 continuations, padded at the end.
        read: `[C, L, H, n]` bool, slots that are read; all others have gates of 0. None: all of them.
    """
    count, per_context, m = tokens.shape
    starts = to_device(contexts.lengths, tokens.device).repeat_interleave(per_context)[:, None]
    out = model(
        input_ids=tokens.flatten(0, 1),
        position_ids=starts + torch.arange(m, device=tokens.device),
        **with_cache(MaskedContextCache(contexts, gates, read)),
        use_cache=True,
    )
    return out.logits.unflatten(0, (count, per_context))
