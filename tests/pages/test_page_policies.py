"""Page policies against golden hits, against libCacheSim's own counts, and by hand."""

from pathlib import Path

import numpy as np
import pytest

from kv_gym.errors import UserError
from kv_gym.pages import RequestTrace, list_page_policies, make_page_policy, read_requests, simulate
from kv_gym.pages.cache import PageCache
from kv_gym.pages.order import order_of
from kv_gym.pages.policies.base import QueuePolicy
from kv_gym.pages.policies.lrb import LRB

DATA = Path(__file__).parents[3] / "shared" / "data" / "requests"
SAMPLE = Path(__file__).parents[2] / "traces" / "requests" / "sample.jsonl.gz"
THEIR_NAMES = {
    "arc": "ARC", "clock": "Clock", "fifo": "FIFO", "lfu": "LFU", "lru": "LRU", "s3_fifo": "S3FIFO", "sieve": "Sieve",
    "two_q": "TwoQ",
}  # fmt: skip

# hits that libCacheSim 0.3.5 counts on the sample that ships, at a fifth and a twentieth of its pages
THEIR_COUNTS = {
    "arc": (6029, 2089), "clock": (5881, 1766), "fifo": (5703, 1693), "lfu": (5983, 2087), "lru": (5846, 1718),
    "s3_fifo": (6114, 2700), "sieve": (5983, 2087), "two_q": (5444, 1857),
}  # fmt: skip
# the same of other policies, by this simulator when it met the table below: objects, and prefixes
OUR_COUNTS = {"belady": (11068, 8622), "gdsf": (5990, 1718), "lirs": (6233, 2767), "slru": (5252, 2352)}
OUR_COUNTS_OF_PREFIXES = {
    "belady_prefix": (11068, 8624), "sglang_leaves": (5846, 1718), "vllm_prefix_lru": (5846, 1718),
}  # fmt: skip

# hit rates on Mooncake's conversation trace, blocks as independent objects, at 1,000, 5,000 and 20,000 blocks
MOONCAKE = {
    "fifo": (0.0435, 0.1067, 0.2659),
    "lru": (0.0445, 0.1104, 0.2875),
    "lfu": (0.0481, 0.0923, 0.2099),
    "clock": (0.0447, 0.1127, 0.2924),
    "sieve": (0.0481, 0.0923, 0.2099),
    "s3_fifo": (0.0543, 0.1444, 0.2292),
    "arc": (0.0529, 0.1136, 0.2892),
    "lirs": (0.0545, 0.1463, 0.2269),
    "two_q": (0.0541, 0.1116, 0.2652),
    "slru": (0.0471, 0.0723, 0.2206),
    "gdsf": (0.0447, 0.1192, 0.2955),
    "belady": (0.1906, 0.3412, 0.3664),
}
MOONCAKE_PREFIX = {
    "vllm_prefix_lru": (0.0445, 0.1118, 0.2878),
    "sglang_leaves": (0.0445, 0.1118, 0.2878),
    "belady_prefix": (0.1907, 0.3412, 0.3664),
}


def pattern(text, policy, capacity):
    hit = simulate(RequestTrace.from_keys(list(text), text), policy, capacity, record_hits=True).hit
    return "".join(".H"[int(each)] for each in hit)


@pytest.mark.parametrize("policy", ["lru", "lfu", "clock", "sieve", "arc"])
def test_hits_by_hand(policy):
    assert pattern("abcadaeb", policy, 3) == "...H.H.."
    assert pattern("abcdabcd", policy, 3) == "........"
    assert pattern("abacadab", policy, 2) == "..H.H.H."


def test_fifo_and_belady_by_hand():
    assert pattern("abcadaeb", "fifo", 3) == "...H...."
    assert pattern("abacadab", "fifo", 2) == "..H...H."
    for text, capacity, hits in (("abcadaeb", 3, 3), ("abcdabcd", 3, 3), ("abacadab", 2, 3)):
        assert pattern(text, "belady", capacity).count("H") == hits
    assert pattern("abacadab", "belady:bypass=true", 2).count("H") == 4


@pytest.fixture(scope="module")
def conversation():
    file = DATA / "mooncake" / "conversation_trace.jsonl.gz"
    if not file.is_file():
        pytest.skip("the conversation trace of Mooncake is not here")
    return read_requests(file)


@pytest.mark.slow
@pytest.mark.parametrize("policy", MOONCAKE)
def test_golden_hit_rates(policy, conversation):
    for capacity, expected in zip((1000, 5000, 20000), MOONCAKE[policy], strict=True):
        tolerance = 1.5e-4 if policy == "gdsf" else 5e-5  # its ties break by time here
        assert simulate(conversation, policy, capacity).hit_rate == pytest.approx(expected, abs=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("policy", MOONCAKE_PREFIX)
def test_golden_hit_rates_of_prefixes(policy, conversation):
    for capacity, expected in zip((1000, 5000, 20000), MOONCAKE_PREFIX[policy], strict=True):
        assert simulate(conversation, policy, capacity, "prefix").hit_rate == pytest.approx(expected, abs=5e-5)


def test_prefixes_by_hand():
    chains = [[0, 1, 2], [0, 3, 4], [0, 1, 2, 5], [6, 7], [0, 1, 2]]
    trace = RequestTrace.from_keys([page for chain in chains for page in chain], "toy", starts=[0, 3, 6, 10, 12])
    for policy in ("vllm_prefix_lru", "lru", "sglang_leaves"):
        assert [simulate(trace, policy, capacity, "prefix").hits for capacity in (4, 5)] == [5, 7]
    assert [simulate(trace, "lru", capacity).hits for capacity in (4, 5)] == [2, 4]
    assert [simulate(trace, "belady_prefix", capacity, "prefix").hits for capacity in (4, 5)] == [7, 7]


def counted_by_libcachesim(name, trace, capacity):
    library = pytest.importorskip("libcachesim", reason="libcachesim is not installed (pip install libcachesim)")
    cache = getattr(library, name)(cache_size=capacity)
    request, hits = library.Request(), 0
    sizes = np.ones(len(trace), int) if trace.sizes is None else trace.sizes
    for at, (page, size) in enumerate(zip(trace.pages.tolist(), sizes.tolist(), strict=True)):
        request.obj_id, request.obj_size, request.clock_time = page + 1, size, at
        hits += bool(cache.get(request))
    return hits


@pytest.fixture(scope="module")
def sample():
    return read_requests(SAMPLE)


@pytest.mark.parametrize(("place", "share"), [pytest.param(0, 5, marks=pytest.mark.slow), (1, 20)])
@pytest.mark.parametrize(
    ("counts", "semantics"),
    [(THEIR_COUNTS | OUR_COUNTS, "objects"), (OUR_COUNTS_OF_PREFIXES, "prefix")],
    ids=["objects", "prefix"],
)
def test_counts_on_the_sample(sample, counts, semantics, place, share):
    capacity = sample.footprint // share
    found = {policy: simulate(sample, policy, capacity, semantics).hits for policy in counts}
    assert found == {policy: hits[place] for policy, hits in counts.items()}


def compare_with_libcachesim(trace, shares):
    total = trace.footprint if trace.sizes is None else trace.summary()["bytes"]
    for share in shares:
        for ours, theirs in THEIR_NAMES.items():
            capacity = max(total // share, 100)
            hits = simulate(trace, ours, capacity, oversize="pass").hits
            assert hits == counted_by_libcachesim(theirs, trace, capacity), f"{ours} at {capacity}"


def test_counts_equal_those_of_libcachesim(sample):
    compare_with_libcachesim(sample.part(0, 300), (20,))


@pytest.mark.slow
@pytest.mark.parametrize("file", [SAMPLE, *sorted([*DATA.glob("*/*.gz"), *DATA.glob("*/*.xz")])], ids=lambda f: f.name)
def test_counts_on_whole_traces_equal_those_of_libcachesim(file):
    compare_with_libcachesim(read_requests(file), (5, 20))


@pytest.mark.parametrize("name", list_page_policies())
def test_every_policy_keeps_to_the_capacity_and_is_repeatable(name):
    """A model cache beside the policy checks each of its decisions."""
    policy = make_page_policy(name)
    random = np.random.default_rng(3)
    trace = RequestTrace.from_keys(random.zipf(1.3, 600).clip(max=60).tolist(), "zipf")
    semantics = "objects" if policy.objects else "prefix"
    first, second = (simulate(trace, name, 12, semantics, record_hits=True) for _ in range(2))
    assert (first.hit == second.hit).all() and 0 < first.hits < len(trace)
    if not isinstance(policy, QueuePolicy):
        return
    policy.now = 0
    policy.start(12, trace)
    cached = set()
    for at, page in enumerate(trace.pages.tolist()):
        policy.now = at
        if page in cached:
            policy.hit(page)
        elif policy.admits(page, 1):
            while len(cached) >= 12:
                cached.remove(policy.evict(page, 1))  # KeyError: it evicts what is not there
            cached.add(page)
            policy.admit(page, 1)
        for gone in policy.discard(page):
            cached.remove(gone)
        if at % 97 == 96 and cached:  # a page expires
            gone = min(cached)
            cached.remove(gone)
            policy.remove(gone)
    assert len(cached) <= 12


def test_sizes_count_bytes_and_expiry_counts_as_a_miss():
    keys, sizes = list("abac"), [4, 4, 4, 5]
    trace = RequestTrace.from_keys(keys, "sized", sizes=sizes)
    found = simulate(trace, "lru", 10)
    assert (found.hits, found.evictions) == (1, 1) and found.byte_hit_rate == pytest.approx(4 / 17)
    times, ttl = [0.0, 1.0, 2.0, 9.0], [5.0] * 4
    again = RequestTrace.from_keys(list("aaaa"), "expiring", times=times, ttl=ttl)
    for policy in ("lru", "fifo", "arc"):
        assert simulate(again, policy, 3, record_hits=True).hit.tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda t: simulate(t, "lruu", 5), "unknown page policy 'lruu'; did you mean 'lru'"),
        (lambda t: simulate(t, "s3_fifo:size=1", 5), "has no setting 'size'"),
        (lambda t: simulate(t, "s3_fifo:small=x", 5), "small='x' is no float"),
        (lambda t: simulate(t, "s3_fifo:small=nan", 5), "small=nan is no float"),
        (lambda t: simulate(t, make_page_policy("s3_fifo", small=None), 5), "small=None is no float"),
        (lambda t: simulate(t, "x" * 5000, 5), "unknown page policy 'x+"),
        (lambda t: simulate(t, "lru", 0), "holds nothing"),
        (lambda t: simulate(t, "lru", 5, "blocks"), "semantics 'blocks' is not known"),
        (lambda t: simulate(t, "arc", 5, "prefix"), "cannot serve prefixes"),
        (lambda t: simulate(t, "sglang_leaves", 5), "serves prefixes only"),
        (lambda t: simulate(t, "sglang_leaves:strategy=best", 5, "prefix"), "no strategy 'best'"),
        (lambda t: simulate(t, "flush:flip=2", 5), "expected 0 to 1"),
        (lambda t: simulate(t, "mark0:predictor=magic", 5), "predictor 'magic' is not known"),
        (lambda t: simulate(t, "no_such_module:Thing", 5), "cannot import page policy"),
        (lambda t: simulate(t, "math:pi", 5), "no subclass"),
        (lambda t: simulate(t, "lrb:order=belady", 5), "order=belady shows no candidates"),
        (lambda t: simulate(t, "lrb:order=lrb", 5), "order=lrb shows no candidates"),
        (lambda t: simulate(t, "lrb:order=arc", 5, "prefix"), "choose order=lru or semantics='objects'"),
    ],
)
def test_mistakes_are_one_sentence(call, complaint):
    trace = RequestTrace.from_keys(list("abcabcdd"), "small")
    with pytest.raises(UserError, match=complaint):
        call(trace)


def test_an_object_above_the_capacity_is_refused_or_passed_by():
    trace = RequestTrace.from_keys(list("aba"), "sized", sizes=[4, 40, 4], lines=[1, 2, 3])
    with pytest.raises(UserError, match="sized, line 2: an object of 40 bytes is larger than the cache of 10"):
        simulate(trace, "lru", 10)
    for policy in ("lru", "fifo", "tail_oracle"):
        assert simulate(trace, policy, 10, oversize="pass").hits == 1


def test_candidates_in_the_order_of_a_classic_policy():
    """FIFO with 3 of 4 places proposes pages; `a`, used among those proposed, returns to its newest end."""
    trace = RequestTrace.from_keys(list("abcdaefag"), "letters")
    cache = PageCache(trace, 4, candidates=2, order=order_of(make_page_policy("tail_oracle:order=fifo")))
    shown = []
    for _, leaves in zip(cache.serve(0, trace.requests), (1, 1, 0), strict=True):
        shown.append("".join("abcdefg"[page] for page in cache.shown()))
        cache.evict(cache.shown()[leaves])
    assert shown == ["ab", "ac", "de"] and cache.hits == 2


@pytest.mark.parametrize("policy", ["s3_fifo", "arc", "lirs", "w_tinylfu"])
def test_one_candidate_in_the_order_of_a_policy_is_that_policy(sample, policy):
    hits = [simulate(sample, name, 1000).hits for name in (policy, f"tail_oracle:order={policy}:candidates=1")]
    assert hits[0] == hits[1] > 0


def test_lru_stands_in_for_a_policy_that_shows_others():
    cache = PageCache(RequestTrace.from_keys(list("abcad"), "letters"), 3, order=order_of(LRB(order="fifo")))
    for _ in cache.serve(0, 5):
        assert cache.shown() == [0, 1, 2]
        cache.leave_to_lru = True
        assert cache.shown() == [1]  # a was used after it
        cache.evict(1)
