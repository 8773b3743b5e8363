"""The old place of :class:`~kv_gym.live.guard.GuardMonitor`, for one version."""

import warnings

from kv_gym.live.guard import GuardMonitor


def __getattr__(name: str):
    if name != "SafetyNet":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        "kv_gym.live.safety.SafetyNet is now kv_gym.live.guard.GuardMonitor; the old name goes with the next version",
        DeprecationWarning,
        stacklevel=2,
    )
    return GuardMonitor
