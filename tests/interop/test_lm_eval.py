"""lm-evaluation-harness itself on local tasks: its model `hf` at full budget, masked recomputation at a small one."""

import json
import logging

import pytest
import torch
from live_models import tiny
from masked_reference import MaskedReference
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kv_gym import EvictingCache
from kv_gym.errors import UserError

pytest.importorskip("lm_eval", reason="needs the extra lm-eval: pip install 'kv-gym[lm-eval]'")
pytestmark = pytest.mark.filterwarnings("ignore")

PASSAGES = [
    "the old lamp was sold by Alice to Bob",
    "Carol keeps a red boat beside the mill and a blue one in the barn",
    "Dave",
    "nobody knows who lit the fire behind the church last night but Erin saw smoke",
]
QUESTIONS = ["who sold it", "what is red", "who", "who saw it", "where is the fire"]
DOCS = [
    {"passage": PASSAGES[i % 4], "question": QUESTIONS[i % 5], "choices": ["Alice", "the mill", "Erin"], "gold": i % 3}
    for i in range(6)
]
SHARED = """
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
test_split: validation
fewshot_split: validation
fewshot_config: {{sampler: first_n}}
"""
CHOICE = (
    SHARED
    + """
task: local_choice
output_type: multiple_choice
doc_to_text: "{{{{passage}}}}s are told.\\nQuestion: {{{{question}}}}?\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}]
"""
)
GENERATE = (
    SHARED
    + """
task: local_generate
output_type: generate_until
doc_to_text: "{{{{passage}}}}s are told.\\nQuestion: {{{{question}}}}?\\nAnswer:"
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs: {{until: ["zz"], max_gen_toks: 5, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
)
ROLLING = (
    SHARED
    + """
task: local_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{passage}}}}"
metric_list: [{{metric: word_perplexity}}]
"""
)


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    """`run(model name, task, **options)` of the harness, with a tiny model whose tokens straddle a passage's end."""
    import datasets
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from kv_gym.interop.lm_eval import KVGymLM

    folder = tmp_path_factory.mktemp("tasks")
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    for number, task in enumerate((CHOICE, GENERATE, ROLLING)):
        (folder / f"task{number}.yaml").write_text(task.format(data=data))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    tokenizer = small_tokenizer()
    model = tiny(vocab_size=len(tokenizer), max_position_embeddings=512)

    def run(name, task, num_fewshot=0, chat=False, **options):
        lm = (KVGymLM if name == "kv_gym" else HFLM)(model, tokenizer=tokenizer, **options)
        loaded = manager.load([task])
        loaded["tasks"][task].set_config("num_fewshot", num_fewshot)
        found = evaluate(lm, loaded, apply_chat_template=chat, bootstrap_iters=0)
        samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
        return lm, [list(sample["arguments"]) for sample in samples], [sample["resps"] for sample in samples]

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return run, model, tokenizer


def small_tokenizer():
    """Byte pairs in which a passage's last word and the letter behind it are one token."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer, trained.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    texts = [f"{text}s are told.\nQuestion: {QUESTIONS[0]}?\nAnswer: Alice" for text in PASSAGES * 3]
    trained.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = (
        "{% for message in messages %}<s>{{ message['role'] }} {{ message['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant {% endif %}"
    )
    return tokenizer


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("local_choice", {"num_fewshot": 2}),
        ("local_generate", {"num_fewshot": 1, "chat": True}),
        pytest.param("local_choice", {"num_fewshot": 1, "chat": True}, marks=pytest.mark.slow),
        pytest.param("local_generate", {"num_fewshot": 2}, marks=pytest.mark.slow),
    ],
)
def test_full_budget_is_the_harness_own_model(harness, task, options):
    run, *_ = harness
    _, _, expected = run("hf", task, **options)
    for cut in ({}, {"context_field": "passage"}, {"context_end": "Question:"}):
        _, _, found = run("kv_gym", task, **options, budget=1.0, batch_size=4, **cut)
        if task == "local_generate":
            assert found == expected
        else:
            for ours, theirs in zip(found, expected, strict=True):
                assert [each[0][1] for each in ours] == [each[0][1] for each in theirs]
                assert torch.tensor([each[0][0] for each in ours]) == pytest.approx(
                    torch.tensor([each[0][0] for each in theirs]), abs=1e-6
                )


def kept_alone(model, ids, policy, budget, allocation):
    """The positions that a cache with this context alone keeps, layer by layer."""
    with EvictingCache(model, policy, budget, allocation=allocation) as cache, torch.no_grad():
        model(torch.tensor([ids]), past_key_values=cache)
        return {layer: cache.kept_positions(layer) for layer in cache.evicting_layers}


@pytest.mark.parametrize(("task", "allocation"), [("local_choice", "uniform"), ("local_generate", "global:softmax")])
def test_a_small_budget_is_masked_recomputation(harness, task, allocation):
    run, model, tokenizer = harness
    settings = {"policy": "knorm", "budget": 0.25, "allocation": allocation}
    _, arguments, found = run(
        "kv_gym", task, num_fewshot=1, batch_size=3, context_field={"local_*": "passage"}, **settings
    )
    changed = 0
    for doc, requests, responses in zip(DOCS, arguments, found, strict=True):
        for (prompt, wanted), (response,) in zip(requests, responses, strict=True):
            encoded = tokenizer(prompt, return_offsets_mapping=True)
            ids, end = encoded["input_ids"], prompt.rindex(doc["passage"]) + len(doc["passage"])
            cut = sum(stop <= end for _, stop in encoded["offset_mapping"])
            assert encoded["offset_mapping"][cut][0] < end  # a token straddles the cut
            reference = MaskedReference(model)
            reference(torch.tensor([ids[:cut]]))
            for layer, kept in kept_alone(model, ids[:cut], **settings).items():
                reference.hide(layer, kept)
            if task == "local_generate":
                assert response == greedy(reference, ids[cut:], tokenizer)
                changed += response != greedy(MaskedReference(model), ids, tokenizer)
                continue
            more = tokenizer(prompt + wanted)["input_ids"][len(ids) :]
            expected, plain = (
                logits[0, -len(more) :].log_softmax(-1).gather(1, torch.tensor(more)[:, None]).sum().item()
                for logits in (
                    reference(torch.tensor([ids[cut:] + more[:-1]])),
                    model(torch.tensor([ids + more[:-1]])).logits,
                )
            )
            assert response[0] == pytest.approx(expected, abs=1e-6)
            changed += abs(plain - expected) > 1e-3
    assert changed > len(DOCS) / 2  # eviction shows


def greedy(reference, ids, tokenizer):
    """Up to five new tokens as text, as the task wants them."""
    logits, new = reference(torch.tensor([ids])), []
    while len(new) < 5 and tokenizer.eos_token_id not in new:
        new.append(int(logits[0, -1].argmax()))
        logits = reference(torch.tensor([new[-1:]]))
    return tokenizer.decode(new, skip_special_tokens=True).split("zz")[0]


def test_what_it_kept_is_in_the_results(harness):
    run, *_ = harness
    lm, *_ = run("kv_gym", "local_choice", policy="knorm", budget=4, context_field="passage", batch_size=3)
    info = lm.get_model_info()["kv_gym"]
    assert info["contexts"] == 4  # six documents have four passages
    assert info["tokens_kept_per_head"] == pytest.approx((4 + 4 + 4 + 2) / 4)  # one passage has two tokens
    assert info["tokens_per_context"] > 8


def test_copies_of_a_request_draw_their_own_texts(harness):
    from lm_eval.api.instance import Instance

    from kv_gym.interop.lm_eval import KVGymLM

    _, model, tokenizer = harness
    lm = KVGymLM(model, tokenizer=tokenizer, policy="knorm", batch_size=4)
    wanted = {"do_sample": True, "temperature": 9.0, "max_gen_toks": 6, "until": []}
    asked = [Instance("generate_until", {}, ("the old lamp", wanted), 0, ("task", 0, 4))] * 4
    assert len(set(lm.generate_until(asked, disable_tqdm=True))) > 1
    greedily = [Instance("generate_until", {}, ("the old lamp", {"max_gen_toks": 6}), 0, ("task", 0, 2))] * 2
    assert len(set(lm.generate_until(greedily, disable_tqdm=True))) == 1


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("local_rolling", {}, "asks for rolling likelihoods of whole texts"),
        ("local_choice", {"context_field": "context"}, r"no text in the field 'context' \(fields with one: passage"),
        ("local_choice", {"context_end": "ASK"}, "does not have the text 'ASK' behind a context"),
        ("local_choice", {"context_end": "A", "context_field": "b"}, "give one of the two"),
        ("local_choice", {"batch_size": "auto"}, "batch_size is 'auto'; expected a number"),
        ("local_choice", {"policy": "oracle"}, "oracle"),
    ],
)
def test_refusals(harness, task, options, message):
    run, *_ = harness
    with pytest.raises(UserError, match=message):
        run("kv_gym", task, **options)
