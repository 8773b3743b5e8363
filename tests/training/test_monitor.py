"""The TensorBoard log and the picture of kept slots."""

import pytest
import torch
from known_traces import write_known_traces
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kv_gym.evaluation.measure import replay
from kv_gym.policies import make_policy
from kv_gym.policies.scorer import GroupedScorer
from kv_gym.traces import open_traces
from kv_gym.training import train
from kv_gym.training.monitor import RetentionPicture
from kv_gym.training.trainer import split_validation

FAST = {"steps": 20, "every": 5, "hidden": 8, "rate": 0.02, "progress": False}


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    return write_known_traces(tmp_path_factory.mktemp("known") / "traces")


def test_the_log_holds_what_there_is_to_watch(traces, tmp_path):
    train("grpo", traces, tmp_path / "policy", **FAST)
    (file,) = (tmp_path / "policy" / "tensorboard").glob("events*")
    log = EventAccumulator(str(file), size_guidance={"tensors": 0}).Reload()
    tags = set(log.Tags()["scalars"])
    for name in ("loss", "reward", "kl", "clip_share", "entropy", "gradient_norm", "rate"):
        assert [event.step for event in log.Scalars(f"train/{name}")] == [10, 20]
    assert {"validation/utility_kept", "utility_kept/at_1_8", "regret_to_oracle/at_1_8", "held_out_reward"} <= tags
    assert [event.step for event in log.Scalars("utility_kept/at_1_4")] == [5, 10, 15, 20]
    assert len(log.Images("retention at 1/8 (heads x positions)")) == 4
    assert "settings/text_summary" in log.Tags()["tensors"] and "_hparams_/experiment" in file.read_bytes().decode(
        "latin1"
    )
    oracle = EventAccumulator(str(tmp_path / "policy" / "tensorboard" / "oracle")).Reload()
    best, learned = oracle.Scalars("utility_kept/at_1_8")[0].value, log.Scalars("utility_kept/at_1_8")[-1].value
    assert log.Scalars("regret_to_oracle/at_1_8")[-1].value == pytest.approx(best - learned, abs=1e-6)
    runs = {path.name for path in (tmp_path / "policy" / "tensorboard").iterdir() if path.is_dir()}
    assert runs == {"oracle", "recency", "keydiff", "random"}  # no statistics of h2o were recorded
    recency = EventAccumulator(str(tmp_path / "policy" / "tensorboard" / "recency")).Reload()
    flat = recency.Scalars("utility_kept/at_1_4")
    assert [event.step for event in flat] == [0, 20] and flat[0].value == flat[1].value
    validation = split_validation(open_traces(traces).select(split="train").load(), 0.1)[1]
    (row,) = replay({"recency": make_policy("recency")}, validation, [0.25])
    assert flat[0].value == pytest.approx(row["utility_kept"])


def test_the_picture_shows_what_stays(traces):
    """A network that scores by age alone keeps the end of every context."""
    network = GroupedScorer(4, 4, 2)
    with torch.no_grad():
        for weight in network.weights:
            weight.zero_()
        network.weights[0][:, -1, 0] = 1.0  # log age
        network.weights[1][:, 0, 0] = 1.0
        network.weights[2][:, 0, 0] = torch.tensor([-1.0, -1.0, -1.0, 1.0])
    sequences = open_traces(traces).load()[:2]
    kept = RetentionPicture(sequences, calibrated=False).kept_shares(network)
    by_token = kept[:, [i * 64 // 40 for i in range(40)]]
    assert by_token[:3, 35:].all() and not by_token[:3, :35].any()  # 5 of 40 stay
    assert by_token[3, :5].all() and not by_token[3, 5:].any()
    kept = RetentionPicture(sequences, calibrated=True).kept_shares(network)[:, [i * 64 // 40 for i in range(40)]]
    assert kept[3].sum() == 20 and not kept[:3].any()  # one threshold: the fourth head has all the highest scores
    picture = RetentionPicture(sequences, calibrated=True).image(network)
    assert picture.shape == (1, 4 * 6, 64 * 6) and picture[0, -1, 0] == 255 and picture[0, 0, 0] == 0
