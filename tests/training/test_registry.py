"""Agents and their settings by name: what is found, what is refused."""

import inspect
import shutil

import pytest
from known_traces import write_known_traces

from kv_gym import training
from kv_gym.errors import UserError
from kv_gym.files import bundled
from kv_gym.training import registry, train
from kv_gym.training.joint import Joint, JointSettings
from kv_gym.training.registry import agent_settings, learner_class, list_agents


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    return write_known_traces(tmp_path_factory.mktemp("known") / "traces")


def test_the_registry_finds_every_agent_and_its_settings():
    for agent in list_agents():
        settings = agent_settings(agent)
        assert type(settings) is learner_class(agent).settings_class
        assert inspect.getmodule(learner_class(agent)).__doc__
    with pytest.raises(UserError, match=r"less trains no policy from traces .*kv-gym train-less --model"):
        learner_class("less")
    with pytest.raises(UserError, match="unknown agent 'ppo2'; known: attention_gate, distill, "):
        learner_class("ppo2")


def test_settings_come_from_the_zoo_and_unknown_ones_are_refused(traces, tmp_path):
    assert agent_settings("joint", steps=None) == agent_settings("joint")
    assert agent_settings("joint", steps=7).steps == 7
    with pytest.raises(UserError, match="unknown key 'stesp'"):
        train("joint", traces, tmp_path / "out", stesp=5)
    with pytest.raises(UserError, match="unknown key 'group'"):
        train("joint", traces, tmp_path / "out", group=5)
    with pytest.raises(UserError, match="steps is 'many'"):
        agent_settings("joint", steps="many")
    with pytest.raises(UserError, match="ranking is 3; expected 'head' or 'joint'"):
        agent_settings("grpo", ranking=3)
    with pytest.raises(UserError, match="unknown agent 'ppo2'"):
        train("ppo2", traces, tmp_path / "out")
    with pytest.raises(UserError, match=r"budget is 0\.0; expected greater than 0"):
        train("foresight", traces, tmp_path / "out", budget=0.0)
    assert not (tmp_path / "out").exists()


def test_settings_that_there_are_not():
    assert agent_settings("joint") == JointSettings()  # the file and the class say the same
    assert agent_settings("joint", continuations=3).continuations == 3
    with pytest.raises(UserError, match="loss is 'hinge'; expected 'softmax', 'poisson' or 'listwise'"):
        agent_settings("joint", loss="hinge")
    with pytest.raises(UserError, match="target is 'future'; expected 'auto', 'utility', "):
        agent_settings("joint", target="future")
    with pytest.raises(UserError, match="expected 0 < smallest <= largest < 1"):
        agent_settings("joint", smallest=0.5, largest=0.25)
    with pytest.raises(UserError, match="continuations is 'all'"):
        agent_settings("joint", continuations="all")


def test_a_module_and_a_settings_file_make_an_agent(traces, tmp_path, monkeypatch):
    package, settings = tmp_path / "package", tmp_path / "agents"
    shutil.copytree(bundled("agents"), settings, ignore=shutil.ignore_patterns("trained"))
    package.mkdir()
    (settings / "square_root.yml").write_text("steps: 3\nmargin: 0.5\n")
    (package / "square_root.py").write_text(
        "from kv_gym.training.distill import DistillSettings\n"
        "from kv_gym.training.learner import LossLearner\n\n\n"
        "class SquareRoot(LossLearner):\n"
        "    settings_class = DistillSettings\n\n"
        "    def loss(self, scores, utility):\n"
        "        return (scores - utility.sqrt()).square().mean(), {}\n"
    )
    monkeypatch.setattr(registry, "bundled", {"agents": settings}.__getitem__)
    monkeypatch.setattr(training, "__path__", [*training.__path__, str(package)])
    assert set(list_agents()) == {"square_root", "attention_gate", "distill", "end_to_end", "expected", "foresight",
                                  "grpo", "joint", "kvzap", "ppo", "rloo"}  # fmt: skip
    policy = train("square_root", traces, tmp_path / "out", progress=False)
    assert policy.training["samples"] == 3 * 8 * 4 and policy.training["settings"]["margin"] == 0.5


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        ("steps: [1", "joint.yml"),
        ("steps: 0", "joint.yml: steps is 0; expected greater than 0"),
        ("steps: " + "9" * 30, "joint.yml: steps is 9.*; expected less than or equal to 1000000000"),
        ("hidden: 8193", "joint.yml: hidden is 8193; expected less than or equal to 8192"),
        ("rate: .nan", "joint.yml, line 1: a number is not finite; expected settings as NAME: VALUE"),
        ("stesp: 3", "joint.yml has unknown key 'stesp'; known: steps, contexts, "),
        ("protect: [1, 2, 3]", "protect is .1, 2, 3.; expected .* at most 2 items"),
        ("protect: [1, -2]", "joint.yml, protect: 1 is -2; expected greater than or equal to 0"),
        ("hidden: true", "hidden is True; expected a whole number"),
        ("- steps", "joint.yml holds list; expected keys steps, contexts, "),
    ],
)
def test_a_settings_file_with_mistakes_is_refused_in_one_sentence(tmp_path, monkeypatch, written, sentence):
    (tmp_path / "joint.yml").write_text(written)
    monkeypatch.setattr(registry, "bundled", lambda _: tmp_path)
    with pytest.raises(UserError, match=sentence) as error:
        agent_settings("joint")
    assert "\n" not in str(error.value)


def test_the_former_name_of_utility_works_with_a_warning():
    with pytest.warns(DeprecationWarning, match=r"Newest\.worth is now named utility"):

        class Newest(Joint):
            def worth(self, sequence):
                return "attention, discounted by age"

    assert Newest.utility(None, None) == "attention, discounted by age"
