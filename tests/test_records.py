"""Records of JSON lines, of datasets and of their files are the same records."""

import json
import tracemalloc

import pytest

from kv_gym.errors import UserError
from kv_gym.evaluation.tasks import read_tasks
from kv_gym.fit.data import kind_of
from kv_gym.records import read_records

ROWS = [
    {
        "id": "a",
        "context": "The lamp.",
        "question": "What?",
        "answers": {"text": ["lamp", "a lamp"], "answer_start": [4]},
    },
    {"id": "b", "context": "The lamp.", "question": "Who?", "answers": {"text": ["nobody"], "answer_start": [0]}},
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The rows in every form that the library `datasets` writes."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import feather, parquet

    folder, table = tmp_path_factory.mktemp("data"), pyarrow.Table.from_pylist(ROWS)
    parquet.write_table(table, folder / "rows.parquet")
    feather.write_feather(table, folder / "indexed.arrow")
    saved = folder / "saved"
    (saved / "test").mkdir(parents=True)
    names = [f"data-0000{i}-of-00002.arrow" for i in range(2)]
    for i, name in enumerate(names):
        with pyarrow.ipc.new_stream(saved / "test" / name, table.schema) as stream:
            stream.write_table(table.slice(i, 1))
    (saved / "test" / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (saved / "dataset_dict.json").write_text('{"splits": ["test"]}')
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "indexed.arrow", "saved/test"])
def test_all_forms_hold_the_same_records(files, name):
    assert [row for _, row in read_records(files / name, "x")] == ROWS
    assert len(list(read_records(files / name, "x", 1))) == 1
    assert kind_of(files / name) == "questions"


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_long_value_that_is_stored_once_is_unpacked_a_few_rows_at_a_time(tmp_path, suffix):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import feather, parquet

    value, file = "a" * 2**23, tmp_path / f"rows.{suffix}"
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 64, pyarrow.int32()), [value])
    table = pyarrow.table({"context": column})
    if suffix == "parquet":
        parquet.write_table(table, file, compression="zstd", store_schema=False)
    else:
        feather.write_feather(table, file)
    before = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    try:
        count = 0
        for _, record in read_records(file, "x"):
            count += 1
            assert record["context"] == value and pyarrow.total_allocated_bytes() - before < 2**28
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 64 and peak < 2**27


def test_rows_of_a_dataset_object_are_records():
    class Dataset:  # what `datasets.Dataset` has of a sequence
        def __iter__(self):
            return iter(ROWS)

    assert [where for where, _ in read_records(Dataset(), "x")] == ["Dataset, row 0", "Dataset, row 1"]
    with pytest.raises(
        UserError, match=r"a dict of train, test was given; expected the rows of one, such as data\['te"
    ):
        list(read_records({"train": ROWS, "test": ROWS}, "x"))


def test_squad_shaped_rows_are_set_apart_and_expect_their_first_answer():
    class Characters:
        bos_token_id = unk_token_id = None

        def __call__(self, text, **options):
            return {"input_ids": list(map(ord, text))}

    (context,) = read_tasks(ROWS, Characters())
    said = ["".join(map(chr, ids)) for q in context.questions for ids in (q.question_ids, q.answer_ids)]
    assert said == ["\nWhat?", " lamp", "\nWho?", " nobody"]
    with pytest.raises(UserError, match="row 0 has no answer under 'answers'; leave out questions"):
        read_tasks([ROWS[0] | {"answers": {"text": []}}], Characters())


def test_files_that_hold_no_records_are_refused(files, tmp_path, monkeypatch):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    (tmp_path / "bad.arrow").write_bytes(b"")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "state.json").write_text('{"_data_files": [{"filename": "../x.arrow"}]}')
    for source, reason in {
        tmp_path / "bad.parquet": "cannot be read",
        tmp_path / "bad.arrow": "cannot be read",
        tmp_path / "missing.parquet": "cannot be read",
        tmp_path / "out": "names no files of its folder",
        tmp_path: "is a folder without state.json",
        files / "saved": r"holds the splits test; name one, such as .*saved/test",
    }.items():
        with pytest.raises(UserError, match=reason):
            list(read_records(source, "x"))
    with pytest.raises(UserError, match="list holds no record; expected records with x"):
        list(read_records([], "x"))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"rows\.parquet needs the extra datasets: pip install 'kv-gym\[datasets\]'"):
        list(read_records(files / "rows.parquet", "x"))


def test_a_mapping_of_splits_is_refused_by_fit_as_well():
    from kv_gym.fit.data import read_data

    with pytest.raises(UserError, match=r"a dict of train, test was given; expected the rows of one"):
        read_data({"train": [], "test": []})
