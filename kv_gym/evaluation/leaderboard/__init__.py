"""The leaderboard: policies x budgets x allocations x tasks x seeds, each cell measured once."""

from kv_gym.evaluation.leaderboard.page import accuracy_table, page
from kv_gym.evaluation.leaderboard.results import compact, publish
from kv_gym.evaluation.leaderboard.run import leaderboard
from kv_gym.evaluation.leaderboard.spec import Spec, read_spec
from kv_gym.evaluation.rows import read_rows

__all__ = ["Spec", "accuracy_table", "compact", "leaderboard", "page", "publish", "read_rows", "read_spec"]
