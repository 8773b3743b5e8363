"""Folders of trained weights: a file of tensors, a file that says what they are, and one SHA-256 over both."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kv_gym.checksums import described_data_hash
from kv_gym.errors import UserError, short_reason
from kv_gym.files import atomic_write, make_folder, read_bytes, read_json, refuse_address, validated

if TYPE_CHECKING:
    from pydantic import BaseModel
    from torch import nn

CHECKPOINT = "checkpoint.pt"  # of a training run, in the folder that its weights will be exported into
_LARGEST = 2**31  # bytes of weights
_Described = TypeVar("_Described", bound="BaseModel")
_Module = TypeVar("_Module", bound="nn.Module")


@dataclass(frozen=True)
class WeightsFolder:
    """How one kind of trained weights is kept in a folder.

    Attributes:
        kind: what errors call it, such as ``policy``.
        description, weights: names of its files.
        newest: the format that this version writes, and the newest that it reads.
        made_by: the commands that write such a folder.
        again: what to do about a damaged one.
        checked_from: the first format that always holds a checksum.
    """

    kind: str
    description: str
    weights: str
    newest: int
    made_by: str
    again: str
    checked_from: int = 1

    def refuse_foreign(self, folder: Path, others: Iterable[str] = ()) -> None:
        """Raise a UserError where `folder` is an address, or holds things and neither such weights nor a training run.

        Args:
            folder: where to write.
            others: names of more files that may be left of a run that was killed while it wrote its first ones.
        """
        refuse_address(folder)
        if folder.is_dir():
            names = {file.name for file in folder.iterdir()}
            begun = {self.weights, self.description, CHECKPOINT, *others}
            foreign = names - begun - {f"{name}.tmp" for name in begun} - {"tensorboard"}
            if foreign and not names & {self.description, CHECKPOINT}:
                raise UserError(f"{folder} holds other files and no trained {self.kind}; name a new folder")
        elif folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file; name a folder to write the {self.kind} into")

    def write(
        self, folder: str | Path, description: Mapping[str, Any], module: nn.Module, others: Mapping[str, bytes] = {}
    ) -> Path:
        """Write weights with their description; an interrupted call leaves no half of them that could be read.

        Args:
            folder: is made if it is not there.
            description: plain JSON data with ``format``; the checksum is added to it.
            module: whose state dict is written.
            others: content of more files.

        Raises:
            UserError: `folder` is a file, or holds something else.
        """
        folder = Path(folder)
        self.refuse_foreign(folder, others)
        make_folder(folder)
        weights, plain = weights_bytes(module), json.loads(json.dumps(description))
        plain["sha256"] = described_data_hash(plain, weights)
        text = (json.dumps(plain, indent=1) + "\n").encode()
        # the description last: a folder without it holds no weights for any reader
        for name, data in {self.weights: weights, **others, self.description: text}.items():
            with atomic_write(folder / name) as part:
                part.write_bytes(data)
        return folder

    def read(
        self, folder: Path, model: type[_Described], build: Callable[[_Described], _Module]
    ) -> tuple[_Described, _Module]:
        """Read what :meth:`write` wrote; nothing in the folder is ever run.

        Args:
            folder: what to read.
            model: of the description, with ``format`` and ``sha256``.
            build: the module that a description speaks of. It is called on the meta device, so that nothing is
                allocated for sizes that the file does not have.

        Raises:
            UserError: missing, damaged or newer files, or weights of other sizes than described.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load
        from torch import device

        file = folder / self.description
        if not file.is_file():
            raise UserError(f"{folder} holds no {self.description}; expected a folder that {self.made_by} wrote")
        data = read_json(file, f"expected what {self.made_by} wrote: {self.again}")
        if isinstance(data, dict) and isinstance(data.get("format"), int) and data["format"] > self.newest:
            raise UserError(
                f"{folder} has {self.kind} format {data['format']}, newer than {self.newest}: upgrade kv-gym"
            )
        about: Any = validated(model, data, str(file))
        with device("meta"):
            module = build(about)
        weights = read_bytes(folder / self.weights, self.again, _LARGEST)
        content = {name: value for name, value in data.items() if name != "sha256"}
        checked = about.format >= self.checked_from or about.sha256
        if checked and described_data_hash(content, weights) != about.sha256:
            raise UserError(f"{self.description} or {self.weights} in {folder} was changed or damaged; {self.again}")
        try:
            tensors = load(weights)
        except (SafetensorError, ValueError, KeyError) as error:
            raise UserError(f"{folder / self.weights} holds no tensors ({short_reason(error)}); {self.again}") from None
        expected = {name: (tensor.shape, tensor.dtype) for name, tensor in module.state_dict().items()}
        if {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()} != expected:
            raise UserError(f"the weights in {folder} have other sizes than its {self.description} says; {self.again}")
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise UserError(f"the weights in {folder} are not finite; {self.again}")
        module.load_state_dict(tensors, assign=True)
        return about, module


def weights_bytes(module: nn.Module) -> bytes:
    """A module's state dict as a safetensors file."""
    from safetensors.torch import save

    return save({name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()})
