"""A full cache whose evicted pairs are replaced by hand: rounded numbers, or survivors merged in plain loops.

Nothing here comes from kv_gym: rounding is Python's, float16 is `struct`'s, loops go over tokens.
"""

import math
import struct

import torch
from masked_reference import MaskedReference


def half(x):
    """A number as float16 holds it, rounded by way of float32 as torch does."""
    (single,) = struct.unpack("<f", struct.pack("<f", x))
    return struct.unpack("<e", struct.pack("<e", single))[0]


def rounded(numbers, bits, group):
    """A list of floats in `bits` bits each: asymmetric, one scale and zero for every `group` of them."""
    out = []
    for start in range(0, len(numbers), group):
        part = numbers[start : start + group]
        scale, zero = half((max(part) - min(part)) / (2**bits - 1)), half(min(part))
        for x in part:
            code = 0 if scale == 0 else min(max(round((x - zero) / scale), 0), 2**bits - 1)
            out.append(code * scale + zero)
    return out


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(x * x for x in b))


class TieredReference(MaskedReference):
    """Tells evicted pairs from survivors by the positions that the cache kept, and treats them by `tier`.

    Args:
        tier: ``bits`` with `bits`, `group`, `balanced` and `most`; ``merge`` with `decay`; or ``merge:values``.

    Attributes:
        shown: (layer, row, head) -> positions in full precision.
        changed: (layer, row, head) -> position -> (key, value) lists of floats instead of the model's.
        thresholds: (layer, row, head) -> D2O's threshold.
    """

    def __init__(self, model, tier, bits=4, group=8, balanced=False, decay=0.5, most=None):
        super().__init__(model)
        self.tier, self.bits, self.group, self.balanced, self.decay = tier, bits, group, balanced, decay
        self.most = most
        self.shown, self.changed, self.thresholds, self.balance = {}, {}, {}, {}

    def _attention(self, module, query, key, value, mask, scaling=None, **rest):
        key, value = key.clone(), value.clone()
        for (layer, row, head), pairs in self.changed.items():
            if layer == module.layer_idx:
                for position, (k, v) in pairs.items():
                    key[row, head, position] = torch.tensor(k, dtype=key.dtype)
                    value[row, head, position] = torch.tensor(v, dtype=value.dtype)
        return super()._attention(module, query, key, value, mask, scaling, **rest)

    def evict(self, layer, kept):
        """Treat what is not among `kept [batch, kv_heads, k]` (-1 fills up) and was shown until now."""
        for row in range(len(kept)):
            for head in range(kept.shape[1]):
                place = layer, row, head
                stays = sorted(p for p in kept[row, head].tolist() if p >= 0)
                before = self.shown.get(place, (set(), 0))
                present = before[0] | set(range(before[1], self.cache.get_seq_length()))
                gone = sorted(present - set(stays))
                assert present >= set(stays)  # nothing comes back
                self.shown[place] = set(stays), self.cache.get_seq_length()
                keys, values = self.keys[layer][row, head].tolist(), self.values[layer][row, head].tolist()
                if self.tier == "bits":
                    self._round(place, gone, keys, values)
                elif gone and stays:
                    self._merge(place, gone, stays, keys, values)
        if self.tier != "bits":
            self.hide(layer, kept)
        elif self.most is not None:
            rows, heads = kept.shape[:2]
            visible = [self._visible(layer, row, head) for row in range(rows) for head in range(heads)]
            self.hide(layer, torch.stack(visible).unflatten(0, (rows, heads)))

    def _visible(self, layer, row, head):
        """Positions in full precision and the latest of the others, `[tokens seen]`, -1 fills up."""
        place = layer, row, head
        visible = [*self.shown[place][0], *sorted(self.changed.get(place, ()))[-self.most :]]
        return torch.tensor(visible + [-1] * (self.shown[place][1] - len(visible)))

    def _round(self, place, gone, keys, values):
        d = len(keys[0])
        if self.balanced and gone and place not in self.balance:
            layer, row, head = place
            group = self.queries[layer].shape[1] // self.keys[layer].shape[1]
            asked = self.queries[layer][row, head * group : (head + 1) * group].flatten(0, 1).tolist()
            self.balance[place] = [
                math.sqrt(max(abs(q[c]) for q in asked) / max(abs(k[c]) for k in keys)) for c in range(d)
            ]
        for position in gone:
            factors = self.balance.get(place, [1.0] * d)
            scaled = [x * b for x, b in zip(keys[position], factors, strict=True)]
            k = [x / b for x, b in zip(rounded(scaled, self.bits, self.group), factors, strict=True)]
            self.changed.setdefault(place, {})[position] = k, rounded(values[position], self.bits, self.group)

    def _merge(self, place, gone, stays, keys, values):
        found = {p: max((cosine(keys[p], keys[s]), s) for s in stays) for p in gone}
        joins = {}
        if self.tier == "merge":
            mean = sum(similar for similar, _ in found.values()) / len(found)
            before = self.thresholds.get(place)
            self.thresholds[place] = mean if before is None else self.decay * before + (1 - self.decay) * mean
            for p, (similar, s) in found.items():
                if similar >= self.thresholds[place]:
                    joins.setdefault(s, []).append((p, math.exp(similar)))
        else:
            for p, (similar, s) in found.items():
                mine, theirs = (math.sqrt(sum(x * x for x in values[i])) for i in (p, s))
                joins.setdefault(s, []).append((p, max(similar, 0) * mine / (mine + theirs)))
        for s, parts in joins.items():
            first = math.e if self.tier == "merge" else 1.0
            total = first + sum(weight for _, weight in parts)

            def mean_of(vectors, s=s, parts=parts, first=first, total=total):
                return [
                    (first * vectors[s][c] + sum(w * vectors[p][c] for p, w in parts)) / total
                    for c in range(len(vectors[s]))
                ]

            key = mean_of(keys) if self.tier == "merge" else keys[s]
            self.changed.setdefault(place, {})[s] = key, mean_of(values)
