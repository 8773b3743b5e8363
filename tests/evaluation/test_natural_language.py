"""Tasks in natural language: splits, lengths, depths, the chat template, and what is pinned by hash."""

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kv_gym.errors import UserError
from kv_gym.evaluation import evaluate
from kv_gym.evaluation.tasks import needles, parse_tasks
from kv_gym.evaluation.tasks.natural_language import SPLITS, TEXTS, keys_of
from kv_gym.evaluation.tasks.prompts import prompts_of_tasks
from tests.support.traced_models import tiny_model

LETTERS = ["<unk>", "<s>", *map(chr, range(32, 127)), "\n"]
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}[end]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


@pytest.fixture(scope="module")
def letters():
    core = Tokenizer(models.WordLevel({text: number for number, text in enumerate(LETTERS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", chat_template=TEMPLATE)


@pytest.mark.parametrize(
    ("name", "pinned"),
    {
        "needle:2000:count=3": "2ec836cd3f686f55",
        "needle:2000:keys=4:count=3": "4a518442869756bf",
        "json:2000:count=3": "db340a6948ebac41",
        "continue:2000:count=3": "e38dcf66f51dd60d",
        "quote:2000:count=3": "01a08f4a92d14687",
        "told_once:3000:count=3": "a85c52d150bba88b",
        "needle:2000:split=train:count=4": "8688f6eae55acb3c",
        "told_once:3000:split=validation:count=3": "8f612dc44449a6b6",
    }.items(),
)
def test_questions_are_pinned(letters, name, pinned):
    (task,) = parse_tasks(name, letters)
    assert task.hash[:16] == pinned
    tokens = int(name.split(":")[1])
    for script in task.scripts:
        assert len(script.segments[0].ids) == tokens and script.questions
    (later,) = parse_tasks(name[:-1] + "1:first=2", letters)
    assert later.scripts[0] == task.scripts[2]  # a portion is the same as in the whole


@pytest.mark.parametrize("name", ["needle:2000:keys=3", "json:2000", "told_once:3000"])
def test_facts_stand_once_in_the_context_and_answers_follow_their_question(letters, name):
    (task,) = parse_tasks(f"{name}:count=2", letters)
    for script in task.scripts:
        context = letters.decode(script.segments[0].ids)
        assert context.startswith("[user]\n") and "[assistant]" not in context.rpartition("[user]")[2]
        for asked in script.questions:
            question, answer = letters.decode(asked.question_ids), letters.decode(asked.answer_ids)
            assert context.count(answer) == 1 and answer.isdigit() and answer not in question
            assert "[end]\n[assistant]\n" in question and question.endswith(" ")


def test_needles_lie_in_all_depths(letters):
    (task,) = parse_tasks("needle:2000:keys=4:count=8", letters)
    for script in task.scripts:
        context = letters.decode(script.segments[0].ids)
        places = [context.index(letters.decode(asked.answer_ids)) for asked in script.questions]
        assert places == sorted(places) and [asked.part for asked in script.questions] == [
            f"depth {n}" for n in (1, 2, 3, 4)
        ]
        assert all(abs(place / 2000 - (n + 0.5) / 4) < 0.25 for n, place in enumerate(places))


def test_splits_share_no_names_no_wordings_and_no_filler():
    for kind in (0, 1):
        names = [keys_of(split)[kind] for split in SPLITS]
        assert len({name for of in names for name in of}) == sum(map(len, names))
    statements = [wording.statement for split in SPLITS for wording in needles.WORDINGS[split]]
    assert len(set(statements)) == len(statements)
    assert len({(TEXTS / f"{split}.txt").read_text()[:200] for split in SPLITS}) == 3


def test_a_quotation_is_a_passage_of_the_context(letters):
    (task,) = parse_tasks("quote:900:count=1", letters)
    ids = task.scripts[0].segments[0].ids
    for asked in task.scripts[0].questions:
        passage = (*asked.question_ids, *asked.answer_ids)
        assert any(ids[start : start + 40] == passage for start in range(len(ids)))


def test_plain_text_where_there_is_no_template_and_filler_of_ones_own(letters, tmp_path):
    plain = PreTrainedTokenizerFast(tokenizer_object=letters.backend_tokenizer, unk_token="<unk>", bos_token="<s>")
    (tmp_path / "a.txt").write_text("The wind blew. It was cold!")
    (task,) = parse_tasks(f"needle:400:text={tmp_path}:count=1", plain)
    context = plain.decode(task.scripts[0].segments[0].ids)
    assert "The wind blew. It was cold!" in context and "[user]" not in context
    assert "\nAnswer: The special" in plain.decode(task.scripts[0].questions[0].question_ids)


REFUSED = {
    "needle:40": "has no room for what is asked",
    "needle:2000:split=dev": "there is no split 'dev'; expected train, validation, test",
    "needle:2000:keys=40": "40 keys are asked for; a context has up to",
    "quote:100": "do not fit into 100 tokens",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(letters, name):
    with pytest.raises(UserError, match=REFUSED[name]):
        parse_tasks(name, letters)


def test_a_template_that_loses_messages_is_refused(letters):
    odd = PreTrainedTokenizerFast(
        tokenizer_object=letters.backend_tokenizer, unk_token="<unk>", chat_template="{{ messages[0]['content'] }}"
    )
    with pytest.raises(UserError, match="leaves messages out"):
        parse_tasks("needle:2000", odd)


def test_rows_list_answers_one_by_one_and_tokens_of_quotations_count_alone(letters):
    model = tiny_model("llama", vocab_size=len(LETTERS), max_position_embeddings=4096, bos_token_id=1)
    tasks = [*parse_tasks("needle:400:keys=2:count=2", letters), *parse_tasks("quote:400:count=1", letters)]
    rows = evaluate(["recency"], [0.5], model=model, tasks=tasks, progress=False)["rows"]
    needle, quote = (
        next(row for row in rows if row["policy"] == "recency" and row["task"].startswith(name))
        for name in ("2 needles", "quote")
    )
    assert [len(answers) for answers in needle["answers"].values()] == [2, 2]
    for name, answers in needle["answers"].items():
        correct, questions, nll = needle["contexts"][name]
        assert sum(grade == 2 for grade, _ in answers) == correct and questions == 2
        assert sum(lost for _, lost in answers) / 7 == pytest.approx(nll, abs=1e-3)
    assert quote["answers"] is None and quote["questions"] == 8 * 16


def test_tasks_become_prompts_to_record(letters):
    tasks = parse_tasks("needle:400:keys=2:split=train:count=2", letters)
    prompts = list(prompts_of_tasks(tasks))
    assert [len(prompt.continuation_ids) for prompt in prompts] == [2, 2]
    assert prompts[0].id == "2-needles-400-train-0" and prompts[0].split == "train"
    with pytest.raises(UserError, match="no contexts with questions behind them"):
        list(prompts_of_tasks(parse_tasks("copy:16:count=1")))
