"""Whatever is not a whole trace file is refused with one sentence, before memory is taken for it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from traced_models import same, some_prompt, tiny_model

from kv_gym.errors import UserError
from kv_gym.traces import open_traces, record, validate
from kv_gym.traces.safe_hdf5 import set_text, sha256


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    out = tmp_path_factory.mktemp("traces") / "set"
    record(tiny_model(), [some_prompt((5, 18), "p0", context=24)], out, window=4, progress=False)
    return out


@pytest.fixture
def shard(recorded, tmp_path):
    return next(Path(shutil.copytree(recorded, tmp_path / "set")).glob("*.h5"))


def rewrite(group, name, array, **how):
    """Replace an array by one whose own checksums are right."""
    attributes = dict(group[name].attrs) if name in group else {}
    if name in group:
        del group[name]
    data = group.create_dataset(name, data=array, **({"chunks": array.shape, "fletcher32": True} | how))
    data.attrs.update(attributes)
    set_text(data, sha256=sha256(array))


def nan_keys(file, context):
    keys = context["keys"][()]
    keys[0, 1, 3, 2] = np.nan
    rewrite(context, "keys", keys)


def infinite_half(file, context):
    rewrite(context, "values", np.full((3, 2, 24, 8), np.inf, np.float16))


def negative_future(file, context):
    one = file["sequences/p0/continuation/0001"]
    rewrite(one, "future", -one["future"][()])


def wrong_shape(file, context):
    rewrite(context, "keys", context["keys"][:, :, :, :4])


def short_future(file, context):
    one = file["sequences/p0/continuation/0001"]
    rewrite(one, "future", one["future"][:, :, :, :1])


def wrong_type(file, context):
    rewrite(context, "keys", context["keys"][()].astype(np.float64))


def no_keys(file, context):
    del context["keys"]


def not_an_array(file, context):
    del context["keys"]
    context.create_group("keys")


def unknown_bits(file, context):
    keys = context["keys"][()].astype(np.float16).view(np.uint16)
    rewrite(context, "keys", keys)
    set_text(context["keys"], type="float8")


def soft_link(file, context):
    context.move("keys", "elsewhere")
    context["keys"] = h5py.SoftLink("/sequences/p0/context/elsewhere")


def external_link(file, context):
    del context["values"]
    context["values"] = h5py.ExternalLink("other.h5", "/values")


def linked_group(file, context):
    file.move("sequences/p0/continuation", "aside")
    file["sequences/p0/continuation"] = h5py.SoftLink("/aside")


def virtual(file, context):
    layout = h5py.VirtualLayout((3, 2, 24, 8), np.float32)
    layout[:] = h5py.VirtualSource("other.h5", "keys", (3, 2, 24, 8))
    del context["keys"]
    context.create_virtual_dataset("keys", layout)


def external_storage(file, context):
    del context["keys"]
    context.create_dataset("keys", (3, 2, 24, 8), np.float32, external=[("other.raw", 0, h5py.h5f.UNLIMITED)])


def filtered(file, context):
    rewrite(context, "keys", context["keys"][()], compression="gzip")


def no_checksum(file, context):
    rewrite(context, "keys", context["keys"][()], fletcher32=False)


def beyond_the_file(file, context):
    n = 10**9
    file["sequences/p0"].attrs["tokens"] = n
    for name in ("keys", "values"):
        del context[name]
        context.create_dataset(name, (3, 2, n, 8), np.float32, chunks=(1, 1, 1000, 8), fletcher32=True)


def no_scaling(file, context):
    del file["sequences/p0"].attrs["scaling"]


def number_for_text(file, context):
    file["sequences/p0"].attrs["split"] = 3


def text_in_a_heap(file, context):
    file["sequences/p0"].attrs["split"] = "train"  # h5py writes text of variable length


def zero_block(file, context):
    file["sequences/p0/continuation/0000"].attrs["block"] = 0


DEFECTS = {
    nan_keys: "context/keys holds NaN", infinite_half: "context/values holds NaN or inf",
    negative_future: "future is negative", wrong_shape: r"shape \[3, 2, 24, 4\]; expected \[3, 2, 24, 8\]",
    short_future: r"expected \[3, 2, 24, 2, 2\]", wrong_type: "type float64", no_keys: "has no 'keys'",
    not_an_array: "is no array", unknown_bits: "unknown type", soft_link: "is a link", external_link: "is a link",
    linked_group: "is a link", virtual: "from other files", external_storage: "from other files",
    filtered: "HDF5 filters", no_checksum: "HDF5 filters", beyond_the_file: "bytes can hold",
    no_scaling: "no attribute 'scaling'", number_for_text: "attribute 'split'",
    text_in_a_heap: "attribute 'split'", zero_block: "is empty",
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
def test_a_defect_is_named(defect, shard):
    with h5py.File(shard, "r+") as file:
        defect(file, file["sequences/p0/context"])
    with pytest.raises(UserError, match=DEFECTS[defect]) as error:
        open_traces(shard.parent)[0]
    assert str(shard) in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError):
        validate(shard.parent)


@pytest.mark.parametrize("kept", [0, 7, 100, 2000, 20000, -1000, -1])
def test_a_truncated_file(kept, shard):
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"no HDF5 file|damaged or cut short"):
        open_traces(shard.parent)[0]


def test_flipped_bits_are_an_error_or_harmless(recorded, shard):
    whole = shard.read_bytes()
    original = open_traces(recorded)[0]
    refused = 0
    for place in np.random.default_rng(0).integers(0, len(whole), 60):
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            validate(shard)
            assert same(open_traces(shard)[0], original), f"byte {place} changed the content unnoticed"
        except UserError:
            refused += 1
    assert refused > 10


@pytest.mark.parametrize("name", ["keys", "stats/h2o/mass"])
def test_changed_numbers_fail_validation(name, shard):
    with h5py.File(shard, "r+") as file:
        file[f"sequences/p0/context/{name}"][0, 0, 0] += 1  # HDF5 renews its own checksum
    with pytest.raises(UserError, match=f"{name} fails its checksum"):
        validate(shard)


def test_changed_attributes_fail_validation(shard):
    assert validate(shard)["sequences"] == 1
    with h5py.File(shard, "r+") as file:
        set_text(file["sequences/p0"], split="test")
    with pytest.raises(UserError, match="fails its digest"):
        validate(shard)


def change_manifest(shard, **changes):
    with h5py.File(shard, "r+") as file:
        data = json.loads(file.attrs["manifest"]) | changes
        set_text(file, manifest=json.dumps({k: v for k, v in data.items() if v is not None}))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": "3.0"}, "version 3.0 and this kv_gym reads up to 2.0: upgrade"),
        ({"version": "soon"}, "version 'soon'"),
        ({"format": "photos"}, "not the manifest"),
        ({"fingerprint": {"layers": [0]}}, "fingerprint in the file is damaged"),
        ({"fingerprint": []}, r"fingerprint is \[\]; expected keys and values"),
        ({"recipe": None}, "has no recipe; expected keys"),
        ({"dtype": "Tensor"}, "dtype is 'Tensor'; expected 'float32', "),
        ({"model": "\x1b[2J"}, "model is .*; expected a text without control characters"),
    ],
)
def test_a_manifest_that_cannot_be_used(changes, reason, shard):
    change_manifest(shard, **changes)
    with pytest.raises(UserError, match=reason):
        open_traces(shard)


def test_a_newer_minor_version_is_read(shard):
    change_manifest(shard, version="1.7")
    assert len(open_traces(shard)) == 1


def test_no_trace_set_at_all(tmp_path):
    with pytest.raises(UserError, match="no traces at"):
        open_traces(tmp_path / "missing")
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        open_traces(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json, line 1: no JSON"):
        open_traces(tmp_path)
    (tmp_path / "notes.h5").write_text("dear diary")
    with pytest.raises(UserError, match="no HDF5 file"):
        open_traces(tmp_path / "notes.h5")
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["x"] = [1, 2]
    with pytest.raises(UserError, match="HDF5 and no trace file"):
        open_traces(tmp_path / "foreign.h5")


def test_a_file_that_is_being_written_is_not_called_damaged(shard):
    script = f"import h5py, sys; f = h5py.File({str(shard)!r}, 'r+'); print('open', flush=True); sys.stdin.read()"
    writer = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with writer:
        assert writer.stdout.readline() == b"open\n"
        with pytest.raises(UserError, match=r"cannot be read now \(Resource temporarily unavailable\)") as refused:
            open_traces(shard.parent)
        assert "remove" not in str(refused.value)
        writer.stdin.close()
    assert len(open_traces(shard.parent)) == 1


def test_hidden_files_of_other_programs_are_ignored(shard):
    shard.with_name(f"._{shard.name}").write_bytes(b"\0\5\26\7")
    assert validate(shard.parent)["sequences"] == 1


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"split": "dev"}, "split is 'dev'; expected 'train' or 'test'"),
        ({"task": "\x1b[2J"}, "task is .* control char"),
    ],
)
def test_texts_that_could_do_harm_on_a_terminal_are_refused(shard, attributes, reason):
    with h5py.File(shard, "r+") as file:
        set_text(file["sequences/p0"], **attributes)
    with pytest.raises(UserError, match=f"sequences/p0: {reason}"):
        open_traces(shard)


def test_ids_are_checked_and_a_renamed_copy_is_found(shard):
    with h5py.File(shard, "r+") as file:
        file["sequences"].move("p0", "p\n0")
    with pytest.raises(UserError, match=r"sequences/p\\n0: id is .*; expected up to 100 letters"):
        open_traces(shard)
    with h5py.File(shard, "r+") as file:
        file["sequences"].move("p\n0", "p0")
        file["sequences/p1"] = file["sequences/p0"]  # a hard link
    with pytest.raises(UserError, match="sequences p0 and p1 are copies of one another"):
        validate(shard)


def test_sets_are_not_mixed(shard, tmp_path):
    shutil.copy(shard, shard.with_name("again.h5"))
    with h5py.File(shard.with_name("again.h5"), "r+") as file:
        set_text(file["sequences/p0"], prompt="other")
    with pytest.raises(UserError, match=r"sequence p0 has other tokens in .* than in .*: remove one"):
        open_traces(shard.parent)
    change_manifest(shard.with_name("again.h5"), recipe={"from": "elsewhere"})
    with pytest.raises(UserError, match=r"again\.h5.* was recorded with recipe"):
        open_traces(shard.parent)
    for path in shard.parent.glob("*.h5"):
        path.unlink()
    with pytest.raises(UserError, match="no whole shard yet"):
        open_traces(shard.parent)
