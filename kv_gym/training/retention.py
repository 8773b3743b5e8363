"""A picture of what a policy keeps: head by head, from the first token to the last."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from kv_gym.policies.scorer import GroupedScorer
from kv_gym.policies.scoring.inputs import DEFAULT
from kv_gym.traces.sequence import Sequence
from kv_gym.training.contexts import inputs_of

SHARE = 1 / 8  # of the slots that the picture's cut keeps
COLUMNS = 64
PIXELS = 6  # per row and column


class Retention:
    """Shares of kept slots over (layer, KV head) and position, averaged over a few contexts."""

    def __init__(self, sequences: list[Sequence], calibrated: bool, inputs: tuple[str, ...] = DEFAULT):
        """Read the networks' `inputs`; `calibrated` scores are cut by one threshold, others head by head."""
        self._inputs = [inputs_of(sequence, inputs) for sequence in sequences]
        self._calibrated = calibrated

    @torch.no_grad()
    def kept(self, network: GroupedScorer) -> NDArray[np.float64]:
        """`[heads, 64]`: of the slots in each of 64 stretches of a context, the share that an eighth keeps."""
        kept, there = np.zeros((network.heads, COLUMNS)), np.zeros(COLUMNS)
        for inputs in self._inputs:
            scores = network(inputs)
            n = scores.shape[1]
            rows = scores.view(1, -1) if self._calibrated else scores
            best = rows.topk(max(1, int(SHARE * rows.shape[1])), -1).indices
            mask = torch.zeros_like(rows).scatter_(1, best, 1.0).view(-1, n).numpy()
            column = np.arange(n) * COLUMNS // n
            np.add.at(kept.T, column, mask.T)
            np.add.at(there, column, 1)
        return kept / np.maximum(there, 1)

    def picture(self, network: GroupedScorer) -> NDArray[np.uint8]:
        """`[1, height, width]` grey: a row of blocks per head, white where everything stays."""
        blocks = (self.kept(network) * 255).round().astype(np.uint8)
        return blocks.repeat(PIXELS, 0).repeat(PIXELS, 1)[None]
