"""The report in a browser: its numbers are those of the rows, its struck-through tokens those that a cache evicts."""

import pytest
from live_models import feed, tiny, tokens
from report_rows import ABLATIONS, BAD_NAME, rows

from kv_gym import EvictingCache, make_policy
from kv_gym.evaluation.report import Results
from kv_gym.evaluation.report.page import write_page
from kv_gym.evaluation.report.token_view import token_view
from kv_gym.evaluation.tasks import TaskContext, TaskQuestion

LENGTH = 61
POLICIES = ("keydiff", "streaming_llm", "h2o", "random")
pytestmark = pytest.mark.usefixtures("clean_console")


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    found = Results()
    about = {"command": f"kv-gym evaluate {BAD_NAME}", "versions": {"torch": "2.13.0"}}
    found.add({"rows": rows() + ABLATIONS, **about}, "rows")
    ids = tokens(1, LENGTH)[0].tolist()
    context = TaskContext(tuple(ids), (TaskQuestion((1,), tuple(ids[30:32])),))
    view = token_view(
        model, context, {name: make_policy(name) for name in POLICIES}, lambda some: " ".join(f"<b>{i}" for i in some),
        asked=[30, 31],
    )  # fmt: skip
    return write_page(found, tmp_path_factory.mktemp("report") / "report.html", f"Of {BAD_NAME}", view)


@pytest.fixture
def page(chromium, file):
    from selenium.webdriver.support.ui import WebDriverWait

    chromium.get(file.as_uri())
    wait = WebDriverWait(chromium, 60)
    wait.until(lambda d: d.execute_script("return document.documentElement.dataset.ready") == "true")
    return chromium


def choose(page, name, value):
    """Choose from a selector what it offers."""
    offered = page.execute_script(
        """const select = document.getElementById(arguments[0]); select.value = arguments[1];
        select.dispatchEvent(new Event('change')); return select.value""",
        name, str(value),
    )  # fmt: skip
    assert offered == str(value)


def table(page, name):
    """Rows of a table: what each cell says unrounded, and which configuration, budget and so on it is of."""
    return page.execute_script(
        """return [...document.querySelectorAll(`#${arguments[0]} tbody tr`)].map((line) => ({...line.dataset,
        ...Object.fromEntries([...line.cells].map((cell) => [cell.dataset.field, cell.dataset.value]))}))""",
        name,
    )


def mean(values):
    return sum(values) / len(values)


# numbers


@pytest.mark.parametrize("task", ["multi_key 512", "dialogue turns 512"])
def test_tables_hold_the_numbers_of_the_rows(page, task):
    choose(page, "task", task)
    shown = {(line["configuration"], float(line["budget"])): line for line in table(page, "quality-table")}
    costs = {(line["configuration"], float(line["budget"])): line for line in table(page, "frontier-table")}
    groups = {}
    for row in rows():
        if row["task"] == task:
            label = row["policy"] if row["policy"] == "full_cache" else f"{row['policy']}, {row['allocation']}"
            groups.setdefault((label, row["budget"]), []).append(row)
    assert set(shown) == set(costs) == set(groups)
    for place, same in groups.items():
        for name in ("accuracy", "nll", "utility_kept"):
            known = [row[name] for row in same if row[name] is not None]
            assert (float(shown[place][name]) if known else None) == (pytest.approx(mean(known)) if known else None)
        assert float(costs[place]["bytes"]) == pytest.approx(mean([row["cache_bytes"] for row in same]))
        assert float(costs[place]["milliseconds"]) == pytest.approx(mean([row["milliseconds"] for row in same]))
        assert int(shown[place]["runs"]) == len(same)


def test_charts_draw_a_mark_for_every_point_that_is_shown(page):
    count = "return document.querySelectorAll('#chart-accuracy .mark-symbol > path').length"
    press = "document.querySelector(`#legend button[data-configuration='${arguments[0]}']`).click()"
    shown = [row for row in rows() if row["task"] == "multi_key 512" and row["seed"] in (None, 0)]
    drawn = {(row["policy"], row["budget"]) for row in shown if row["policy"] != "full_cache"}
    assert page.execute_script(count) == len(drawn)  # keydiff with the setting that does best
    page.execute_script(press, "recency, uniform")
    wait(page, lambda: page.execute_script(count) == len(drawn) - 2)
    page.execute_script("document.getElementById('every').click()")
    wait(page, lambda: page.execute_script(count) == len(drawn) + 2)


def test_charts_are_drawn_as_wide_as_they_stand(page):
    """The browser shrinks a drawing that is wider than its place, text and all."""
    page.set_window_size(1600, 1200)
    page.refresh()
    page.execute_async_script(
        """const done = arguments[0];
        (function wait() { document.documentElement.dataset.ready === "true" ? done() : setTimeout(wait, 50); })()"""
    )
    drawn = page.execute_script(
        """return [...document.querySelectorAll('#quality-figures svg')].map((svg) =>
        [+svg.getAttribute('width'), svg.getBoundingClientRect().width])"""
    )
    assert len(drawn) > 1 and all(width == pytest.approx(shown, abs=1) for width, shown in drawn)


def test_columns_sort_both_ways(page):
    press = "document.querySelector(`#quality-table th[data-field='${arguments[0]}'] button`).click()"
    for column in ("nll", "utility_kept", "budget_text"):
        orders = []
        for _ in range(2):
            page.execute_script(press, column)
            told = [line["budget" if column == "budget_text" else column] for line in table(page, "quality-table")]
            known = [float(value) for value in told if value is not None]
            assert told[: len(known)] == [value for value in told if value is not None]  # what is not known comes last
            orders.append(known)
        assert sorted([sorted(orders[0]), sorted(orders[0], reverse=True)]) == sorted(orders)


def test_heads_show_slots_and_the_gain_over_the_best_heuristic(page):
    choose(page, "heads-configuration", "joint, uniform")
    choose(page, "heads-budget", 0.125)
    cells = {
        (int(c["layer"]), int(c["head"])): (float(c["slots"]), float(c["gain"])) for c in table(page, "heads-table")
    }
    assert cells == {
        (0, 0): pytest.approx((11, 0.4)), (0, 1): pytest.approx((20, -0.1)), (1, 0): pytest.approx((30, 0)),
        (1, 1): pytest.approx((40, 0.5)),
    }  # fmt: skip
    labels = page.execute_script(
        "return [...document.querySelectorAll('#chart-gain .mark-rect > path[aria-label]')].map((one) => one.ariaLabel)"
    )
    assert any("layer: 1" in label and "head: 1" in label and "gain: +0.5" in label for label in labels)


def test_parts_and_ablations_hold_the_numbers_of_the_rows(page):
    told = {(line["configuration"], line["part"]): float(line["accuracy"]) for line in table(page, "parts-table")}
    assert told == {("joint, uniform", "turn 1"): 21 / 24, ("joint, uniform", "turn 2"): 0.5}
    told = {line["variant"]: float(line["accuracy"]) for line in table(page, "ablations-table")}
    assert told == {row["variant"]: row["accuracy"] for row in ABLATIONS}


# tokens


def evicted(model, policy, slots, rule):
    """Of every layer and head the tokens that the live cache lets go."""
    with EvictingCache(model, policy, slots, allocation=rule) as cache:
        feed(model, tokens(1, LENGTH), cache)
        cache.compress()
        return {
            (layer, head): sorted(set(range(LENGTH)) - set(held))
            for layer in cache.evicting_layers
            for head, held in enumerate(cache.kept_positions(layer)[0].tolist())
        }


def struck(page):
    return page.execute_script(
        "return [...document.querySelectorAll('#tokens-text .evicted')].map((one) => Number(one.dataset.token))"
    )


def slide(page, place):
    """Move the slider; the slots that it says."""
    return page.execute_script(
        """const slider = document.getElementById('tokens-budget'); slider.value = arguments[0];
        slider.dispatchEvent(new Event('input'));
        return Number(document.getElementById('tokens-slots').dataset.slots)""",
        place,
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_struck_through_tokens_are_those_that_the_live_cache_evicts(page, model, policy):
    choose(page, "tokens-policy", POLICIES.index(policy))
    normalisation = "" if make_policy(policy).comparable else ":softmax"
    seen = set()
    for place in (150, 500, 850):
        slots = slide(page, place)
        seen.add(slots)
        for allocation, rule in (("uniform", "uniform"), ("global", f"global{normalisation}")):
            choose(page, "tokens-allocation", allocation)
            gone = evicted(model, policy, slots, rule)
            for layer, head in ((0, 1), (2, 0)):
                choose(page, "tokens-layer", layer)
                choose(page, "tokens-head", head)
                assert struck(page) == gone[layer, head]
            choose(page, "tokens-layer", -1)
            choose(page, "tokens-head", -1)
            assert struck(page) == sorted(set.intersection(*map(set, gone.values())))
    assert len(seen) == 3


def test_buttons_set_the_budget_and_the_slider_reaches_both_ends(page):
    page.execute_script("document.querySelector('#tokens-presets button[data-slots=\"15\"]').click()")
    assert page.execute_script("return document.getElementById('tokens-slots').value") == "15 slots a head, 1/4"
    assert slide(page, 0) == 1
    assert slide(page, 1000) == LENGTH and struck(page) == []


def test_asked_facts_are_outlined_and_text_is_text(page):
    outlined = "return [...document.querySelectorAll('#tokens-text .asked')].map((one) => one.textContent)"
    ids = tokens(1, LENGTH)[0].tolist()
    assert page.execute_script(outlined) == [f"<b>{ids[30]}", f"<b>{ids[31]}"]
    assert page.execute_script("return document.querySelectorAll('#tokens-text b').length") == 0


# the page as such


def test_names_are_text_wherever_they_stand(page):
    page.execute_script("document.getElementById('every').click()")
    assert page.execute_script("return document.querySelectorAll('body img').length") == 0
    assert page.title == f"Of {BAD_NAME}"
    names = page.execute_script("return [...document.querySelectorAll('#legend button')].map((one) => one.textContent)")
    assert f"{BAD_NAME}, uniform" in names
    cells = "return [...document.querySelectorAll('#quality-table td:first-child')].map((one) => one.textContent)"
    assert f"{BAD_NAME}, uniform" in page.execute_script(cells)


def test_nothing_is_fetched(page):
    assert page.execute_script("return performance.getEntriesByType('resource').map((one) => one.name)") == []


def test_light_and_dark_change_with_the_button(page):
    colour = "return getComputedStyle(document.body).backgroundColor"
    before = page.execute_script(colour)
    page.execute_script("document.getElementById('theme').click()")
    assert page.execute_script(colour) != before
    page.execute_script("document.getElementById('theme').click()")
    assert page.execute_script(colour) == before


def test_nothing_is_wider_than_a_phone(page):
    screen = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    try:
        wait(page, lambda: page.execute_script("return innerWidth") == 360)
        wait(page, lambda: page.execute_script("return document.documentElement.scrollWidth") <= 360)
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def wait(page, reached):
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(page, 20).until(lambda _: reached())
