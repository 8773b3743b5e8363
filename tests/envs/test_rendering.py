"""Rendering: pictures show what stayed, all frames have one size, and windows are optional."""

import warnings
from importlib.util import find_spec

import gymnasium as gym
import numpy as np
import pytest
from env_traces import context, one_head, random_contexts

import kv_gym  # noqa: F401
from kv_gym.envs import rendering
from kv_gym.envs.rendering import (
    EVICTED,
    EVICTED_WRONGLY,
    KEPT,
    KEPT_NEEDLESSLY,
    LEFT,
    LEGEND,
    NO_WINDOW,
    PLOT_WIDTH,
    PROTECTED,
    Window,
    draw_text,
    paste,
    shorten,
    tile,
)


def make(traces, mode="rgb_array", **settings):
    return gym.make("KVEvict-v0", traces=traces, render_mode=mode, **settings)


def row_colours(image, row, tokens, height=24):
    """The colour of each token in a row of the picture."""
    y = rendering.ROWS_TOP + row * height + 5
    return [tuple(image[y, LEFT + int((token + 0.5) * PLOT_WIDTH / tokens)].tolist()) for token in range(tokens)]


def test_rows_show_which_tokens_stay_and_which_should():
    env = make([one_head([0.4, 0.1, 0.3, 0.2, 0.0, 0.6, 0.1, 0.9])], sinks=1, recent=1)
    env.reset()
    before = env.render()
    assert row_colours(before, 0, 8) == [PROTECTED, *[KEPT] * 6, PROTECTED]
    # open are tokens 1 to 6 of worth .1 .3 .2 0 .6 .1; ranked 1, 5, 4, 2, 3, 6
    env.step(np.array([0, 0.9, 0.4, 0.3, 0.5, 0.8, 0.1, 0], np.float32))
    image = env.render()
    # 4 slots: the ends, 1 and 5; the best two are 5 and 2
    assert row_colours(image, 0, 8) == [
        PROTECTED, KEPT_NEEDLESSLY, EVICTED_WRONGLY, EVICTED, EVICTED, KEPT, EVICTED, PROTECTED,
    ]  # fmt: skip
    # a quarter is 2 slots: the ends alone
    assert row_colours(image, 1, 8) == [PROTECTED, *[EVICTED] * 6, PROTECTED]


def test_the_height_of_a_bar_is_the_utility():
    env = make([one_head([0.5, 0.125, 0.375, 0.25, 0.0, 0.625, 0.125, 1.0])], sinks=0, recent=0)
    env.reset()
    image = env.render()
    base = rendering.TITLE_HEIGHT + rendering.WORD_HEIGHT + rendering.BAR_HEIGHT
    bars = image[base - rendering.BAR_HEIGHT : base, LEFT : LEFT + PLOT_WIDTH]
    # left of the middle, where a word's stem is
    heights = [(bars[:, int((token + 0.3) * PLOT_WIDTH / 8)] == rendering.BAR).all(-1).sum() for token in range(8)]
    assert rendering.BAR_HEIGHT == 72 and heights == [36, 9, 27, 18, 0, 45, 9, 72]


def test_each_block_adds_a_row():
    env = make([context(np.random.default_rng(0).random((1, 1, 8, 3)))], budget=4, sinks=0, recent=0)
    env.reset()
    kept = []
    for block in range(3):
        env.step(np.linspace(-1, 1, 8, dtype=np.float32))
        image = env.render()
        kept.append([token for token, colour in enumerate(row_colours(image, block + 1, 8))
                     if colour in (KEPT, KEPT_NEEDLESSLY)])  # fmt: skip
        assert row_colours(image, 0, 8) == [KEPT] * 8
        assert [row_colours(image, row, 8) == [rendering.EMPTY_ROW] * 8 for row in range(4)] == [
            row > block + 1 for row in range(4)
        ]
    # one token is new per block and takes a slot, up to half of them
    assert kept == [[4, 5, 6, 7], [5, 6, 7], [6, 7]]


@pytest.mark.parametrize(
    "settings", [{}, {"heads": "joint"}, {"budget": 4}, {"budget": 0.5, "heads": "joint"}], ids=str
)
def test_all_frames_have_one_even_size(settings):
    env = make(random_contexts(lengths=(16, 9, 1100)), **settings)
    sizes = set()
    for sequence in range(3):
        env.reset(seed=0, options={"sequence": sequence})
        sizes.add(env.render().shape)
        terminated = False
        while not terminated:
            _, _, terminated, _, _ = env.step(env.action_space.sample())
            image = env.render()
            sizes.add(image.shape)
    assert image.dtype == np.uint8 and len(sizes) == 1
    height, width, channels = sizes.pop()
    assert channels == 3 and height % 2 == width % 2 == 0


def test_a_joint_decision_is_the_mean_colour_of_its_heads():
    future = np.zeros((1, 2, 4, 1), np.float32)
    future[0, :, :, 0] = [[0.4, 0.1, 0.2, 0.3], [0.4, 0.1, 0.2, 0.3]]
    env = make([context(future)], heads="joint", sinks=0, recent=0)
    env.reset()
    # half of 8 slots: the first head keeps all, the second nothing; the best are tokens 0 and 3 of both
    env.step(np.array([1, 0.9, 0.8, 0.7, -1, -1, -1, -1], np.float32))
    colours = row_colours(env.render(), 0, 4)
    for token, best in enumerate((True, False, False, True)):
        pair = (KEPT, EVICTED_WRONGLY) if best else (KEPT_NEEDLESSLY, EVICTED)
        np.testing.assert_allclose(colours[token], np.mean(pair, 0), atol=1)


def test_the_tokenizer_of_the_bundled_traces_is_found():
    env = gym.make("KVEvict-v0", render_mode="ansi")
    env.reset(seed=0, options={"sequence": 1})
    assert "<bos>" in env.render()
    image = gym.make("KVEvict-v0", render_mode="rgb_array")
    image.reset(seed=0, options={"sequence": 1})
    top = image.render()[rendering.TITLE_HEIGHT : rendering.TITLE_HEIGHT + rendering.WORD_HEIGHT - 4]
    # the first word, read from below, terminated the first of 65 tokens
    ink = draw_text("<bos>", rendering.SMALL_FONT_SIZE, vertical=True)
    left = LEFT + int(0.5 * PLOT_WIDTH / 65) - ink.shape[1] // 2
    shown = top[-ink.shape[0] :, left : left + ink.shape[1], 0]
    assert np.corrcoef(shown.ravel().astype(float), ink.ravel())[0, 1] < -0.99


def test_a_batch_renders_every_environment_and_shows_the_episode_that_ended():
    env = gym.make_vec(
        "KVEvict-v0", num_envs=2, traces=random_contexts(lengths=(9,)), budget=4, render_mode="rgb_array"
    )
    scalar = [make(random_contexts(lengths=(9,)), budget=4) for _ in range(2)]
    env.reset(options={"sequence": 0, "head": [0, 3], "continuation": 1})
    for one, head in zip(scalar, (0, 3), strict=True):
        one.reset(options={"sequence": 0, "head": head, "continuation": 1})
    for _ in range(3):
        actions = env.action_space.sample()
        env.step(actions)
        for one, action, image in zip(scalar, actions, env.render(), strict=True):
            one.step(action)
            np.testing.assert_array_equal(one.render(), image)
    env.step(env.action_space.sample())  # of the next episode
    assert all(row_colours(image, 1, 9, 24) == [rendering.EMPTY_ROW] * 9 for image in env.render())
    assert tile(env.render()).shape[2] == 3


def test_tiles_keep_the_pixels_of_pictures():
    pictures = [np.full((2, 4, 3), number, np.uint8) for number in range(3)]
    grid = tile(pictures)
    assert grid.shape == (6, 4, 3) and grid[:, 0, 0].tolist() == [0, 0, 1, 1, 2, 2]
    grid = tile([np.full((4, 2, 3), number, np.uint8) for number in range(3)])
    assert grid.shape == (8, 4, 3) and grid[::4, ::2, 0].tolist() == [[0, 1], [2, 255]]


def test_without_a_display_there_is_one_warning():
    env = make(random_contexts(), mode="human")
    with pytest.warns(UserWarning, match="no window can be opened here") as warned:
        env.reset(seed=0)
        env.step(env.action_space.sample())
        env.reset()
    assert [str(one.message) for one in warned if "window" in str(one.message)] == [NO_WINDOW]
    assert env.render() is None
    env.close()


def test_a_toolkit_that_fails_gives_the_same_warning(monkeypatch):
    def no_display(*_, **__):
        raise RuntimeError("no $DISPLAY")

    monkeypatch.setattr("matplotlib.pyplot.figure", no_display)
    with pytest.warns(UserWarning, match="no window can be opened here"):
        Window("test", 1000).show(np.zeros((10, 10, 3), np.uint8))


def test_a_window_shows_every_frame_until_it_is_closed(monkeypatch):
    from matplotlib import pyplot
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    monkeypatch.setattr(FigureCanvasAgg, "required_interactive_framework", "none, but it says so")
    monkeypatch.setattr(Figure, "show", lambda self: None)
    shown = []
    monkeypatch.setattr(FigureCanvasAgg, "start_event_loop", lambda self, seconds: shown.append(seconds))
    env = make(random_contexts(), mode="human")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env.reset(seed=0)
        env.step(env.action_space.sample())
        image = pyplot.figure("KVEvict-v0").axes[0].images[0].get_array()
        env.unwrapped.renderer.mode = "rgb_array"
        np.testing.assert_array_equal(image, env.unwrapped.render())
        env.unwrapped.renderer.mode = "human"
        pyplot.close("KVEvict-v0")  # by hand
        env.reset()
        assert shown == [0.5, 0.5] and not pyplot.fignum_exists("KVEvict-v0")
        batch = gym.make_vec("KVEvict-v0", num_envs=2, traces=random_contexts(), render_mode="human")
        batch.reset(seed=0)
        assert batch.render() is None and len(shown) == 3
        batch.close()
        assert not pyplot.get_fignums()


def test_metadata_lists_the_render_modes():
    env = make(random_contexts())
    assert env.metadata["render_modes"] == ["ansi", "rgb_array", "human"] and env.metadata["render_fps"] > 0


@pytest.mark.skipif(find_spec("moviepy") is None, reason="moviepy is not installed: the extra `video`")
@pytest.mark.filterwarnings("ignore")
def test_videos_can_be_recorded(tmp_path):
    from gymnasium.wrappers import RecordVideo

    env = RecordVideo(make(random_contexts(), budget=4), str(tmp_path), episode_trigger=lambda episode: True)
    env.reset(seed=0)
    terminated = False
    while not terminated:
        _, _, terminated, _, _ = env.step(env.action_space.sample())
    env.close()
    (video,) = tmp_path.glob("*.mp4")
    assert video.read_bytes()[4:8] == b"ftyp" and video.stat().st_size > 2000


def test_text_is_drawn_cut_and_shortened():
    ink = draw_text("code", 13)
    assert ink.shape == draw_text("code", 13, vertical=True).T.shape and ink.min() >= 0 and ink.max() <= 1 and ink.any()
    np.testing.assert_array_equal(np.rot90(ink), draw_text("code", 13, vertical=True))
    assert draw_text("\n", 13).any(), "a control character is a box, not a line break"
    canvas = np.full((10, 10, 3), 255, np.uint8)
    paste(canvas, np.ones((4, 4), np.float32), -2, 8, (1, 2, 3))
    assert (canvas == [1, 2, 3]).all(-1).sum() == 4 and (canvas[:2, 8:] == [1, 2, 3]).all()
    short = shorten("a very long word indeed", 13, 60)
    assert short.endswith("…") and draw_text(short, 13).shape[1] <= 60 and shorten("a", 13, 60) == "a"
    assert len({colour for colour, _ in LEGEND}) == len(LEGEND)
