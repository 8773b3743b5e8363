"""How other processes come by the model that this one holds: they load it from the same place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kv_gym.errors import UserError
from kv_gym.models.fingerprint import Fingerprint
from kv_gym.models.loading import load_model
from kv_gym.models.wrapped_model import transformers_model


@dataclass(frozen=True)
class ModelSource:
    """Plain data from which any process loads a model.

    Weights are not sent: processes of one machine share the pages of the same files, and another machine reads its own
    copy.

    Attributes:
        name: folder or id on the Hub.
        device: such as ``cpu`` or ``cuda:0``; ``auto`` where the model is spread over devices.
        dtype: such as ``float32``.
        fingerprint: that the loaded model must have.
    """

    name: str
    device: str
    dtype: str
    fingerprint: Fingerprint

    @classmethod
    def of(cls, model: Any) -> ModelSource:
        """Where a loaded model comes from.

        Raises:
            UserError: a model that was loaded from nowhere.
        """
        model = transformers_model(model)
        name = str(getattr(model.config, "name_or_path", "") or "")
        if not name:
            raise UserError(
                "the model has no folder and no name on the Hub from which other processes could load it: write it "
                "with save_pretrained and load it from there, or leave workers out"
            )
        if Path(name).exists():
            name = str(Path(name).resolve())  # of another working folder, too
        spread = len(set(getattr(model, "hf_device_map", {}).values())) > 1
        dtype = str(model.dtype).removeprefix("torch.")
        return cls(name, "auto" if spread else str(model.device), dtype, Fingerprint.of(model))

    def load(self) -> Any:
        """The model, in evaluation mode.

        Raises:
            UserError: it cannot be loaded, or is another one.
        """
        model, _ = load_model(self.name, self.device, self.dtype)
        found = Fingerprint.of(model)
        if found != self.fingerprint:
            raise UserError(
                f"the model was changed after it had been loaded, or {self.name} holds another one on a worker's "
                "machine: write it with save_pretrained and load it from there, or leave workers out"
            )
        return model
