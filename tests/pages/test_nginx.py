"""The simulator's LRU against a real NGINX: the same requests, and hits from `$upstream_cache_status`."""

import shutil
import socket
import subprocess
import time
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pytest

from kv_gym.pages import RequestTrace, read_requests, simulate

SAMPLE = Path(__file__).parents[2] / "traces" / "requests" / "sample.jsonl.gz"

# One process: the cache manager, which works every ten seconds, would evict at moments that no simulator knows. The
# fixed size is that of the zone of keys: where it is full, the least recently used entry leaves at once.
CONFIGURATION = """
daemon off; master_process off; worker_processes 1; user root; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 64; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  proxy_cache_path {folder}/cache keys_zone=pages:32k inactive=1h use_temp_path=off;
  server {{
    listen unix:{folder}/front.sock; keepalive_requests 1000000;
    location / {{
      proxy_pass http://unix:{folder}/origin.sock:; proxy_cache pages; proxy_cache_key $uri; proxy_cache_valid 200 1h;
      add_header X-Cache $upstream_cache_status;
    }}
  }}
  server {{ listen unix:{folder}/origin.sock; location / {{ return 200 "page"; }} }}
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


@pytest.fixture
def nginx(tmp_path_factory):
    """Asks NGINX for a page and says whether it was cached."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        pytest.skip("NGINX is not installed (apt-get install nginx-light)")
    folder = tmp_path_factory.mktemp("n")  # a short name: paths of sockets have 107 characters at most
    (folder / "nginx.conf").write_text(CONFIGURATION.format(folder=folder))
    process = subprocess.Popen([program, "-e", folder / "error.log", "-c", folder / "nginx.conf"])
    try:
        for _ in range(200):
            if (folder / "front.sock").exists() or process.poll() is not None:
                break
            time.sleep(0.05)
        assert process.poll() is None, (folder / "error.log").read_text()
        connection = UnixConnection(folder / "front.sock")

        def ask(page):
            connection.request("GET", f"/{page}")
            response = connection.getresponse()
            response.read()
            assert response.status == 200
            return response.headers["X-Cache"] == "HIT"

        yield ask
        connection.close()
    finally:
        process.terminate()
        process.wait(20)


def test_lru_hits_what_nginx_hits(nginx):
    fill = [f"fill{number}" for number in range(600)]
    found = [nginx(page) for page in fill]
    probe = []  # the newest are there: as many as fit, and the first that is not says how many
    while not probe or found[-1]:
        probe.append(fill[-1 - len(probe)])
        found.append(nginx(probe[-1]))
    capacity = len(probe) - 1
    assert 50 < capacity < 500
    pages = read_requests(SAMPLE).pages[:2000].tolist()
    random = np.random.default_rng(0)
    pages += [f"web{number}" for number in np.minimum(random.zipf(1.2, 2000), 5000)]
    found += [nginx(page) for page in pages]
    trace = RequestTrace.from_keys([*fill, *probe, *pages], "asked")
    simulated = simulate(trace, "lru", capacity, record_hits=True).hit
    stretch = slice(len(fill) + len(probe), None)
    theirs, ours = np.array(found)[stretch], simulated[stretch]
    assert theirs.mean() > 0.2 and abs(theirs.mean() - ours.mean()) < 0.01
    assert (theirs != ours).mean() < 0.01
