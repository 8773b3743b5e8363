"""Every format is read as it is written, and a wrong line is one sentence with its number."""

import gzip
import json
import lzma
import struct

import numpy as np
import pytest

from kv_gym.errors import UserError
from kv_gym.pages import RequestTrace, read_requests

NGINX = (
    '10.0.0.1 - - [27/Nov/2026:10:00:0{second} +0000] "GET {path} HTTP/1.1" 200 {size} "-" "client" '
    '"{status}" "{key}" "0.010" "{ttl}"\n'
)


def nginx(*entries):
    return "".join(NGINX.format(second=s, path=f"/{k}", key=k, size=z, status=w, ttl=t) for s, k, z, w, t in entries)


def test_mooncake_blocks_and_times(tmp_path):
    file = tmp_path / "log.jsonl.gz"
    rows = [
        {"timestamp": 0, "hash_ids": [7, 8]},
        {"timestamp": 1500, "hash_ids": [7, 9, 10]},
        {"timestamp": 2000, "hash_ids": []},
    ]
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    trace = read_requests(file)
    assert trace.pages.tolist() == [0, 1, 0, 2, 3] and trace.starts.tolist() == [0, 2, 5]
    assert trace.times.tolist() == [0, 0, 1.5, 1.5, 1.5] and trace.name == "log" and trace.chained
    assert trace.parents.tolist() == [-1, 0, 0, 2] and trace.depth.tolist() == [0, 1, 1, 2]
    assert trace.next_use.tolist()[:2] == [2, np.iinfo(np.int64).max]


def test_key_lists_times_csv_and_binary_keys(tmp_path):
    keys = tmp_path / "keys.txt"
    keys.write_text("5\n\n*\nx\n5\n")
    assert read_requests(keys).pages.tolist() == [0, 1, 0]
    times = tmp_path / "times.trace.xz"
    times.write_bytes(lzma.compress(b"1 a 10\n2.5 b 20\n3 a 10\n"))
    trace = read_requests(times)
    assert (trace.pages.tolist(), trace.sizes.tolist(), trace.times.tolist()) == ([0, 1, 0], [10, 20, 10], [1, 2.5, 3])
    table = tmp_path / "log.csv"
    table.write_text("timestamp,obj_id,obj_size,ttl\n1,a,10,60\n2,b,20,60\n")
    trace = read_requests(table)
    assert (trace.sizes.tolist(), trace.ttl.tolist(), trace.times.tolist()) == ([10, 20], [60, 60], [1, 2])
    binary = tmp_path / "web.bin"
    binary.write_bytes(struct.pack(">4I", 0, 3, 0, 9))
    assert read_requests(binary).pages.tolist() == [0, 1, 0, 2]


def test_nginx_logs_with_status_and_ttl(tmp_path):
    file = tmp_path / "access.log"
    file.write_text(nginx((0, "a", 10, "MISS", "60"), (1, "b", 5, "BYPASS", "-"), (2, "a", 10, "HIT", "58")))
    trace = read_requests(file)
    assert trace.pages.tolist() == [0, 0] and trace.sizes.tolist() == [10, 10] and trace.ttl.tolist() == [60, 58]
    assert np.diff(trace.times).tolist() == [2]
    plain = tmp_path / "plain.log"
    plain.write_text('::1 - - [27/Nov/2026:10:00:00 +0000] "GET /x HTTP/1.1" 304 - "-" "client \\"x\\""\n')
    assert read_requests(plain).sizes.tolist() == [0]


def test_the_summary_counts_reuse():
    trace = RequestTrace.from_keys(list("abacab"), "toy", sizes=[1, 2, 1, 4, 1, 2])
    found = trace.summary()
    assert (found["requests"], found["footprint"], found["bytes"]) == (6, 3, 7)
    assert found["best_hit_rate"] == 0.5 and found["reuse_50"] == 2
    part = trace.part(2, 5)
    assert (
        part.pages.tolist() == [0, 2, 0] and part.sizes.tolist() == [1, 4, 1] and part.starts.tolist() == [0, 1, 2, 3]
    )


@pytest.mark.parametrize(
    ("text", "format", "complaint"),
    [
        ("", "auto", "is empty"),
        ("\n*\n", "keys", "holds no request"),
        ("1 a 10\n0.5 b 20\n", "auto", "line 2: time 0.5 comes after 1"),
        ("1 a 10\n2 b -5\n", "auto", "line 2: size -5"),
        ("1 a 10\n\n2 b x\n", "auto", "line 3: '2 b x'; expected `time id size`"),
        ("1 a 10\nnan b 3\n", "auto", "line 2"),
        ("1 a 10\n2 b " + "9" * 30, "auto", r"line 2: size 9\d+; expected a size from 0 to 281474976710656 bytes"),
        ("id,size\na,1\nb,1e300\n", "auto", r"line 3: size 9\d+; expected"),
        (nginx((0, "a", 10, "MISS", "60"), (1, "a", 10, "MISS", "nan")), "auto", "line 2: the time that it is valid"),
        ("5\n5 6\n", "keys", "line 2: '5 6'; expected one key"),
        ('{"hash_ids": [1]}\n{"hash_ids": ["x"]}\n', "auto", "line 2: .* expected a JSON object with hash_ids"),
        ('{"hash_ids": [1]}\n[1]\n', "auto", "line 2"),
        ("[" * 100_000, "mooncake", "line 1"),
        ("time,size\n1,2\n", "auto", "line 1: 'time,size'; expected a header"),
        ("time,id,size\n1,a\n", "auto", "line 2: .* expected the columns of the header"),
        ("time,id,size\n1,a,inf\n", "auto", "line 2"),
        (nginx((0, "a", 10, "MISS", "60")) + "not a log line\n", "auto", "line 2: 'not a log line'"),
        (nginx((0, "a", "9" * 5000, "MISS", "60")), "auto", "line 1: "),
        (nginx((5, "a", 10, "MISS", "60"), (1, "b", 5, "MISS", "9")), "auto", "line 2: time"),
        ("a\n", "binary", "request format 'binary' is not known"),
        ("abcd\n", "cache2k", "5 bytes; expected 32-bit keys"),
    ],
)  # fmt: skip
def test_wrong_files_are_one_sentence(text, format, complaint, tmp_path):
    file = tmp_path / "log"
    file.write_text(text)
    with pytest.raises(UserError, match=complaint) as raised:
        read_requests(file, format)
    assert len(str(raised.value)) < 400


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        read_requests(tmp_path / "none")
    broken = tmp_path / "broken.gz"
    packed = gzip.compress(b"1\n2\n" * 5000)
    for damaged in (packed[:40], packed[:20] + b"\xff" * 20 + packed[40:]):
        broken.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be read"):
            read_requests(broken, "keys")
    other = tmp_path / "latin"
    other.write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError, match="line 1: no UTF-8 text"):
        read_requests(other)
