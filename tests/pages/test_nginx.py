"""The simulator's LRU against a real NGINX: the same requests and sizes, and hits from `$upstream_cache_status`."""

import hashlib
import os
import resource
import shutil
import socket
import subprocess
import time
from http.client import HTTPConnection
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from kv_gym.pages import RequestTrace, read_requests, simulate

SAMPLE = Path(__file__).parents[2] / "traces" / "requests" / "sample.jsonl.gz"
BLOCKS = 256  # of the file system, that the cache may fill
LARGEST = 8  # blocks of a page

# NGINX's cache manager evicts what is above `max_size`, one file and then a sleep of 1 ms; where it finds nothing to do
# it sleeps for ten seconds. The cache `busy`, which is always too full, keeps it from that.
CONFIGURATION = """
daemon off; worker_processes 1; user root; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 64; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  proxy_cache_path {folder}/cache keys_zone=pages:10m inactive=1h max_size={size} use_temp_path=off
    manager_files=1 manager_sleep=1ms;
  proxy_cache_path {folder}/busy keys_zone=busy:10m inactive=1h max_size=1 use_temp_path=off
    manager_files=1 manager_sleep=1ms;
  proxy_cache_key $uri; proxy_cache_valid 200 1h;
  server {{
    listen unix:{folder}/front.sock; keepalive_requests 1000000;
    add_header X-Cache $upstream_cache_status;
    location / {{ proxy_pass http://unix:{folder}/origin.sock:; proxy_cache pages; }}
    location /busy/ {{ proxy_pass http://unix:{folder}/origin.sock:; proxy_cache busy; }}
  }}
  server {{
    listen unix:{folder}/origin.sock;
    location /busy/ {{ return 200 "page"; }}
    location / {{ root {folder}/origin; rewrite ^/([0-9]+)/ /$1 break; }}
  }}
}}
"""


class UnixConnection(HTTPConnection):
    """HTTP over a socket file, so that no port is needed."""

    def __init__(self, path):
        super().__init__("localhost", timeout=20)
        self.path = str(path)

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


def block_size(folder):
    """Bytes of a block as NGINX counts it."""
    size = os.statvfs(folder).f_bsize
    return 512 if size > resource.getpagesize() or size % 512 else size


@pytest.fixture
def nginx(tmp_path_factory):
    """Asks NGINX for a page of so many blocks and says whether it was cached."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        pytest.skip("NGINX is not installed (apt-get install nginx-light)")
    folder = tmp_path_factory.mktemp("n")  # a short name: paths of sockets have 107 characters at most
    block = block_size(folder)
    (folder / "origin").mkdir()
    for blocks in range(1, LARGEST + 1):  # a cached file begins with a header and the key, less than half a block
        (folder / "origin" / str(blocks)).write_bytes(bytes(blocks * block - block // 2))
    (folder / "nginx.conf").write_text(CONFIGURATION.format(folder=folder, size=BLOCKS * block))
    process = subprocess.Popen([program, "-e", folder / "error.log", "-c", folder / "nginx.conf"])
    try:
        for _ in range(200):
            if (folder / "front.sock").exists() or process.poll() is not None:
                break
            time.sleep(0.05)
        assert process.poll() is None, (folder / "error.log").read_text()
        connection, numbers, size_of = UnixConnection(folder / "front.sock"), count(), {}

        def get(path):
            connection.request("GET", path)
            response = connection.getresponse()
            response.read()
            assert response.status == 200, path
            return response.headers["X-Cache"] == "HIT"

        def ask(page, blocks):
            path = f"/{blocks}/{page}"
            size_of[hashlib.md5(path.encode()).hexdigest()] = blocks  # so the cached file is called
            hit, deadline = get(path), time.monotonic() + 20
            # until the manager has made room
            while not hit and sum(size_of.get(name, 0) for name in os.listdir(folder / "cache")) >= BLOCKS:
                get(f"/busy/{next(numbers)}")
                assert time.monotonic() < deadline
            return hit

        for _ in range(100):
            get(f"/busy/{next(numbers)}")
        yield ask
        connection.close()
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.slow
def test_lru_hits_what_nginx_hits(nginx):
    random = np.random.default_rng(0)
    pages = read_requests(SAMPLE).pages[:300].tolist()
    pages += [f"web{number}" for number in np.minimum(random.zipf(1.2, 700), 5000)]
    blocks = {page: int(random.integers(1, LARGEST + 1)) for page in dict.fromkeys(pages)}
    sizes = [blocks[page] for page in pages]
    theirs = np.array([nginx(*each) for each in zip(pages, sizes, strict=True)])
    trace = RequestTrace.from_keys(pages, "asked", sizes=sizes)
    ours = simulate(trace, "lru", BLOCKS - 1, record_hits=True)  # it evicts until there is less than `max_size`
    assert ours.evictions > 100 and theirs.mean() > 0.2
    assert abs(theirs.mean() - ours.hit_rate) < 0.01
    assert (theirs != ours.hit).mean() < 0.01
