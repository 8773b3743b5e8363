"""Tasks by name, and questions in files: what is read, what is asked of the model, what is refused."""

import json
from pathlib import Path

import pytest
from tokenizers import processors

from kv_gym.errors import UserError
from kv_gym.evaluation import tasks as package
from kv_gym.evaluation.tasks import TaskContext, TaskQuestion, list_tasks, parse_tasks, read_tasks, unseen_questions
from kv_gym.evaluation.tasks.free_text import encode_prompt
from kv_gym.evaluation.tasks.registry import register, task_table
from kv_gym.files import MODEL
from kv_gym.reference.tokenizer import build_tokenizer


def write_lines(file, *lines):
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


# names


def test_every_file_that_registers_a_task_is_found():
    files = {file.stem for file in Path(package.__file__).parent.glob("*.py") if "@register(" in file.read_text()}
    assert files <= {kind.build.__module__.rpartition(".")[2] for kind in list_tasks().values()}
    assert {"copy", "dialogue", "fact", "file", "longbench", "multi_key", "ruler", "text"} <= set(list_tasks())


def test_the_table_names_every_task_and_option():
    lines = task_table().splitlines()[2:]
    assert len(lines) == len(list_tasks())
    for line, kind in zip(lines, list_tasks().values(), strict=True):
        assert kind.help and kind.help in line and all(f"`:{option}" in line for option in kind.options)
    assert "`ruler:FILE`" in task_table() and "`:new=`" in task_table()
    guide = Path(__file__).parents[2] / "docs" / "use-your-data.md"
    assert task_table() in guide.read_text()  # else print it there, between its marks


def test_options_are_the_parameters_of_the_function(monkeypatch):
    calls = []
    monkeypatch.setattr("kv_gym.evaluation.tasks.registry._REGISTERED", dict(list_tasks()))

    @register("mine:8", "a task of a test", most="max_tokens")
    def build(size: int = 8, loud: bool = False, max_tokens: int | None = None, label: str = "", tokenizer=None):
        calls.append((size, loud, max_tokens, label, tokenizer))
        return []

    parse_tasks("mine,mine:4:loud:most=3:label=a=b", "tokenizer")
    assert calls == [(8, False, None, "", "tokenizer"), (4, True, 3, "a=b", "tokenizer")]
    with pytest.raises(UserError, match="has no option max; it takes loud, most, label"):
        parse_tasks("mine:max=3")


REFUSED = {
    "": "no task in",
    "nothing": "'nothing' is neither a file nor known; known are continue, copy, dialogue",
    "copy:12": "multiple of 16",
    "dialogue:100": "turns of 128 words",
    "fact:100": "blocks of 64 words",
    "fact:x": "tokens is 'x' and no number",
    "multi_key:512:score=part": "has no option score; it takes seen, unseen, count, seed",
    "multi_key:512:count=0": "count is 0; expected 1 or more",
    "multi_key:512:count=x": "count is 'x' and no number",
    "multi_key:512:seed=1000": "from 0 to 999",
    "missing.jsonl": "missing.jsonl cannot be read",
    "text:missing.txt": "has no tokenizer",
    "ruler:": "'ruler:' names no file; expected a name such as ruler:FILE",
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_names_are_refused_in_one_sentence(name):
    with pytest.raises(UserError, match=REFUSED[name]):
        parse_tasks(name)


# questions in files


BAD_TASKS = {
    "missing": (None, "cannot be read"),
    "empty": ("\n", "holds no record"),
    "not json": ("{", "line 1: no JSON"),
    "no answer": ('{"context_ids": [1], "question_ids": [2]}', "has no answer"),
    "empty ids": ('{"context_ids": [1], "question_ids": [2], "answer_ids": []}', "answer_ids is no list"),
    "text without tokenizer": ('{"context": "a", "question": "b", "answer": "c"}', "has no tokenizer"),
}


@pytest.mark.parametrize("name", BAD_TASKS)
def test_bad_task_files_are_refused_in_one_sentence(tmp_path, name):
    text, sentence = BAD_TASKS[name]
    file = tmp_path / "tasks.jsonl"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=sentence):
        read_tasks(file)


def test_text_that_the_tokenizer_makes_nothing_of_is_quoted(tmp_path):
    (tmp_path / "tasks.jsonl").write_text('{"context": "a", "question": "b", "answer": "c"}')

    def tokenizer_without_b(text, **_):
        return {"input_ids": [] if text == "b" else [1]}

    tokenizer_without_b.bos_token_id = None

    with pytest.raises(UserError, match="line 1: the model's tokenizer makes no token of the question 'b'; give other"):
        read_tasks(tmp_path / "tasks.jsonl", tokenizer_without_b)


def test_lines_with_one_context_share_it(tmp_path):
    lines = [{"context_ids": [1, 2], "question_ids": [3], "answer_ids": [i], "task": "t"} for i in (4, 5)]
    lines.append({"context_ids": [1], "question_ids": [3], "answer_ids": [6], "task": "t"})
    (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, lines)))
    read = read_tasks(tmp_path / "tasks.jsonl")
    assert [len(context.questions) for context in read] == [2, 1]
    assert read[0].questions[1].answer_ids == (5,)


@pytest.mark.skipif(not MODEL.is_dir(), reason="the reference model is not in this checkout")
@pytest.mark.parametrize("wrong", [-1, 99999])
def test_ids_that_the_model_does_not_know_are_refused_in_one_sentence(wrong):
    from kv_gym import evaluate
    from kv_gym.models import load_model

    contexts = [TaskContext((1, 2, wrong), (TaskQuestion((5,), (7,)),))]
    with pytest.raises(UserError, match=f"token id {wrong} and the model knows ids below 1015, from 0"):
        evaluate(["recency"], ["1/2"], model=load_model(MODEL)[0], tasks=contexts, progress=False)


def test_null_means_absent(tmp_path):
    line = {"context": "code Bob 5 .", "question": "question code Bob", "answer": "5"}
    nulls = {"task": None, "context_ids": None, "choice_A": None}
    plain, same = (write_lines(tmp_path / "q.jsonl", each) for each in (line, line | nulls))
    tokenizer = build_tokenizer()
    assert read_tasks(plain, tokenizer) == read_tasks(same, tokenizer)
    assert [task.name for task in parse_tasks(str(same), tokenizer)] == ["q"]
    with pytest.raises(UserError, match="line 1 has no answer"):
        read_tasks(write_lines(tmp_path / "q.jsonl", line | {"answer": None}), tokenizer)


FOREIGN = {
    "choice_A": "LongBench v2: read it as longbench:FILE",
    "choices": "write all into the question",
    "outputs": "read it as ruler:FILE",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_keys_that_change_the_question_are_refused(tmp_path, name):
    line = {"context": "code Bob 5 .", "question": "question code Bob", "answer": "5", name: "x"}
    with pytest.raises(UserError, match=f"line 1 has a key '{name}', .*{FOREIGN[name]}"):
        read_tasks(write_lines(tmp_path / "q.jsonl", line), build_tokenizer())


def test_no_end_token_stands_between_context_and_question(tmp_path):
    tokenizer = build_tokenizer()
    line = {"context": "code Bob 5 .", "question": "question code Bob", "answer": "5"}
    file = write_lines(tmp_path / "q.jsonl", line)
    expected, prompt = read_tasks(file, tokenizer), encode_prompt(tokenizer, "code Bob 5 .", "question")
    assert expected[0].context_ids[0] == 1
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <pad>", special_tokens=[("<bos>", 1), ("<pad>", 0)]
    )
    assert tokenizer("code Bob")["input_ids"][-1] == 0
    assert read_tasks(file, tokenizer) == expected
    assert encode_prompt(tokenizer, "code Bob 5 .", "question") == prompt


def test_the_default_name_is_the_contexts_task():
    assert unseen_questions([TaskContext((1,), (TaskQuestion((2,), (3,)),), "mine")]).name == "mine"
