"""Progress of a training run: TensorBoard, a bar, and a picture of which slots the policy keeps."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kv_gym.policies.scoring.inputs import DEFAULT
from kv_gym.policies.scoring.network import ScoringNetwork
from kv_gym.progress import ProgressBar
from kv_gym.traces.sequence import Sequence
from kv_gym.training.learner import Metrics, sequence_inputs

KEPT_SHARE = 1 / 8  # of the slots that the picture's cut keeps
COLUMNS = 64
PIXELS = 6  # per row and column


class Monitor:
    """Writes scalars and pictures under ``<out>/tensorboard`` and shows a bar; use as a context manager.

    Baselines (oracle, heuristics) are runs of their own in folders below, so that they lie as flat lines in the
    same charts as the policy's utility.
    """

    def __init__(self, out: Path, label: str, steps: int, done: int = 0, progress: bool = True):
        from torch.utils.tensorboard import SummaryWriter

        self._folder, self._steps = out / "tensorboard", steps
        self._writer = SummaryWriter(str(self._folder), purge_step=done)
        self._bar = ProgressBar(label, steps, done, progress)

    def __enter__(self) -> Monitor:
        self._bar.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.__exit__()
        self._writer.close()

    def log_run(self, identity: Mapping[str, Any], baselines: Mapping[str, Mapping[str, float]]) -> None:
        """Write what is trained, as text, and flat lines for the baselines: name -> budget -> utility kept."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer.add_text("settings", f"```json\n{json.dumps(identity, indent=1)}\n```")
        for name, kept in baselines.items():
            with SummaryWriter(str(self._folder / name)) as writer:
                for step in (0, self._steps):
                    writer.add_scalar("validation/utility_kept", sum(kept.values()) / len(kept), step)
                    for budget, share in kept.items():
                        writer.add_scalar(_budget_tag("utility_kept", budget), share, step)

    def log(self, step: int, group: str, metrics: Metrics) -> None:
        """Write scalars as ``group/name``."""
        for name, value in metrics.items():
            self._writer.add_scalar(f"{group}/{name}", float(value), step)

    def log_validation(self, step: int, reward: float, kept: Mapping[str, float], oracle: Mapping[str, float]) -> None:
        """Write the held-out reward, the utility kept per budget and what the oracle keeps beyond it."""
        self._writer.add_scalar("validation/utility_kept", reward, step)
        for budget, share in kept.items():
            self._writer.add_scalar(_budget_tag("utility_kept", budget), share, step)
            self._writer.add_scalar(_budget_tag("regret_to_oracle", budget), oracle[budget] - share, step)
        self._bar.update(step, f"held-out reward {reward:.3f}")

    def log_image(self, step: int, image: NDArray[np.uint8]) -> None:
        """Write the retention picture `[1, height, width]`."""
        self._writer.add_image("retention at 1/8 (heads x positions)", image, step)

    def log_result(self, identity: Mapping[str, Any], reward: float) -> None:
        """Write the settings and the best held-out reward where TensorBoard compares runs by them."""
        from torch.utils.tensorboard.summary import hparams

        flat = {k: v for k, v in identity.items() if isinstance(v, int | float | str)}
        flat |= {k: v if isinstance(v, int | float | str) else str(v) for k, v in identity["settings"].items()}
        # add_hparams would open a second log file beside this one
        for summary in hparams(flat, {"held_out_reward": reward}):
            self._writer._get_file_writer().add_summary(summary)
        self._writer.add_scalar("held_out_reward", reward, self._steps)

    def advance(self, step: int) -> None:
        """Move the bar to `step`."""
        self._bar.update(step)


class RetentionPicture:
    """Shares of kept slots over (layer, KV head) and position, averaged over a few contexts.

    Args:
        sequences: the contexts.
        calibrated: whether one threshold cuts all heads; otherwise each head is cut alone.
        inputs: names of the networks' inputs.
        frequencies: that those inputs need, if any.
    """

    def __init__(
        self,
        sequences: Iterable[Sequence],
        calibrated: bool,
        inputs: tuple[str, ...] = DEFAULT,
        frequencies: Tensor | None = None,
    ):
        self._inputs = [sequence_inputs(sequence, inputs, frequencies) for sequence in sequences]
        self._calibrated = calibrated

    @torch.no_grad()
    def kept_shares(self, network: ScoringNetwork) -> NDArray[np.float64]:
        """`[heads, 64]`: the share of slots kept at a budget of 1/8 in each of 64 stretches of a context."""
        kept, count = np.zeros((network.heads, COLUMNS)), np.zeros(COLUMNS)
        for inputs in self._inputs:
            scores = network(inputs.to(network.mean.device)).cpu()
            n = scores.shape[1]
            rows = scores.view(1, -1) if self._calibrated else scores
            best = rows.topk(max(1, int(KEPT_SHARE * rows.shape[1])), -1).indices
            mask = torch.zeros_like(rows).scatter_(1, best, 1.0).view(-1, n).numpy()
            column = np.arange(n) * COLUMNS // n
            np.add.at(kept.T, column, mask.T)
            np.add.at(count, column, 1)
        return kept / np.maximum(count, 1)

    def image(self, network: ScoringNetwork) -> NDArray[np.uint8]:
        """`[1, height, width]` grey: a row of blocks per head, white where everything is kept."""
        blocks = (self.kept_shares(network) * 255).round().astype(np.uint8)
        return blocks.repeat(PIXELS, 0).repeat(PIXELS, 1)[None]


def _budget_tag(name: str, budget: str) -> str:
    return f"{name}/at_{budget.replace('/', '_')}"
