"""Policies by name, class path and folder; what cannot be found or set is refused."""

import pytest
from user_policy import Nearest

from kv_gym import list_policies, make_policy
from kv_gym.errors import UserError
from kv_gym.policies import load_settings

NAMES = [name for name in list_policies() if name != "scorer"]  # the learned one is loaded from a folder


def test_names_are_file_names_and_sorted():
    assert list_policies() == sorted(list_policies()) and {"h2o", "snapkv", "oracle", "scorer"} <= set(list_policies())
    assert [make_policy(name).name for name in NAMES] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_call_makes_a_new_frozen_object(name):
    first, second = make_policy(name), make_policy(name)
    assert first is not second and first == second
    with pytest.raises(AttributeError):
        first.kernel = 3


def test_a_policy_object_is_taken_as_it_is():
    policy = make_policy("snapkv", window=7)
    assert make_policy(policy) is policy and policy.needs_queries == 7


@pytest.mark.parametrize(
    ("given", "meant"), [("h20", "h2o"), ("SnapKV", "snapkv"), ("streamingllm", "streaming_llm"), ("orcale", "oracle")]
)
def test_an_unknown_name_suggests_the_nearest(given, meant):
    with pytest.raises(UserError, match=f"unknown policy '{given}'; did you mean '{meant}'"):
        make_policy(given)


@pytest.mark.parametrize("given", ["qqqq", "nosuch"])  # the second shares letters with roco
def test_a_name_like_no_other_lists_what_is_known(given):
    with pytest.raises(UserError, match=rf"unknown policy '{given}'; known: .*golden, .*h2o"):
        make_policy(given)


def test_unknown_settings_are_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"policy SnapKV has no setting 'windows'; its settings: window, kernel"):
        make_policy("snapkv", windows=3)
    with pytest.raises(UserError, match=r"policy Knorm has no setting 'p'; its settings: none"):
        load_settings(type(make_policy("knorm")), {"p": 1})


@pytest.mark.parametrize("settings", [{"window": 0}, {"kernel": 4}, {"kernel": 0}])
def test_snapkv_refuses_settings_without_meaning(settings):
    with pytest.raises(UserError, match="expected both above 0, kernel odd"):
        make_policy("snapkv", **settings)


def test_a_class_path_is_taken():
    policy = make_policy("user_policy:Nearest", distance=3)
    assert isinstance(policy, Nearest) and policy.distance == 3 and policy.name == "user_policy"


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("no_such_module:Thing", "cannot import policy no_such_module:Thing"),
        ("kv_gym.policies:Nothing", "cannot import policy kv_gym.policies:Nothing"),
        ("kv_gym.errors:UserError", "is no subclass of kv_gym.Policy"),
        ("math:pi", "is no subclass of kv_gym.Policy"),
    ],
)
def test_a_class_path_that_leads_nowhere_is_refused(path, complaint):
    with pytest.raises(UserError, match=complaint):
        make_policy(path)


def test_a_folder_without_a_policy_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no policy.json; expected a policy exported by"):
        make_policy(tmp_path)


def test_the_learned_policy_is_named_by_its_folder():
    with pytest.raises(UserError, match="policy 'scorer' is learned: name the folder"):
        make_policy("scorer")


@pytest.mark.parametrize("old", ["uniform_order", "kv_gym.policies.uniform_order:UniformOrder"])
def test_an_old_name_works_with_a_warning(old):
    with pytest.warns(DeprecationWarning, match=f"policy {old} is called 'random' now"):
        assert make_policy(old, seed=3) == make_policy("random", seed=3)
