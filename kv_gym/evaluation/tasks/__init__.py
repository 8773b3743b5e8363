"""Tasks: what a model answers, or a recorded context replays, while a policy holds the cache.

A file of this package that registers a task (:func:`~kv_gym.evaluation.tasks.registry.register`) is found by itself.
"""

from kv_gym.evaluation.tasks.base import Task
from kv_gym.evaluation.tasks.questions import (
    TaskContext,
    TaskQuestion,
    contexts_from_records,
    group_by_task,
    read_tasks,
    reference_tasks,
    seen_questions,
    tasks_hash,
    unseen_questions,
)
from kv_gym.evaluation.tasks.registry import list_tasks, parse_tasks, register

__all__ = [
    "Task",
    "TaskContext",
    "TaskQuestion",
    "contexts_from_records",
    "group_by_task",
    "list_tasks",
    "parse_tasks",
    "read_tasks",
    "reference_tasks",
    "register",
    "seen_questions",
    "tasks_hash",
    "unseen_questions",
]
