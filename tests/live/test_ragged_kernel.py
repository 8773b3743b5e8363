"""The Triton kernel over uneven heads: in Triton's interpreter, and compiled for GPUs that are not here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kv_gym.errors import UserError
from kv_gym.live import ragged_attention, ragged_backend


def run(*command, **environment):
    done = subprocess.run([sys.executable, *command], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_in_the_interpreter():
    pytest.importorskip("triton", reason="the kernel needs Triton: pip install 'kv-gym[gpu]'")
    checks = Path(__file__).with_name("interpreted_kernel.py")
    run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", str(checks), TRITON_INTERPRET="1")


def test_it_compiles_for_gpus_and_fits_their_shared_memory():
    """One variant of those that `benchmarks/gpu/compile_kernel.py` compiles in many minutes."""
    pytest.importorskip("triton", reason="the kernel needs Triton: pip install 'kv-gym[gpu]'")
    script = Path(__file__).parents[2] / "benchmarks" / "gpu" / "compile_kernel.py"
    variant = ("--dtypes", "bf16", "--sizes", "128", "--bits", "0", "--arch", "90")
    table = run(str(script), *variant, TRITON_DEFAULT_FP_FUSION="1").splitlines()[2:]
    for row in table:
        dtype, _, _, _, _, products, _ = row.strip("| ").split(" | ")
        assert dtype == "fp32" or int(products) > 0  # on tensor cores


def test_which_form_reads_the_slots(monkeypatch):
    monkeypatch.setattr(ragged_attention, "_has_triton", lambda: False)
    query = torch.empty(1, 4, 1, 8, device="meta")
    assert ragged_attention.backend_for(query) == "padded"
    assert ragged_attention.backend_for(torch.empty(1, 4, 1, 8)) == "per_head"
    with ragged_backend("padded"):
        assert ragged_attention.backend_for(torch.empty(1, 4, 1, 8)) == "padded"
    with pytest.raises(UserError, match="needs Triton"), ragged_backend("kernel"):
        pass
    with pytest.raises(UserError, match="unknown; expected one of"), ragged_backend("flash"):
        pass
