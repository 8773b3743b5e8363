"""The agent that trains through the model: it learns, it resumes, it refuses what it cannot use."""

import copy

import pytest
import torch
from traced_models import VOCABULARY, tiny_model

from kv_gym.errors import UserError
from kv_gym.policies.scorer import GroupedScorer, Scorer
from kv_gym.reference import MODEL
from kv_gym.reference.prompts import reference_prompts
from kv_gym.traces import Prompt, load_model, open_traces, record
from kv_gym.training import through_model, train, trainer
from kv_gym.training.end_to_end import EndToEnd, EndToEndSettings
from kv_gym.training.learner import sequence_inputs
from kv_gym.training.masked_context import (
    RecordedContexts,
    continuation_logits,
    frozen_model,
    padded_continuations,
)

FAST = {"steps": 60, "every": 30, "hidden": 16, "rate": 0.02, "smallest": 0.1, "largest": 0.3, "progress": False}


def draw(generator, n):
    return torch.randint(0, VOCABULARY, (n,), generator=generator).tolist()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A tiny random model, and contexts of two lengths with continuations of two lengths."""
    model = tiny_model("qwen3")
    prompts = []
    for i in range(12):
        generator = torch.Generator().manual_seed(i)
        context = draw(generator, 30 + 6 * (i % 2))
        prompts.append(Prompt(f"c{i}", context, [draw(generator, 5 + k % 2) for k in range(3)], text_hash=f"c{i}"))
    folder = tmp_path_factory.mktemp("end_to_end") / "traces"
    record(model, prompts, folder, progress=False)
    return model, open_traces(folder)


def random_cut(model, sequences, share):
    """Divergence of random cuts of the same total, written out here."""
    generator, divergences = torch.Generator().manual_seed(0), []
    for sequence in sequences:
        contexts = RecordedContexts.of([sequence])
        tokens, real = padded_continuations([sequence], [list(range(len(sequence.continuations)))])
        scores = torch.rand(contexts.keys.shape[:4], generator=generator)
        count = int(share * scores.numel())
        gates = torch.zeros(scores.numel()).scatter_(0, scores.flatten().topk(count).indices, 1.0).view_as(scores)
        with frozen_model(model), torch.no_grad():
            full = continuation_logits(model, contexts, torch.ones_like(gates), tokens).log_softmax(-1)
            cut = continuation_logits(model, contexts, gates, tokens).log_softmax(-1)
        divergences.append(float(((full.exp() * (full - cut)).sum(-1) * real).sum() / real.sum()))
    return sum(divergences) / len(divergences)


def test_it_learns_what_the_bundled_model_needs(tmp_path):
    """On contexts it was not trained on; random cuts and the untrained networks of the same seed are far worse."""
    model, tokenizer = load_model(MODEL)
    prompts = list(reference_prompts("multi_key", 128, 40, 4, "train", seed=7))
    traces = record(model, prompts, tmp_path / "traces", tokenizer=tokenizer, progress=False)
    settings = {"hidden": 16, "rate": 0.02, "smallest": 0.1, "largest": 0.1, "validation": 0.1, "progress": False}
    learned = train("end_to_end", traces, tmp_path / "learned", model=model, steps=120, every=120, **settings)
    untrained = train(
        "end_to_end", traces, tmp_path / "untrained", model=model, steps=1, every=1, **settings | {"rate": 0.0}
    )
    divergence = -learned.training["held_out_reward"]
    assert -untrained.training["held_out_reward"] > 1.0
    assert random_cut(model, traces.load()[::10], 0.1) > 1.0
    assert divergence < 0.3
    assert learned.comparable and learned.protection == (0, 0)


@pytest.mark.slow
def test_an_interrupted_run_ends_as_if_it_had_not_been(recorded, tmp_path, monkeypatch):
    model, traces = recorded
    whole = train("end_to_end", traces, tmp_path / "whole", model=model, **FAST)
    one_step = trainer.Trainer.train_step

    def stops(run):
        if run.step == 45:
            raise KeyboardInterrupt
        return one_step(run)

    monkeypatch.setattr(trainer.Trainer, "train_step", stops)
    with pytest.raises(KeyboardInterrupt):
        train("end_to_end", traces, tmp_path / "parts", model=model, **FAST)
    monkeypatch.undo()
    parts = train("end_to_end", traces, tmp_path / "parts", model=model, resume=True, **FAST)
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, parts.network.state_dict()[name])
    assert torch.equal(
        Scorer.from_pretrained(tmp_path / "parts").network.mean, whole.network.mean
    )  # and what was exported is what was trained


def test_the_models_weights_and_attention_are_as_before(recorded, tmp_path):
    model, traces = recorded
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    train("end_to_end", traces, tmp_path / "out", model=model, **FAST | {"steps": 3, "every": 3})
    assert model.config._attn_implementation == "sdpa"
    assert not model.training
    for name, weight in model.named_parameters():
        assert weight.requires_grad and weight.grad is None and torch.equal(weight, before[name])


def test_a_checkpoint_is_worth_its_divergence_and_the_full_cache_speaks_once_for_every_context(recorded, monkeypatch):
    """Against one pass of the model for every context and total, with the cut and its divergence written out here."""
    model, traces = recorded
    sequences = traces.load()[:3]
    settings = EndToEndSettings(hidden=8, smallest=0.1, largest=0.4, top=None)
    torch.manual_seed(0)
    network = GroupedScorer(sequences[0].keys.shape[0] * sequences[0].keys.shape[1], sequences[0].keys.shape[3], 8)
    learner = EndToEnd(settings, 0, network, model=model)
    learner.prepare(sequences)
    divergences = []
    for sequence in sequences:
        contexts = RecordedContexts.of([sequence])
        scores = network(sequence_inputs(sequence)).detach()
        for share in (0.1, 0.1 * 4 ** (1 / 3), 0.1 * 4 ** (2 / 3), 0.4):
            gates = torch.zeros(scores.numel())
            gates[scores.flatten().argsort(descending=True)[: int(share * scores.numel())]] = 1.0
            gates = gates.view(contexts.keys.shape[:4])
            far, tokens_there = 0.0, 0
            for continuation in sequence.continuations:
                tokens = torch.from_numpy(continuation.tokens)[None, None]
                with frozen_model(model), torch.no_grad():
                    full = continuation_logits(model, contexts, torch.ones_like(gates), tokens).log_softmax(-1)
                    cut = continuation_logits(model, contexts, gates, tokens).log_softmax(-1)
                far += float((full.exp() * (full - cut)).sum())
                tokens_there += tokens.numel()
            divergences.append(far / tokens_there)
    calls = []

    def counted(model, contexts, gates, *given):
        calls.append(bool((gates == 1).all()))
        return continuation_logits(model, contexts, gates, *given)

    monkeypatch.setattr(through_model, "continuation_logits", counted)
    assert learner.reward(None, sequences) == pytest.approx(-sum(divergences) / len(divergences), rel=1e-4)
    assert calls.count(True) == 3 and calls.count(False) == 12
    calls.clear()
    learner.reward(None, sequences)  # what the full cache says is kept
    assert not any(calls)
    monkeypatch.setattr(through_model, "CACHED_BYTES", 0)
    learner.prepare(sequences)
    assert learner.reward(None, sequences) == pytest.approx(-sum(divergences) / len(divergences), rel=1e-4)
    assert calls.count(True) == 12  # and asked for again where it would not fit


def learner_of(recorded, **settings):
    """A learner on two contexts with scores that are far apart, and the two."""
    model, traces = recorded
    sequences = traces.load()[:2]
    torch.manual_seed(0)
    network = GroupedScorer(sequences[0].keys.shape[0] * sequences[0].keys.shape[1], sequences[0].keys.shape[3], 8)
    learner = EndToEnd(EndToEndSettings(hidden=8, **settings), 0, network, model=model)
    learner.prepare(sequences)
    with torch.no_grad():
        network.weights[-1] *= 400
    return learner, sequences


@pytest.mark.parametrize("top", [4, 16, VOCABULARY])
def test_the_highest_log_probabilities_lose_no_more_than_the_divergence_within_the_others(recorded, top):
    cuts = [0.2, 0.3], [[0, 2], [1, 0]]
    whole, sequences = learner_of(recorded, top=None)
    part, _ = learner_of(recorded, top=top)
    seen = []
    for learner in (whole, part):
        original = through_model.continuation_logits

        def watched(*given, original=original):
            logits = original(*given)
            if logits.requires_grad:
                logits.retain_grad()
                seen.append(logits)
            return logits

        with frozen_model(learner.model), pytest.MonkeyPatch.context() as patch:
            patch.setattr(through_model, "continuation_logits", watched)
            divergence = learner.divergence(sequences, *cuts)
            divergence.sum().backward()
            seen.append(divergence.detach())
    logits, exact, top_logits, found = seen
    log_probs, ids = (torch.stack(each) for each in zip(*map(whole._full, sequences, cuts[1]), strict=True))
    full = torch.zeros_like(log_probs).scatter_(-1, ids, log_probs)
    cut = logits.detach().log_softmax(-1)
    others = torch.ones_like(full).scatter_(-1, ids[..., :top], 0.0)
    rest, cut_rest = ((each.exp() * others).sum(-1) for each in (full, cut))
    _, mask = padded_continuations(sequences, cuts[1])
    within = (full.exp() * others * (full - cut)).sum(-1) - rest * (rest.log() - cut_rest.log()).nan_to_num()
    dropped = (within * mask).sum((1, 2)) / mask.sum((1, 2))
    assert found == pytest.approx(exact - dropped, abs=1e-5) and (found <= exact + 1e-6).all()
    moved = (logits.grad - top_logits.grad).abs().sum(-1)
    assert (moved <= mask / mask.sum((1, 2), keepdim=True) * 2 * rest + 1e-6).all()


def test_slots_far_below_the_threshold_change_nothing(recorded):
    found = []
    for near in (None, 12.0):
        learner, sequences = learner_of(recorded, near=near)
        read = learner._cut(sequences[0], 0.2, len(sequences[0].tokens))[1].float().mean()
        assert read == 1 if near is None else read < 0.75
        with frozen_model(learner.model):
            divergence = learner.divergence(sequences, [0.2, 0.3], [[0, 2], [1, 0]])
            divergence.sum().backward()
        gradient = torch.cat([each.grad.flatten() for each in learner.network.parameters()])
        found.append((divergence.detach(), gradient))
    (exact, gradient), (divergence, other) = found
    assert divergence == pytest.approx(exact, rel=1e-5)
    assert (gradient - other).norm() < 1e-3 * gradient.norm()


def test_refusals(recorded, tmp_path):
    _, traces = recorded
    with pytest.raises(UserError, match="trains through the model: name the one that the traces were recorded of"):
        train("end_to_end", traces, tmp_path / "a", **FAST)
    with pytest.raises(UserError, match="weights hash"):
        train("end_to_end", traces, tmp_path / "b", model=tiny_model("qwen3", seed=1), **FAST)
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_everything_moves_to_the_device_of_the_model(recorded):
    """On `meta`, where an operation with a tensor of the CPU raises."""
    model, traces = recorded
    sequences = traces.load()[:2]
    network = GroupedScorer(sequences[0].keys.shape[0] * sequences[0].keys.shape[1], sequences[0].keys.shape[3], 8)
    learner = EndToEnd(EndToEndSettings(hidden=8), 0, network, model=copy.deepcopy(model).to("meta"))
    learner.prepare(sequences)
    with frozen_model(learner.model):
        divergence = learner.divergence(sequences, [0.2, 0.3], [[0, 2], [1, 0]])
    assert divergence.device.type == "meta" and divergence.shape == (2,) and divergence.requires_grad
