"""The README's Python examples run as they stand."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from kv_gym.bundled import MODEL

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


def test_the_first_example_answers_from_half_the_cache():
    if not MODEL.is_dir():
        pytest.skip("the reference model is not in this checkout")
    assert len([line for line in EXAMPLES[0].splitlines() if line.strip()]) <= 12
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(EXAMPLES[0], str(README), "exec"), {})
    answer, size = printed.getvalue().rsplit(maxsplit=1)
    assert answer == "4 7" and int(size) > 0


def test_the_policy_example_keeps_the_contract():
    from kv_gym.testing import check_policy

    names: dict = {"__name__": "my_policy"}
    exec(compile(EXAMPLES[2], str(README), "exec"), names)
    check_policy(names["LargestValues"]())
    assert issubclass(names["LargestValues"], names["Policy"])


def test_the_environment_example_gives_a_reward():
    names: dict = {}
    exec(compile(EXAMPLES[1], str(README), "exec"), names)
    assert 0 <= names["reward"] <= 1 and names["terminated"]
