"""`kv_gym.interop` is light, and says in one sentence what is not installed."""

import json
import subprocess
import sys

import pytest

import kv_gym.interop


def test_importing_it_loads_nothing_heavy():
    code = "import json, sys, kv_gym.interop; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(json.loads(done.stdout)) & {"torch", "transformers", "kvpress", "safetensors"}


def test_without_kvpress_the_press_is_one_sentence():
    code = (
        "import sys\nsys.modules['kvpress'] = None\nfrom kv_gym.errors import UserError\n"
        "try:\n    from kv_gym.interop import PolicyPress\nexcept UserError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (
        done.stdout.startswith("PolicyPress needs kvpress, which is not installed here") and "Trace" not in done.stderr
    )
    assert done.stdout.count("\n") == 1


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Press'"):
        kv_gym.interop.Press  # noqa: B018
