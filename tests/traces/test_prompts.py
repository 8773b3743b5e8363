"""Prompts are read as they stand, get stable ids, and a bad line is named by its number."""

import json

import pytest

from kv_gym.errors import UserError
from kv_gym.traces import Prompt, prompts_from_jsonl, prompts_from_text


class Letters:
    """A tokenizer of single letters, `a` = 10, with a beginning token 1."""

    bos_token_id, unk_token_id = 1, None

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [1] * add_special_tokens + [ord(c) - 87 for c in text]}


class WithEnd(Letters):
    """The same, and it appends an end token 2 and prepends nothing."""

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [ord(c) - 87 for c in text] + [2] * add_special_tokens}


def jsonl(tmp_path, *lines):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_text_and_ids(tmp_path):
    path = jsonl(
        tmp_path,
        {"context": "abc", "continuations": ["d", "ef"], "task": "spell", "split": "test"},
        "",
        {"context_ids": [5, 6], "continuation_ids": [[7]], "id": "mine"},
    )
    first, second = prompts_from_jsonl(path, Letters())
    assert (first.context_ids, first.continuation_ids) == ([1, 10, 11, 12], [[13], [14, 15]])
    assert (first.task, first.split) == ("spell", "test")
    assert (second.id, second.context_ids, second.continuation_ids) == ("mine", [5, 6], [[7]])
    assert (second.task, second.split) == ("", "train")
    (without_beginning, _) = prompts_from_jsonl(path, WithEnd())
    assert without_beginning.context_ids == [10, 11, 12]


def test_null_means_absent(tmp_path):
    nothing = dict.fromkeys(("context_ids", "continuation_ids", "task", "split", "id"))
    plain, same = (
        next(prompts_from_jsonl(jsonl(tmp_path, {"context": "abc", "continuations": ["d"]} | more), Letters()))
        for more in ({}, nothing)
    )
    assert same == plain and (same.task, same.split) == ("", "train")


def test_ids_follow_from_place_and_content(tmp_path):
    lines = [{"context_ids": [1, 2], "continuation_ids": [[3]]}, {"context_ids": [1, 2], "continuation_ids": [[4]]}]
    first = [prompt.id for prompt in prompts_from_jsonl(jsonl(tmp_path, *lines))]
    assert [prompt.id for prompt in prompts_from_jsonl(jsonl(tmp_path, *lines))] == first
    changed = [prompt.id for prompt in prompts_from_jsonl(jsonl(tmp_path, lines[0], lines[0]))]
    assert changed[0] == first[0]
    assert len({*first, *changed}) == 3
    a, b = prompts_from_jsonl(jsonl(tmp_path, *lines))
    assert a.text_hash == b.text_hash != ""


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 2: no JSON"),
        ("[1]", "line 2 is no JSON object"),
        ({"context": "abc"}, "line 2 has no 'continuations'"),
        ({"continuations": ["a"]}, "line 2 has no 'context'"),
        ({"context_ids": [1, 2]}, "line 2 has no 'continuation_ids'"),
        ({"context": "", "continuations": ["a"]}, "line 2 has an empty context"),
        ({"context": "  ", "continuations": ["a"]}, "line 2 has an empty context"),
        ({"context_ids": [], "continuation_ids": [[1]]}, "line 2 has an empty context"),
        ({"context": "abc", "continuations": ["a", ""]}, "line 2 has an empty continuation"),
        ({"context_ids": [1, 2], "continuation_ids": [[]]}, "line 2 has an empty continuation"),
        ({"context": ["abc"], "continuations": ["a"]}, "line 2 holds something else than text"),
        ({"context": "abc", "continuations": "a"}, "line 2 holds something else than text"),
        ({"context_ids": [1, -2], "continuation_ids": [[1]]}, "line 2 holds something else than lists"),
        ({"context_ids": [1, True], "continuation_ids": [[1]]}, "line 2 holds something else than lists"),
        ({"context_ids": [1], "continuation_ids": [[1]]}, "line 2: .* context of 1 tokens"),
        (
            {"context_ids": [1, 2], "continuation_ids": [[1]], "task": "a\nb"},
            "line 2: .* control characters in its task",
        ),
        ({"context_ids": [1, 2], "continuation_ids": [[1]], "split": "dev"}, "line 2: .* split 'dev'"),
        ({"context_ids": [1, 2], "continuation_ids": [[1]], "id": "../x"}, "line 2: prompt id '../x'"),
        ({"context_ids": [1, 2], "continuation_ids": [[1]], "id": "a"}, "line 2 has the id 'a' of line 1"),
    ],
)
def test_a_bad_line_is_named(line, reason, tmp_path):
    path = jsonl(tmp_path, {"context_ids": [1, 2], "continuation_ids": [[3]], "id": "a"}, line)
    with pytest.raises(UserError, match=reason):
        list(prompts_from_jsonl(path, Letters()))


def test_files_that_hold_no_prompts(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        list(prompts_from_jsonl(tmp_path / "missing.jsonl"))
    with pytest.raises(UserError, match="holds no record"):
        list(prompts_from_jsonl(jsonl(tmp_path, "", " ")))
    (tmp_path / "latin.jsonl").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="line 1: not UTF-8"):
        list(prompts_from_jsonl(tmp_path / "latin.jsonl"))
    with pytest.raises(UserError, match="line 1 holds text and the model came without a tokenizer"):
        list(prompts_from_jsonl(jsonl(tmp_path, {"context": "abc", "continuations": ["a"]})))


def test_windows_of_a_text_follow_one_another(tmp_path):
    path = tmp_path / "abc.txt"
    path.write_text("abcdefghijklmnopqrst", encoding="utf-8-sig")
    prompts = list(prompts_from_text(path, Letters(), 4, 2, count=9))
    assert [p.context_ids for p in prompts] == [[1, 10, 11, 12], [1, 15, 16, 17], [1, 20, 21, 22], [1, 25, 26, 27]]
    assert [p.continuation_ids for p in prompts] == [[[13, 14]], [[18, 19]], [[23, 24]], [[28, 29]]]
    assert len({p.id for p in prompts}) == 4
    assert {(p.text_hash, p.split, p.task) for p in prompts} == {(prompts[0].text_hash, "train", "abc")}
    assert list(prompts_from_text(path, Letters(), 4, 2, count=2)) == prompts[:2]
    assert {p.split for p in prompts_from_text(path, Letters(), 4, 2, split="test")} == {"test"}


def test_texts_that_cannot_be_cut(tmp_path):
    path = tmp_path / "abc.txt"
    path.write_text("abc")
    with pytest.raises(UserError, match="3 tokens, and one window takes 5"):
        list(prompts_from_text(path, Letters(), 4, 2))
    with pytest.raises(UserError, match="without a tokenizer"):
        list(prompts_from_text(path, None))
    with pytest.raises(UserError, match="at least one window of 2"):
        list(prompts_from_text(path, Letters(), 1, 2))


def test_a_prompt_has_no_empty_parts():
    with pytest.raises(UserError, match="empty continuation"):
        Prompt("a", [1, 2], [[1], []])
