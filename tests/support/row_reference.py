"""One row of a batch as a list of tokens and of what each could see: what any sequence of operations must equal.

Nothing here comes from kv_gym. A row is read anew from its first token every time, in one forward without a cache;
forking, cropping and reordering are copies and slices of lists.
"""

import copy

import torch
from tier_reference import rounded
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "row_reference"


class RowReference:
    """The tokens of one row, and cuts: from which token on which earlier ones were kept.

    Args:
        model: whose attention is replaced by the one here; not the model under test.
        bits: what is evicted stays visible in so many bits; None: it is gone.

    Attributes:
        tokens: ids.
        cuts: (first token that sees it, layer -> per KV head the set of positions before that token in full precision).
    """

    def __init__(self, model, bits=None):
        self.model, self.bits = model, bits
        self.tokens, self.cuts = [], []
        self.uncut_since = None  # of a fork with another budget: when it was last cut, to the budget before

    def fork(self):
        """An independent copy."""
        twin = copy.copy(self)
        twin.tokens, twin.cuts = list(self.tokens), list(self.cuts)
        return twin

    def cut(self, kept):
        """From the next token on only `kept` (layer -> per KV head a set of positions) is there in full."""
        self.cuts = [cut for cut in self.cuts if cut[0] < len(self.tokens)] + [(len(self.tokens), kept)]

    def crop(self, count):
        """Forget the newest `count` tokens."""
        length = len(self.tokens) - count
        self.tokens = self.tokens[:length]
        cuts = [(min(start, length), [[{p for p in head if p < length} for head in layer] for layer in kept])
                for start, kept in self.cuts]  # fmt: skip
        self.cuts = [cut for i, cut in enumerate(cuts) if i + 1 == len(cuts) or cuts[i + 1][0] > cut[0]]

    @torch.no_grad()
    def logits(self, tokens):
        """Take in tokens and return their logits `[new, vocabulary]`."""
        self.tokens += tokens
        AttentionInterface.register(NAME, self._attention)
        AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
        self.model.set_attn_implementation(NAME)
        return self.model(torch.tensor([self.tokens]), use_cache=False).logits[0, len(self.tokens) - len(tokens) :]

    def _attention(self, module, query, key, value, mask, scaling=None, **rest):
        n, group = query.shape[2], query.shape[1] // key.shape[1]
        output = torch.zeros_like(query)
        ends = [start for start, _ in self.cuts[1:]] + [n]
        for head in range(key.shape[1]):
            mine = slice(head * group, (head + 1) * group)
            k, v = key[0, head], value[0, head]
            first = self.cuts[0][0] if self.cuts else n
            self._attend(output, query, mine, range(first), set(), k, v, scaling)
            for (start, kept), end in zip(self.cuts, ends, strict=False):
                gone = set(range(start)) - kept[module.layer_idx][head]
                seen_keys, seen_values = self._rounded(k, gone), self._rounded(v, gone)
                hidden = gone if self.bits is None else set()
                self._attend(output, query, mine, range(start, end), hidden, seen_keys, seen_values, scaling)
        return output.transpose(1, 2).contiguous(), None

    def _attend(self, output, query, heads, rows, hidden, k, v, scaling):
        if not len(rows):
            return
        visible = torch.arange(len(k)) <= torch.tensor(list(rows))[:, None]
        visible[:, list(hidden)] = False
        scores = query[0, heads, rows.start : rows.stop] @ k.T * scaling
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        output[0, heads, rows.start : rows.stop] = weights @ v

    def _rounded(self, numbers, gone):
        if self.bits is None or not gone:
            return numbers
        numbers = numbers.clone()
        for position in gone:
            numbers[position] = torch.tensor(rounded(numbers[position].tolist(), self.bits, numbers.shape[1]))
        return numbers
