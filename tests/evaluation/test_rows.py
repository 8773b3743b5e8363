"""The schema of rows: complete rows, bad fields with file and line, and rows of earlier versions."""

import json

import pytest

from kv_gym.errors import UserError
from kv_gym.evaluation.rows import FIELDS, complete, read_result, read_rows, result, write_json, write_rows


def test_a_complete_row_has_every_field_and_keeps_those_of_a_benchmark():
    row = complete({"policy": "h2o", "budget": 8, "words": 512, "nll": float("nan")})
    assert set(FIELDS) | {"words"} == set(row)
    assert (row["allocation"], row["evicted"], row["task"], row["chosen_on_validation"]) == (
        "uniform",
        "drop",
        "",
        False,
    )
    assert (row["budget"], row["words"], row["nll"], row["contexts"]) == (8, 512, None, {})
    assert isinstance(row["budget"], int) and isinstance(complete(row | {"budget": 1.0})["budget"], float)
    assert complete(row) == row


def test_rows_of_earlier_versions_say_the_same():
    row = complete(
        {"policy": "a", "budget": 0.5, "asked": 8, "parts": {"x": {"asked": 8, "right": 3}}, "policy_bytes": 9}
    )
    assert (row["questions"], row["parts"], row["seed"]) == (8, {"x": {"questions": 8, "correct": 3}}, 0)


def test_null_is_absent():
    row = complete({"policy": "a", "budget": 0.5, "allocation": None, "task": None, "contexts": None})
    assert (row["allocation"], row["task"], row["contexts"]) == ("uniform", "", {})


def test_bad_rows_are_named_by_file_and_line(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"policy": "a", "budget": 1}, {"policy": "a", "budget": "1/4"}])
    with pytest.raises(UserError, match=r"a.jsonl, line 2: budget is '1/4'; expected a number"):
        read_rows(tmp_path)
    write_json(tmp_path / "b.json", result([{"policy": "a", "budget": 1, "slots": "many"}]))
    with pytest.raises(UserError, match=r"b.json, row 1: slots is 'many'; expected a list of numbers for each layer"):
        read_result(tmp_path / "b.json")
    (tmp_path / "c.jsonl").write_text('{"policy": "a", "budget": 1}\n{"pol\n{"policy": "a", "budget": 1}\n')
    with pytest.raises(UserError, match=r"c.jsonl, line 2: no JSON"):
        read_rows(tmp_path / "c.jsonl")


def test_a_line_that_is_being_written_is_left_out_and_a_whole_one_without_its_end_is_not(tmp_path):
    line = json.dumps({"policy": "a", "budget": 1})
    (tmp_path / "a.jsonl").write_text(f"{line}\n{line}")
    assert len(read_rows(tmp_path / "a.jsonl")) == 2
    (tmp_path / "a.jsonl").write_text(f"{line}\n{line[:-4]}")
    assert len(read_rows(tmp_path / "a.jsonl")) == 1
    assert read_rows(tmp_path / "none") == []
