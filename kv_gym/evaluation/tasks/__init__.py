"""Tasks: what a decoding model is asked while a policy holds its cache."""

from kv_gym.evaluation.tasks.base import Task
from kv_gym.evaluation.tasks.names import parse_tasks
from kv_gym.evaluation.tasks.questions import (
    TaskContext,
    TaskQuestion,
    contexts_from_records,
    read_tasks,
    reference_tasks,
    tasks_hash,
)

__all__ = [
    "Task",
    "TaskContext",
    "TaskQuestion",
    "contexts_from_records",
    "parse_tasks",
    "read_tasks",
    "reference_tasks",
    "tasks_hash",
]
