"""Tests run offline, without a display, and on one thread: their tensors are too small to share out."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A folder that stands in for the Hugging Face Hub; the working directory is empty."""
    from folder_hub import FolderHub

    monkeypatch.chdir(tmp_path)
    return FolderHub(tmp_path / "hub").install(monkeypatch)
