"""Tasks as prompts to record: what a policy is trained on."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator

from kv_gym.errors import UserError
from kv_gym.evaluation.tasks.base import Task
from kv_gym.evaluation.tasks.scripted import ScriptedTask
from kv_gym.traces.prompts import Prompt


def prompts_of_tasks(tasks: Iterable[Task], split: str = "train") -> Iterator[Prompt]:
    """The contexts of tasks, each question with its answer as a continuation.

    Args:
        tasks: whose contexts are read in one piece, with questions behind them.
        split: of the traces, ``train`` or ``test``.

    Raises:
        UserError: a task of another form.
    """
    for task in tasks:
        scripts = task.scripts if isinstance(task, ScriptedTask) else []
        if not scripts or any(len(script.segments) != 1 or not script.questions for script in scripts):
            raise UserError(f"task {task.name!r} has no contexts with questions behind them; record another one")
        for script in scripts:
            ids = list(script.segments[0].ids)
            yield Prompt(
                id=re.sub(r"[^\w.-]+", "-", f"{task.name}-{script.id}"),
                context_ids=ids,
                continuation_ids=[[*asked.question_ids, *asked.answer_ids] for asked in script.questions],
                task=task.name,
                split=split,
                text_hash=hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16],
            )
