"""Tables in Markdown."""

from kv_gym.markdown import pipe_table


def test_text_stands_left_and_numbers_right():
    assert pipe_table(("a", "b"), [["x", "1"], ["y", "2"]]).splitlines() == [
        "| a | b |", "| --- | ---: |", "| x | 1 |", "| y | 2 |",
    ]  # fmt: skip
    assert pipe_table(("a", "b"), [], 2).splitlines()[1] == "| --- | --- |"
    assert pipe_table(("a", "b"), [], None).splitlines()[1] == "| --- | --- |"


def test_a_bar_in_a_cell_cuts_none_and_is_escaped_once():
    assert pipe_table(("a",), [["x | y"], ["x \\| y"]]).splitlines()[2:] == [r"| x \| y |", r"| x \| y |"]
