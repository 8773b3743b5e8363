"""Policies by name, class path and folder; what cannot be found or set is refused."""

import numpy as np
import pytest
from user_policy import Nearest

from kv_gym import list_policies, make_policy
from kv_gym.errors import UserError
from kv_gym.policies import load_settings, policy_class

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


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("h2o", {"reduce": "max"}),
        ("d2o", {"reduce": ""}),
        ("roco", {"unstable": 1.5}),
        ("lazy_eviction", {"threshold": 0}),
        ("lazy_eviction", {"window": -1}),
        ("lru", {"share": 0}),
        ("lfu", {"share": -1}),
        ("lra", {"top": 0}),
        ("lfa", {"top": 0}),
        ("sage_kv", {"reduce": "sum"}),
        ("snapkv", {"window": 0}),
        ("snapkv", {"kernel": 4}),
        ("snapkv", {"pooling": "mean"}),
        ("snapkv", {"reduce": "sum"}),
        ("cake", {"kernel": 2}),
        ("cake", {"window": 0}),
        ("mpcache", {"share": 0}),
        ("mpcache", {"window": 0}),
        ("r_kv", {"kernel": 2}),
        ("r_kv", {"importance": 2}),
        ("r_kv", {"threshold": 1}),
        ("lagkv", {"lag": 0}),
        ("expected_attention", {"window": 0}),
        ("dropkv", {"kernel": 4}),
        ("graph_kv", {"sources": 0}),
        ("critical_kv", {"first_stage": 1.5}),
        ("next_use", {"threshold": 0}),
        ("kvzip", {"instruction": "9" * 5000}),
    ],
)
def test_settings_without_meaning_are_refused(name, settings):
    with pytest.raises(UserError, match=f"^{name} got .*{next(iter(settings))}=.*; expected "):
        make_policy(name, **settings)


@pytest.mark.parametrize("value", [None, 1.5, "8", [8], True, np.array([1, 2])])
def test_settings_of_another_type_are_refused(value):
    with pytest.raises(UserError, match=r"^policy SnapKV got window=.*; expected int$"):
        make_policy("snapkv", window=value)
    assert make_policy("snapkv", window=np.int64(8)).window == 8


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


# -- settings behind a name --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "settings"),
    [
        ("snapkv:window=64", "snapkv", {"window": 64}),
        ("snapkv:window=64:pooling=max", "snapkv", {"window": 64, "pooling": "max"}),
        ("caote:over=h2o", "caote", {"over": "h2o"}),
        ("caote:over=user_policy:Nearest", "caote", {"over": "user_policy:Nearest"}),
        (
            "expected_attention:covariance=false:epsilon=1e-3",
            "expected_attention",
            {"covariance": False, "epsilon": 1e-3},
        ),
        ("next_use:threshold=0.5", "next_use", {"threshold": 0.5}),
        ("next_use:threshold=None", "next_use", {}),
        ("kvzip:instruction=17 4 256", "kvzip", {"instruction": "17 4 256"}),
        (f"kvzip:instruction={'17 ' * 99}4", "kvzip", {"instruction": "17 " * 99 + "4"}),  # longer than a file's name
        ("user_policy:Nearest:distance=3", "user_policy:Nearest", {"distance": 3}),
    ],
)
def test_settings_may_stand_behind_a_name(text, name, settings):
    assert make_policy(text) == make_policy(name, **settings)


def test_settings_of_a_call_replace_those_in_the_text():
    assert make_policy("snapkv:window=64:kernel=7", window=8) == make_policy("snapkv", window=8, kernel=7)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("snapkv:windows=3", r"policy SnapKV has no setting 'windows'; its settings: window, kernel"),
        ("snapkv:window=2.5", r"policy SnapKV got window='2.5'; expected int"),
        ("dropkv:epsilon=nan", r"policy DropKV got epsilon='nan'; expected float"),
        ("expected_attention:covariance=perhaps", "got covariance='perhaps'; expected bool"),
        ("snapkv:window=0", "snapkv got window=0, .*; expected window and kernel above 0"),
        ("snapkv:64", "policy 'snapkv:64' has '64' behind its name; expected settings such as snapkv:key=value"),
        ("snapkv:window=3:window=4", "gives a setting twice"),
        ("caote:over=h20", "unknown policy 'h20'; did you mean 'h2o'"),
    ],
)
def test_settings_in_a_text_that_do_not_fit_are_refused(text, complaint):
    with pytest.raises(UserError, match=complaint) as refused:
        make_policy(text)
    assert "\n" not in str(refused.value)


# -- policies of other packages ----------------------------------------------------------------------------------


@pytest.fixture
def other_package(tmp_path, monkeypatch):
    """Installs a made-up distribution with the given entry points."""

    def install(**entry_points):
        information = tmp_path / "made_up-1.0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text("Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\n")
        lines = "".join(f"{name} = {value}\n" for name, value in entry_points.items())
        (information / "entry_points.txt").write_text(f"[kv_gym.policies]\n{lines}")
        (tmp_path / "broken_policy.py").write_text("raise ValueError('half\\nwritten')\n")
        monkeypatch.syspath_prepend(tmp_path)

    return install


def test_another_package_adds_a_policy_by_an_entry_point(other_package):
    other_package(nearest_token="user_policy:Nearest")
    assert "nearest_token" in list_policies()
    assert make_policy("nearest_token:distance=4") == Nearest(4) and policy_class("nearest_token") is Nearest
    with pytest.raises(UserError, match="did you mean 'nearest_token'"):
        make_policy("nearest_tokens")


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (
            "broken_policy:Policy",
            r"policy 'mine' of distribution 'made-up' cannot be imported \(ValueError: half written\)",
        ),
        ("no_such_module:Policy", r"policy 'mine' of distribution 'made-up' cannot be imported \(ModuleNotFoundError"),
        ("math:pi", "policy 'mine' of distribution 'made-up' is no subclass of kv_gym.Policy"),
    ],
)
def test_a_broken_entry_point_is_one_sentence_that_names_the_distribution(other_package, value, complaint):
    other_package(mine=value)
    assert "mine" in list_policies()  # which imports nothing
    with pytest.raises(UserError, match=complaint) as refused:
        make_policy("mine")
    assert "\n" not in str(refused.value)


def test_another_package_replaces_no_bundled_policy(other_package):
    other_package(h2o="user_policy:Nearest")
    with pytest.warns(UserWarning, match="distribution 'made-up' offers a policy 'h2o', which kv_gym has: ignored"):
        assert list_policies().count("h2o") == 1
    assert make_policy("h2o").name == "h2o"
