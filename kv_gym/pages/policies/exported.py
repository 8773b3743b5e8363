"""A trained policy as an ONNX file, for engines that are not written in Python. `kv-gym pages export` writes it.

The graph takes `features`, `[K, F]` float32, and gives `scores`, `[K]`, higher = keep; its metadata hold the card as
`kv_gym`. Time limit and LRU behind it are those of Cold-RL (arXiv 2508.12485).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from kv_gym.errors import UserError, short_reason
from kv_gym.files import atomic_write, parse_json, read_bytes, validated
from kv_gym.pages.policies.learned import Learned, LearnedCard

_OPSET = 17


@dataclass(eq=False)
class Exported(Learned):
    """A trained policy whose network onnxruntime computes, within 500 microseconds for a decision by default."""

    limit: float = 500e-6
    session: Any = field(default=None, metadata={"loaded": True})

    def __post_init__(self) -> None:
        super().__post_init__()
        # the usual decision among all candidates: onnxruntime reads and writes these arrays, and copies nothing
        from onnxruntime import OrtValue

        shape = self.candidates, len(self.card.features)
        self._features, self._scores = np.zeros(shape, np.float32), np.zeros(self.candidates, np.float32)
        self._binding = self.session.io_binding()
        self._binding.bind_ortvalue_input("features", OrtValue.ortvalue_from_numpy(self._features))
        self._binding.bind_ortvalue_output("scores", OrtValue.ortvalue_from_numpy(self._scores))

    @classmethod
    def load(cls, folder: str | Path, limit: float = 500e-6, shadow: int = 65_536) -> Exported:
        """Read an exported policy.

        Raises:
            UserError: no such file, no ONNX file of a page policy, or onnxruntime is not installed.
        """
        expected = "expected an ONNX file that `kv-gym pages export` wrote"
        data = read_bytes(folder, expected)
        runtime = _package("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1  # threads cost more than they save here
        try:
            session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has a class of exceptions for every status
            raise UserError(f"{folder} holds no network ({short_reason(error)}); {expected}") from None
        text = session.get_modelmeta().custom_metadata_map.get("kv_gym")
        if text is None:
            raise UserError(f"{folder} says nothing of a page policy; {expected}")
        card = validated(LearnedCard, parse_json(text, str(folder), expected), str(folder))
        shapes = [each.shape for each in (*session.get_inputs(), *session.get_outputs())]
        if shapes != [["K", len(card.features)], ["K"]]:
            raise UserError(f"{folder} holds a network of other shapes than its card says; {expected}")
        return cls(card, {}, limit, shadow, session=session)

    def score(self, features: np.ndarray) -> np.ndarray:
        if features.shape != self._features.shape:
            return self.session.run(None, {"features": np.ascontiguousarray(features)})[0]
        self._features[:] = features
        self.session.run_with_iobinding(self._binding)
        return self._scores.copy()


def export_page_policy(policy: str | Path | Learned, out: str | Path) -> Path:
    """Write a trained page policy as an ONNX file.

    Args:
        policy: a trained policy, or its folder.
        out: the file to write.

    Returns:
        The file.

    Raises:
        UserError: no trained policy, or the package onnx is not installed.
    """
    trained = policy if isinstance(policy, Learned) else Learned.load(policy)
    onnx = _package("onnx")
    make, w = onnx.helper, trained.weights
    tensors = {"first": w["candidate.weight"], "first_bias": w["candidate.bias"], "own": w["own.weight"],
               "mean": w["mean.weight"], "joined_bias": w["joined.bias"], "last": w["score.weight"]}  # fmt: skip
    nodes = [
        make.make_node("MatMul", ["features", "first"], ["a"]),
        make.make_node("Add", ["a", "first_bias"], ["b"]),
        make.make_node("Relu", ["b"], ["hidden"]),
        make.make_node("ReduceMean", ["hidden"], ["pooled"], axes=[0], keepdims=1),
        make.make_node("MatMul", ["pooled", "mean"], ["c"]),
        make.make_node("Add", ["c", "joined_bias"], ["context"]),
        make.make_node("MatMul", ["hidden", "own"], ["d"]),
        make.make_node("Add", ["d", "context"], ["e"]),
        make.make_node("Relu", ["e"], ["joined"]),
        make.make_node("MatMul", ["joined", "last"], ["scores"]),
    ]
    number = onnx.TensorProto.FLOAT
    graph = make.make_graph(
        nodes,
        "page policy",
        [make.make_tensor_value_info("features", number, ["K", len(trained.card.features)])],
        [make.make_tensor_value_info("scores", number, ["K"])],
        [onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in tensors.items()],
    )
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", _OPSET)], ir_version=8)
    make.set_model_props(model, {"kv_gym": json.dumps(trained.card.model_dump(mode="json"))})
    onnx.checker.check_model(model)
    with atomic_write(out) as part:
        part.write_bytes(model.SerializeToString())
    return Path(out)


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise UserError(f"the package {name} is missing: pip install 'kv-gym[onnx]'") from None
