"""`kv-gym export`: a trained policy in a folder of its own."""

from __future__ import annotations

from pathlib import Path

from kv_gym.policies.scorer import Scorer


def export(policy: str | Path | Scorer, out: str | Path) -> Path:
    """Check a trained policy and write its weights, description and card into `out`.

    Raises:
        UserError: the policy is damaged, or `out` holds other things.
    """
    loaded = policy if isinstance(policy, Scorer) else Scorer.from_pretrained(policy)
    return loaded.save_pretrained(out)
