"""The committed golden scores are those that kvpress gives."""

import golden
import numpy as np


def test_the_committed_scores_are_what_kvpress_says():
    made = golden.arrays()
    with np.load(golden.FILE, allow_pickle=False) as stored:
        assert sorted(stored.files) == sorted(made)
        assert stored["versions"].tolist() == made["versions"].tolist()
        for name in set(made) - {"versions"}:
            np.testing.assert_allclose(stored[name], made[name], rtol=1e-5, atol=1e-6, err_msg=name)
