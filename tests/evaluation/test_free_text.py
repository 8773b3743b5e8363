"""Files of RULER and LongBench in their published form, and scores of free text."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kv_gym.errors import UserError
from kv_gym.evaluation import evaluate
from kv_gym.evaluation.configurations import Configuration, full_cache
from kv_gym.evaluation.tasks import answer_scores as scores
from kv_gym.evaluation.tasks import parse_tasks
from kv_gym.evaluation.tasks.free_text import FreeTextPrompt, without_middle
from kv_gym.evaluation.tasks.longbench import DATASETS, longbench, score_answer
from kv_gym.evaluation.tasks.ruler import ruler
from kv_gym.live import EvictingCache
from kv_gym.policies import make_policy
from kv_gym.reference.tokenizer import build_tokenizer, word_ids

NEEDLE = {
    "index": 7,
    "input": "remembered this .\nthe lamp was old . code Alice 4 7 . Bob sold the boat .\nquestion code Alice ?",
    "outputs": ["4", "7"],
    "length": 30,
    "length_w_model_temp": 30,
    "answer_prefix": " the code was",
    "token_position_answer": 9,
}
HOTPOT = {
    "input": "where was Bob ?",
    "context": "Alice was in the harbor . Bob was in the old mill .",
    "answers": ["the old mill", "mill"],
    "length": 12,
    "dataset": "hotpotqa",
    "language": "en",
    "all_classes": None,
    "_id": "a1",
}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(word_ids()), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, bos_token_id=1, eos_token_id=None, pad_token_id=0, initializer_range=0.4,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def write_lines(path, *lines):
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    return path


def test_a_ruler_line_is_context_and_last_line(tmp_path, tokenizer):
    file = write_lines(tmp_path / "niah_single_1" / "validation.jsonl", NEEDLE, NEEDLE | {"outputs": ["nine"]})
    task = ruler(file, tokenizer)
    first, second = task.prompts
    assert tokenizer.decode(first.context_ids) == (
        "<bos> remembered this . the lamp was old . code Alice 4 7 . Bob sold the boat ."
    )
    assert tokenizer.decode(first.question_ids) == "question code Alice ? the code was"
    assert (first.answers, first.score, first.max_new_tokens) == (("4", "7"), "all", 128)
    assert (task.name, task.trigger, first.id, second.id) == ("ruler niah_single_1", "prefill", "0", "1")
    assert task.score(" 7 and more", first) == 0.5
    seen = ruler(file, tokenizer, seen=True).prompts[0]
    assert seen.question_ids == () and seen.context_ids == (*first.context_ids, *first.question_ids)
    marked = ruler(file, tokenizer, marker="Bob sold").prompts[0]
    assert tokenizer.decode(marked.question_ids).startswith("Bob sold the boat . question")
    (few,) = parse_tasks(f"ruler:{file}:count=1:new=3:most=8", tokenizer)
    assert (few.contexts, few.prompts[0].max_new_tokens, len(few.prompts[0].context_ids)) == (1, 3, 8)


def test_ruler_scores_questions_by_any_answer(tmp_path, tokenizer):
    task = ruler(write_lines(tmp_path / "qa_1" / "validation.jsonl", NEEDLE), tokenizer)
    assert task.score("it is 7", task.prompts[0]) == 1.0
    file = write_lines(tmp_path / "niah.jsonl", NEEDLE)
    (task,) = parse_tasks(f"ruler:{file}:score=part", tokenizer)
    assert task.score("it is 7", task.prompts[0]) == 1.0 and task.name == "ruler niah"


def test_a_longbench_line_is_context_then_question(tmp_path, tokenizer):
    file = write_lines(tmp_path / "hotpotqa_e.jsonl", HOTPOT | {"dataset": "hotpotqa_e"})
    task = longbench(file, tokenizer)
    (prompt,) = task.prompts
    assert tokenizer.decode(prompt.context_ids) == f"<bos> {HOTPOT['context']}"
    assert tokenizer.decode(prompt.question_ids) == HOTPOT["input"]
    twice = write_lines(tmp_path / "twice.jsonl", HOTPOT, HOTPOT | {"input": "where was Alice ?"})
    assert [each.id for each in longbench(twice, tokenizer).prompts] == ["hotpotqa a1", "hotpotqa a1 1"]
    assert (prompt.id, prompt.max_new_tokens, prompt.answers) == ("hotpotqa_e a1", 32, ("the old mill", "mill"))
    assert task.score("in the mill", prompt) == pytest.approx(2 / 3)  # [in, mill] against [mill]
    template = tmp_path / "template.txt"
    template.write_text("question all : {input}\n{context}\nanswer {input} :")
    (asked,) = parse_tasks(f"longbench:{file}:template={template}", tokenizer)[0].prompts
    assert tokenizer.decode(asked.context_ids).startswith("<bos> question all <unk> where was Bob ? Alice was")
    assert tokenizer.decode(asked.question_ids) == "<unk> where was Bob ? <unk>"
    (seen,) = parse_tasks(f"longbench:{file}:seen", tokenizer)[0].prompts
    assert seen.context_ids == (*prompt.context_ids, *prompt.question_ids) and not seen.question_ids


def test_the_middle_of_a_long_context_is_left_out():
    assert without_middle([1, 2, 3, 4, 5, 6, 7], 5) == (1, 2, 3, 6, 7)
    assert without_middle([1, 2, 3], 1) == (1,)
    assert without_middle([1, 2, 3], 3) == without_middle([1, 2, 3], None) == (1, 2, 3)


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("policy", ["full_cache", "keydiff"])
def test_answers_are_greedy_generation(tmp_path, tokenizer, model, policy, seen):
    file = write_lines(tmp_path / "niah.jsonl", NEEDLE, NEEDLE | {"input": "a lamp .\nquestion size Bob ?"})
    task = ruler(file, tokenizer, seen=seen, max_new_tokens=6)
    texts = {}

    def keep(text, prompt):
        texts[prompt.id] = text
        return 0.25

    object.__setattr__(task, "score", keep)
    configuration = full_cache() if policy == "full_cache" else Configuration("keydiff", make_policy("keydiff"), 3)
    for batch in task.batches():
        ((_, (outcome,)),) = task.measure(model, batch, [configuration])
        assert (outcome.questions, outcome.correct, outcome.nll != outcome.nll) == (1, 0.25, True)
        (prompt,) = batch
        ids = [*prompt.context_ids, *prompt.question_ids]
        if policy == "full_cache":
            mask = torch.ones(1, len(ids), dtype=torch.int64)
            tokens = model.generate(torch.tensor([ids]), attention_mask=mask, max_new_tokens=6, do_sample=False)
            tokens = tokens[0, len(ids) :]
        else:
            cache = EvictingCache(model, "keydiff", 3)
            with torch.no_grad(), cache:
                last = model(input_ids=torch.tensor([prompt.context_ids]), past_key_values=cache).logits[0, -1]
                for token in prompt.question_ids:
                    last = model(input_ids=torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
                tokens = []
                for _ in range(6):
                    tokens.append(int(last.argmax()))
                    last = model(input_ids=torch.tensor([tokens[-1:]]), past_key_values=cache).logits[0, -1]
            assert outcome.slots.unique().tolist() == [3.0]
        assert texts[prompt.id] == tokenizer.decode(tokens, skip_special_tokens=True)


def test_generation_ends_at_the_models_end_token(tmp_path, tokenizer, model, monkeypatch):
    task = ruler(write_lines(tmp_path / "niah.jsonl", NEEDLE), tokenizer, max_new_tokens=6)
    texts = []
    object.__setattr__(task, "score", lambda text, prompt: texts.append(text) or 0.0)
    list(task.measure(model, task.batches()[0], [full_cache()]))
    whole = tokenizer(texts[0], add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [whole[2], 0])
    list(task.measure(model, task.batches()[0], [full_cache()]))
    assert tokenizer(texts[1], add_special_tokens=False)["input_ids"] == whole[: whole.index(whole[2]) + 1]


def test_a_table_over_files_of_all_kinds(tmp_path, tokenizer, model):
    needle = write_lines(tmp_path / "niah.jsonl", NEEDLE)
    hotpot = write_lines(tmp_path / "hotpotqa.jsonl", HOTPOT)
    mine = write_lines(
        tmp_path / "mine.jsonl", {"context": "code Bob 5 .", "question": "question code Bob", "answer": "5"}
    )
    names = f"ruler:{needle}:new=3,longbench:{hotpot},{mine},{mine}:seen"
    data = evaluate(["keydiff"], [4], model=model, tasks=parse_tasks(names, tokenizer), progress=False)
    assert [row["task"] for row in data["rows"][::2]] == ["ruler niah", "longbench hotpotqa", "mine", "mine seen"]
    assert {row["policy"] for row in data["rows"]} == {"full_cache", "keydiff"}
    assert [row["nll"] is None for row in data["rows"][::2]] == [True, True, False, False]
    json.dumps(data["rows"], allow_nan=False)


# measures, by hand


def test_string_matches():
    assert scores.match_all("The numbers are 12 and ABC.", ["12", "abc", "34"]) == pytest.approx(2 / 3)
    assert scores.match_part("It is abc", ["xyz", "ABC"]) == 1.0
    assert scores.match_part("It is", ["xyz", "ABC"]) == 0.0


def test_f1_of_words():
    assert scores.words("The  quick, (brown) fox's an") == ["quick", "brown", "foxs"]
    # 2 of 3 words texts, 2 of 4 words wanted: P = 2/3, R = 1/2
    assert scores.qa_f1("The red red fox!", "a red, old fox jumps") == pytest.approx(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5))
    assert scores.qa_f1("nothing", "fox") == scores.qa_f1("", "fox") == 0.0
    assert scores.qa_f1_characters("北京市。", "北京") == pytest.approx(0.8)


def test_rouge_l():
    # Lin 2004, section 3.1: "police kill the gunman" has LCS 2 with "police killed the gunman" less one word in four
    assert scores.longest_common("police killed the gunman".split(), "police kill the gunman".split()) == 3
    assert scores.rouge_l("police kill the gunman", "police killed the gunman") == pytest.approx(0.75)
    assert scores.rouge_l("the gunman kill police", "police killed the gunman") == pytest.approx(0.5)
    assert scores.rouge_l("", "a") == 0.0
    assert scores.rouge_l_characters("我 们", "我们好") == pytest.approx(0.8)


def test_classes_counts_paragraphs_and_code():
    classes = ["city", "state", "city hall", "date"]
    assert scores.classification("it is a city", "city", classes) == 1.0
    assert scores.classification("city or date", "city", classes) == 0.5
    assert scores.classification("the city hall", "city hall", classes) == 1.0  # "city" is part of it
    assert scores.classification("the city hall", "city", classes) == 0.5
    assert scores.classification("none of them", "city", classes) == 0.0
    assert scores.count("there are 5 or 6, so 5", "5") == pytest.approx(2 / 3)
    assert scores.count("many", "5") == 0.0
    assert scores.retrieval("Paragraph 3", "Paragraph 3") == 1.0
    assert scores.retrieval("3 or 13", "段落3") == 0.5
    assert scores.code_similarity("\n# so\nreturn a\nx", "return a") == 1.0
    assert scores.code_similarity("abcd", "abxd") == pytest.approx(6 / 8)
    assert scores.code_similarity("```", "abxd") == 0.0


def test_the_best_answer_counts_and_only_the_first_line_of_examples():
    prompt = FreeTextPrompt("x", (1,), (2,), ("seven lamps", "lamps"), 8, score="triviaqa")
    assert score_answer("\nlamps\nseven", prompt) == 1.0
    prompt = FreeTextPrompt("x", (1,), (2,), ("city",), 8, ("city", "date"), "trec_e")
    assert score_answer("city\ndate", prompt) == 1.0
    assert {name for name, _ in DATASETS.values()} <= set(dir(scores)) and len(DATASETS) == 22


CHOICES = {
    "_id": "b2", "domain": "Single-Document QA", "context": "Bob sold the boat .", "question": "Who sold it ?",
    "choice_A": "Alice", "choice_B": "Bob", "choice_C": "Carol", "choice_D": "nobody", "answer": "B", "dataset": None,
}  # fmt: skip


def test_a_line_of_longbench_v2_is_asked_with_its_choices(tmp_path, tokenizer):
    (task,) = parse_tasks(f"longbench:{write_lines(tmp_path / 'v2.jsonl', CHOICES)}", tokenizer)
    (prompt,) = task.prompts
    words = tokenizer.decode(prompt.question_ids).replace("<unk>", "").split()
    assert (prompt.id, prompt.answers, prompt.max_new_tokens) == ("longbench_v2 b2", ("B",), 128)
    assert words[:6] == ["sold", "it", "?", "Alice", "Bob", "Carol"] and "letter" in words
    assert task.score("The correct answer is (B).", prompt) == task.score("B", prompt) == 1.0
    assert task.score("The correct answer is (A)", prompt) == task.score("Bob", prompt) == 0.0
    refused = (({"answer": "Bob"}, "answer is .Bob.; expected the letter"), ({"choice_C": None}, "has no choice_C"))
    for change, sentence in refused:
        with pytest.raises(UserError, match=sentence):
            longbench(write_lines(tmp_path / "v2.jsonl", CHOICES | change), tokenizer)


def test_choices_by_hand():
    assert scores.choice("**The correct answer is (C)** since A and B", "C") == 1.0
    assert scores.choice("(D) nobody", "D") == scores.choice("d. The answer: A", "A") == 1.0
    assert scores.choice("A lamp was sold", "A") == scores.choice("", "A") == 0.0


BAD = {
    "no context": (longbench, HOTPOT | {"context": None}, "line 1 has no context"),
    "no answers": (longbench, HOTPOT | {"answers": []}, r"answers is \[\]; expected at least one text"),
    "no such dataset": (longbench, HOTPOT | {"dataset": "mine"}, "'mine' is none of LongBench's"),
    "no classes": (longbench, HOTPOT | {"dataset": "trec"}, "line 1 has no all_classes"),
    "no outputs": (ruler, NEEDLE | {"outputs": "4"}, "outputs is '4'; expected a list"),
    "one line": (ruler, NEEDLE | {"input": "all in one line"}, "has no line break before a question"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_lines_are_refused_in_one_sentence(tmp_path, tokenizer, name):
    read, line, message = BAD[name]
    with pytest.raises(UserError, match=message):
        read(write_lines(tmp_path / "file.jsonl", line), tokenizer)


def test_what_else_is_refused(tmp_path, tokenizer):
    file = write_lines(tmp_path / "file.jsonl", NEEDLE)
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "template.txt").write_text("{input}")
    with pytest.raises(UserError, match="no score 'some'"):
        ruler(file, tokenizer, score="some")
    with pytest.raises(UserError, match="has no 'Q:' before a question"):
        ruler(file, tokenizer, marker="Q:")
    for read in (ruler, longbench):
        with pytest.raises(UserError, match="holds no record"):
            read(tmp_path / "empty.jsonl", tokenizer)
        with pytest.raises(UserError, match="has no tokenizer"):
            read(file, None)
    for item, sentence in ((f"ruler:{file}:most=0", "most is 0"), (f"ruler:{file}:new=0", "new is 0")):
        with pytest.raises(UserError, match=sentence):
            parse_tasks(item, tokenizer)
    for options in ({"max_new_tokens": 0}, {"max_tokens": 0}):
        with pytest.raises(UserError, match=r"is 0, and an? .* has 1 token or more"):
            ruler(file, tokenizer, **options)
    with pytest.raises(UserError, match="holds no"):
        longbench(file, tokenizer, template=tmp_path / "template.txt")
    with pytest.raises(UserError, match="cannot be read"):
        longbench(file, tokenizer, template=tmp_path / "none.txt")
    (tmp_path / "template.txt").write_text("{context} {input}" + 100_000 * "x")
    with pytest.raises(UserError, match="larger than 100000 bytes"):
        longbench(file, tokenizer, template=tmp_path / "template.txt")
