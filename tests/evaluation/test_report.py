"""Reports: reading rows, summing them up, and a page that holds them without letting any of their text act."""

import base64
import hashlib
import json
import math
import re
import sys
from html.parser import HTMLParser

import pytest
from report_rows import ABLATIONS, BAD_NAME, VERSIONS, row, rows
from typer.testing import CliRunner

from kv_gym.cli import app
from kv_gym.errors import UserError
from kv_gym.evaluation.report import Results, markdown, merged, read_results, report
from kv_gym.evaluation.report.charts import chart_styles
from kv_gym.evaluation.report.page import LIMIT, write_page
from kv_gym.evaluation.report.summaries import summaries
from kv_gym.files import MODEL


@pytest.fixture
def results():
    found = Results()
    found.add({"rows": rows() + ABLATIONS}, "rows")
    return found


def at(found, configuration, budget, task="multi_key 512"):
    (point,) = [p for p in found if (p["configuration"], p["budget"], p["task"]) == (configuration, budget, task)]
    return point


# reading


def test_folders_files_and_interrupted_lines_are_read(tmp_path):
    lines = [row("recency", 0.25, [1]), row("recency", 0.125, [0])]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "rows.jsonl").write_text(text + '{"policy": "h2o", "bud')
    (tmp_path / "validation.jsonl").write_text('{"cell": "a", "validation": {"accuracy": 1}}\n')
    (tmp_path / "soak.json").write_text('{"rows": [{"policy": "h2o", "budget": 128, "peak_process_mb": 389}]}')
    (tmp_path / "ablation.json").write_text(json.dumps({"rows": ABLATIONS, "command": "python ablation.py"}))
    found = read_results([tmp_path])
    assert [line["budget"] for line in found.rows] == [0.25, 0.125]
    assert [line["variant"] for line in found.ablations] == ["everything", "without values"]
    assert found.commands == ["python ablation.py", "kv-gym leaderboard board.yml"]
    assert found.versions == VERSIONS


def test_rows_without_a_hash_are_known_by_their_arm_and_by_what_they_measure():
    found = Results()
    live = {"policy": "a", "budget": 0.125, "task": "t", "accuracy": 0.25, "n": 9}
    replayed = {"policy": "a", "budget": 0.125, "task": "t", "accuracy": None, "utility_kept": 0.5, "n": 3}
    found.add({"rows": [live, replayed, live | {"allocation": "global"}]}, "first")
    found.add({"rows": [live | {"accuracy": 0.5, "allocation": "uniform", "evicted": "drop"}]}, "second")
    assert [line["accuracy"] for line in found.rows] == [0.5, None, 0.25]
    found.add({"rows": [live | {"seed": 0}, live | {"sinks": 0, "recent": 0}]}, "third")
    assert len(found.rows) == 5  # a first training run, and no protection instead of the policy's own


def test_a_later_row_of_a_cell_replaces_the_earlier_one_and_versions_stand_side_by_side():
    found = Results()
    found.add({"rows": [row("recency", 0.25, [1]), row("h2o", 0.25, [1])]}, "first")
    found.add({"rows": [row("recency", 0.25, [3], versions={"torch": "2.14.0"})]}, "second")
    assert [(line["policy"], line["accuracy"]) for line in found.rows] == [("recency", 0.75), ("h2o", 0.25)]
    assert found.versions["torch"] == "2.13.0 and 2.14.0"


BAD_ROWS = {
    "no budget": ({"policy": "a"}, "has no policy and budget"),
    "text for a number": ({"policy": "a", "budget": 0.5, "accuracy": "high"}, "accuracy is 'high'; expected a number"),
    "budget of zero": ({"policy": "a", "budget": 0}, "budget is 0"),
    "budget as text": ({"policy": "a", "budget": "<b>"}, "expected a number"),
    "number for a name": ({"policy": 3, "budget": 0.5}, "policy is 3; expected a text"),
    "flat slots": (
        {"policy": "a", "budget": 0.5, "slots": [1, 2]},
        "slots is .* expected a list of numbers for each layer",
    ),
    "contexts": ({"policy": "a", "budget": 0.5, "contexts": {"c": [1]}}, "contexts"),
    "parts": ({"policy": "a", "budget": 0.5, "parts": {"turn 1": 3}}, "parts"),
    "no policy": ({"policy": None, "budget": 0.5}, "has no policy and budget"),
    "budget of NaN": ({"policy": "a", "budget": math.nan}, "budget is nan; expected a number above zero"),
    "two numbers for one": ({"policy": "a", "budget": 0.5, "accuracy": [0.1, 0.2]}, r"accuracy is \[0.1, 0.2\]"),
    "list of sinks": ({"policy": "a", "budget": 0.5, "sinks": [1]}, r"sinks is \[1\]; expected a number"),
    "NaN answers": (
        {"policy": "a", "budget": 0.5, "contexts": {"c": [math.nan, 4, None]}},
        "contexts is .*expected counts of answers",
    ),
    "no answers": (
        {"policy": "a", "budget": 0.5, "contexts": {"c": [1, None, None]}},
        "contexts is .*expected counts of answers",
    ),
    "part of nothing": (
        {"policy": "a", "budget": 0.5, "parts": {"p": {"asked": None, "right": 1}}},
        "parts is .*expected counts of answers",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_refused_in_one_sentence(name):
    line, sentence = BAD_ROWS[name]
    with pytest.raises(UserError, match=sentence) as refusal:
        Results().add({"rows": [line]}, "rows.jsonl")
    assert "rows.jsonl, row 1" in str(refusal.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"rows": 3}', '{"rows": []}'])
def test_files_that_are_no_results_are_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match="is no result file"):
        read_results([tmp_path / "a.json"])
    with pytest.raises(UserError, match="holds no results"):
        read_results([tmp_path])
    with pytest.raises(UserError, match="is no result file"):
        read_results([tmp_path / "missing.json"])


# points


def test_training_runs_become_one_point_with_students_interval(results):
    point = at(summaries(results.rows), "joint, uniform", 0.25)
    shares = [15 / 16, 15 / 16, 1.0]
    mean = sum(shares) / 3
    half = 4.302653 * math.sqrt(sum((s - mean) ** 2 for s in shares) / 2) / math.sqrt(3)
    assert point["accuracy"] == pytest.approx(mean)
    assert (point["accuracy_low"], point["accuracy_high"]) == pytest.approx((mean - half, 1.0))  # cut off at 1
    assert point["role"] == "learned" and point["runs"] == 3 and point["n"] == 4
    assert (point["bytes"], point["weights"], point["total_bytes"]) == (250, 300, 550)
    assert point["slots"] == [[11.0, 20.0], [30.0, 40.0]]
    assert point["parts"] == [
        {"part": "turn 1", "accuracy": 21 / 24, "questions": 24}, {"part": "turn 2", "accuracy": 0.5, "questions": 24},
    ]  # fmt: skip


def test_roles_labels_and_intervals_over_contexts(results):
    found = summaries(results.rows)
    roles = {p["configuration"]: p["role"] for p in found}
    assert roles == {
        "full_cache": "full", "joint, uniform": "learned", "keydiff, uniform": "heuristic",
        f"{BAD_NAME}, uniform": "heuristic", "keydiff, global:softmax": "heuristic",
        "recency, uniform": "null", "random, uniform": "null",
    }  # fmt: skip
    point = at(found, "keydiff, uniform", 0.25)
    assert point["accuracy"] == 11 / 16
    assert 0.5 <= point["accuracy_low"] < 11 / 16 < point["accuracy_high"] <= 0.75
    assert point["nll"] == pytest.approx(11 * 0.5 / 16)
    assert point["utility_kept"] == 0.6 and point["utility_kept_low"] is None  # its contexts tell of answers


def test_gains_and_differences_are_over_the_best_heuristic(results):
    found = summaries(results.rows)
    learned = at(found, "joint, uniform", 0.25)
    assert learned["gain_over"] == "keydiff, uniform"
    assert learned["head_gain"] == [pytest.approx([0.4, -0.1]), pytest.approx([0.0, 0.5])]
    assert learned["difference"] == pytest.approx((15 + 15 + 16) / 48 - 11 / 16)
    assert learned["difference_low"] < learned["difference"] < learned["difference_high"]
    assert at(found, "keydiff, uniform", 0.25)["difference"] is None
    assert at(found, "recency, uniform", 0.25)["difference"] == pytest.approx(2 / 16 - 11 / 16)


def test_the_frontier_holds_what_nothing_beats_in_both():
    wanted = [
        row("recency", 0.125, [1], cache_bytes=10), row("h2o", 0.125, [2], cache_bytes=10),
        row("tova", 0.125, [2], cache_bytes=20), row("keydiff", 0.125, [3], cache_bytes=30),
        row("knorm", 0.125, [1], cache_bytes=40), row("full_cache", 1.0, [4], cache_bytes=100),
    ]  # fmt: skip
    front = {p["policy"] for p in summaries(wanted) if p["front_total_bytes"]}
    assert front == {"h2o", "keydiff", "full_cache"}


def test_the_smallest_budget_is_the_last_that_holds_before_the_first_that_does_not():
    full = row("full_cache", 1.0, [4] * 4)
    kept = {0.5: [4] * 4, 0.25: [4] * 4, 0.125: [3, 4, 4, 4], 0.0625: [4] * 4}
    found = summaries([full, *(row("h2o", budget, right) for budget, right in kept.items())])
    assert [p["budget"] for p in found if p["smallest"]] == [0.25]


def test_replay_and_live_rows_of_one_arm_make_one_point():
    replayed = {"policy": "a", "budget": 0.125, "task": "t", "utility_kept": 0.5, "n": 3}
    live = {"policy": "a", "budget": 0.125, "task": "t", "accuracy": 0.25, "accuracy_interval": 0.1, "n": 9}
    (point,) = summaries([replayed, live])
    assert (point["utility_kept"], point["accuracy"], point["nll"]) == (0.5, 0.25, None)
    assert (point["accuracy_low"], point["accuracy_high"]) == pytest.approx((0.15, 0.35))


def test_a_budget_of_one_slot_and_one_of_everything_are_two():
    least = {"policy": "a", "budget": 1, "task": "t", "accuracy": 0.25}
    most = {"policy": "a", "budget": 1.0, "task": "t", "accuracy": 0.75}
    found = Results()
    found.add({"rows": [least, most]}, "rows")
    assert [p["accuracy"] for p in summaries(found.rows)] == [0.25, 0.75]
    assert [line["accuracy"] for line in merged({"rows": [least, most]})] == [0.25, 0.75]


def test_contexts_in_which_nothing_was_asked_say_nothing():
    lines = [row("a", 0.5, [1, 3]), row("b", 0.5, [3, 4])]
    alone = summaries(lines)[0]
    for line in lines:
        line["contexts"]["silent"] = [0, 0, None]
    assert summaries(lines)[0] == alone and None not in (alone["accuracy_low"], alone["difference_low"])


def test_learned_policies_and_nulls_look_like_it_and_hues_are_not_shared(results):
    seen = chart_styles(summaries(results.rows))
    assert next(iter(seen)) == "joint, uniform" and seen["joint, uniform"].colour == "blue"
    assert {style.colour for style in seen.values() if style.role == "null"} == {"grey"}
    assert seen["keydiff, uniform"].colour == seen["keydiff, global:softmax"].colour
    assert seen["keydiff, uniform"].dash != seen["keydiff, global:softmax"].dash
    assert seen["keydiff, uniform"].prime and not seen["keydiff, global:softmax"].prime
    assert len({(style.colour, style.mark, tuple(style.dash)) for style in seen.values()}) == len(seen)


# the page


class Page(HTMLParser):
    """Start tags with their attributes, and the text of scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "script":
            self.inside = True
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "script"

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1] += data


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    found = Results()
    found.add({"rows": rows() + ABLATIONS, "command": f"kv-gym {BAD_NAME}", "versions": {BAD_NAME: BAD_NAME}}, "rows")
    file = write_page(found, tmp_path_factory.mktemp("page") / "report.html", title=f"Report of {BAD_NAME}")
    return file.read_text(encoding="utf-8")


def test_no_text_of_rows_becomes_markup(page):
    read = Page(page)
    assert [tag for tag, _ in read.tags if tag in ("img", "iframe", "link", "object")] == []
    scripts = [list(attributes) for tag, attributes in read.tags if tag == "script"]
    assert scripts == [["type", "id"], *[[]] * 5]  # the data, the library, and four of the page's own
    assert not [name for _, attributes in read.tags for name in attributes if name.startswith("on")]
    assert "<script>alert" not in page


def test_the_page_needs_no_network_and_lets_only_its_own_scripts_run(page):
    read = Page(page)
    assert not [attributes for _, attributes in read.tags if {"src", "href"} & set(attributes)]
    policy = next(a["content"] for tag, a in read.tags if tag == "meta" and "http-equiv" in a)
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in read.scripts[1:]]
    assert re.findall(r"'sha256-([^']+)'", policy) == hashes
    assert "default-src 'none'" in policy and "unsafe-eval" not in policy
    assert len(page.encode()) < LIMIT


def test_the_page_holds_every_number_of_the_points_unrounded(page, results):
    data = json.loads(Page(page).scripts[0])
    for point in summaries(results.rows):
        told = at(data["points"], point["configuration"], point["budget"], point["task"])
        for name in ("accuracy", "accuracy_low", "nll", "utility_kept", "total_bytes", "milliseconds", "difference"):
            assert told[name] == point[name]
    assert [row["low"] for row in data["ablations"]] == [pytest.approx(0.88), 0.6]


def test_a_page_that_would_be_too_large_is_refused(tmp_path, results):
    texts = ["x" * 1000] * 6000
    with pytest.raises(UserError, match="5 MB is most"):
        write_page(results, tmp_path / "report.html", tokens={"texts": texts})
    assert not list(tmp_path.iterdir())


def test_a_folder_has_markdown_and_pictures_of_every_task(tmp_path, results):
    written = report(results, tmp_path / "out")
    text = written.read_text()
    assert "| joint, uniform (multi_key 512) | 1/4 | 0.800 | 95.8% |" in text
    assert "<script>" not in text and "\n    kv-gym leaderboard board.yml\n" in text
    for name in re.findall(r"\]\(([^)]*\.png)\)", text):
        assert (tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG"
    assert len(re.findall(r"\.png\)", text)) == 4
    assert (tmp_path / "out" / "report.html").is_file()


def test_names_are_no_markup_in_markdown():
    text = markdown([{"policy": BAD_NAME, "budget": 0.5, "accuracy": 0.5}])
    assert "<" not in text and text.splitlines()[-1].replace("\\|", "").count("|") == 7


def test_what_files_say_of_themselves_is_no_markup_in_markdown(tmp_path):
    found, link = Results(), "t](http://x.y)"
    about = {"command": f"kv-gym\n\n{BAD_NAME}", "versions": {BAD_NAME: link}}
    found.add({"rows": [row("a", 0.5, [1, 2], task=link, command="", versions={})], **about}, "rows")
    text = report(found, tmp_path / "out", title=BAD_NAME).read_text()
    assert [line[:4] for line in text.splitlines() if "<" in line] == ["    "]  # in code
    assert "](http" not in text.replace("\\](http", "")


UNPRINTABLE = "a\nb\x00\x1b[31m\x07 \ud83d c"


def test_names_that_do_not_print_break_neither_tables_nor_pictures(tmp_path):
    more = dict.fromkeys(("allocation", "evicted", "select", "trigger", "command"), UNPRINTABLE)
    more |= {"task": UNPRINTABLE, "parts": {UNPRINTABLE: {"questions": 4, "correct": 2}}}
    lines = [row(UNPRINTABLE, share, [1, 2], **more) for share in (0.5, 0.25)]
    results = {"rows": [*lines, {"variant": UNPRINTABLE, "budget": 0.5, "accuracy": 0.5}]}
    text = report([results], tmp_path / "out").read_text()
    shown = "a b□□[31m□ □ c"
    assert [line.count("|") for line in text.splitlines() if line.startswith("|")] == [7] * 4
    assert shown in text and not any(letter in text for letter in "\x00\x1b\x07")
    assert (tmp_path / "out" / "report.png").read_bytes()[:4] == b"\x89PNG"
    data = json.loads(Page((tmp_path / "out" / "report.html").read_text()).scripts[0])
    assert data["tasks"] == [shown] == [data["points"][0]["task"]] and data["ablations"][0]["variant"] == shown
    assert markdown(lines).count("\n") == 4


def test_python_gives_files_and_results_alike(tmp_path):
    file = tmp_path / "r.json"
    file.write_text(json.dumps({"rows": rows()}))
    pages = [report(given, tmp_path / "page.html").read_text() for given in ([str(file)], [{"rows": rows()}], file)]
    assert pages[0] == pages[1] == pages[2]
    with pytest.raises(UserError, match=r"none\.json is no result file"):
        report([tmp_path / "none.json"], tmp_path / "page.html")


def test_a_likelihood_above_one_has_its_own_interval():
    lines = [row("a", 0.5, [1, 2, 4])]
    for entry in lines[0]["contexts"].values():
        entry[2] *= 10
    lines[0]["nll"] = sum(entry[2] for entry in lines[0]["contexts"].values()) / 12
    (point,) = summaries(lines)
    assert 1 < point["nll_low"] < point["nll"] < point["nll_high"]


def test_likelihoods_that_are_no_numbers_are_unknown(tmp_path):
    lines = [row("a", 0.5, [1, 2]), row("b", 0.5, [1, 2])]
    lines[0]["contexts"]["context 0"][2] = math.nan
    found = Results()
    found.add({"rows": lines}, "rows")
    (point, _) = summaries(found.rows)
    assert point["nll_low"] == point["nll_high"] == 0.25  # the second context's alone
    write_page(found, tmp_path / "page.html")


def test_a_missing_plotting_library_is_one_sentence(monkeypatch, tmp_path, results):
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(UserError, match=r"vl_convert, which is not installed: pip install 'kv-gym\[report\]'"):
        report(results, tmp_path / "report.html")


def test_nothing_to_show_and_a_file_in_the_way_are_refused(tmp_path, results):
    with pytest.raises(UserError, match="nothing to report: no row"):
        report(Results(), tmp_path / "report.html")
    with pytest.raises(UserError, match="result 1 is int; expected a file or folder of results, or what evaluate"):
        report([3], tmp_path / "report.html")
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match=r"name a folder, or a file that ends in .html"):
        report(results, tmp_path / "taken")


# the command line


def command(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_the_command_writes_the_page(tmp_path):
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(line) + "\n" for line in rows()))
    done = command(lines, "--out", tmp_path / "page.html", "--title", BAD_NAME)
    assert done.exit_code == 0 and done.stdout.startswith("wrote ")
    assert json.loads(Page((tmp_path / "page.html").read_text()).scripts[0])["title"] == BAD_NAME


@pytest.mark.skipif(not MODEL.is_dir(), reason="the reference model is not here")
def test_the_command_shows_the_tokens_of_a_reference_context(tmp_path):
    options = ["--model", "reference", "--policies", "recency,keydiff", "--tokens", 64, "--context", 2]
    assert command("--out", tmp_path / "page.html", *options).exit_code == 0
    view = json.loads(Page((tmp_path / "page.html").read_text()).scripts[0])["tokens"]
    texts = [text.strip() for text in view["texts"]]
    asked = [texts[place] for place in view["asked"]]
    answers = " ".join(one["answer"] for one in view["questions"]).split()
    assert len(texts) == 65 and sorted(asked) == sorted(answers)  # two facts of two words, both asked for


def test_a_half_named_token_view_is_refused(tmp_path):
    for options in ([], ["--model", "reference"], ["--policies", "recency"]):
        done = command("--out", tmp_path / "page.html", *options)
        assert isinstance(done.exception, UserError) and "--model and --policies" in str(done.exception)
