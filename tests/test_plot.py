"""Pictures, read back as XML.   python -m pytest tests/test_plot.py -q"""

import json
from xml.etree import ElementTree

import pytest

from data import plot
from data.files import UserError
from data.results.differences import draw_differences
from train import DEFAULTS
from tests.helpers import write_config


def elements(picture, kind, css=""):
    return [e for e in ElementTree.fromstring(picture).iter()
            if e.tag.endswith(kind) and css in e.get("class", "")]


def points_of(line):
    return [tuple(map(float, point.split(","))) for point in line.get("points").split()]


def make_run(folder, losses, tokenizer="t", entropy=6.0, gains=(), **flags):
    """A run that was evaluated every 1000 tokens, but where its loss is None."""
    write_config(folder, {**DEFAULTS, "seed": int(folder.name.rpartition("-")[2]), **flags},
                 tokenizer, entropy)
    lines = [{"step": i, "tokens": 1000 * i, "flops": 0, "flops_with_teacher": 0,
              **({"val_loss": loss} if loss else {"train_loss": 9.0})}
             for i, loss in enumerate(losses)]
    for line, gain in zip(lines, gains):
        line["context_gain"] = gain
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_runs_of_one_arm_are_a_mean_over_their_lines(tmp_path):
    runs = [make_run(tmp_path / "self-high-0", [9.0, None, 5.0, 4.0]),
            make_run(tmp_path / "self-high-12", [8.0, None, 4.0]),
            make_run(tmp_path / "random-1", [9.0, 6.0, 4.5])]
    arms, levels, gains = plot.curves(runs)
    assert levels == {"unigram entropy": 6.0}
    assert arms["random"] == [[(0, 9.0), (1000, 6.0), (2000, 4.5)]] and not gains
    assert plot.mean_curve(arms["self-high"]) == [(0, 8.5), (2000, 4.5)]
    picture = plot.draw_curves(arms, levels, unit=1e3)
    thin, mean = elements(picture, "polyline", "arm0")[:2], elements(picture, "polyline", "arm0")[2]
    assert len(elements(picture, "polyline", "arm0")) == 3 and all(e.get("opacity") for e in thin)
    assert len(elements(picture, "polyline", "arm1")) == 1  # one run: no thin line below it
    (x0, y0), (x1, y1) = points_of(mean)
    assert points_of(thin[1])[1] == pytest.approx((x1, points_of(thin[1])[1][1]))
    (_, level), _ = points_of(elements(picture, "polyline", "soft")[0])
    assert (y0 - level) / (y1 - level) == pytest.approx((8.5 - 6) / (4.5 - 6), abs=0.01)
    labels = [e.text for e in elements(picture, "text")]
    assert {"self-high 4.50", "random 4.50", "unigram entropy 6.00", "0", "2"} <= set(labels)


def test_runs_that_were_evaluated_at_different_steps_have_no_mean(tmp_path):
    runs = [make_run(tmp_path / "self-0", [9.0, None, 5.0, None, 4.0]),
            make_run(tmp_path / "self-1", [9.0, 6.0, 5.0, 4.5, 3.0])]
    arms, levels, _ = plot.curves(runs)
    assert plot.mean_curve(arms["self"]) == []
    picture = plot.draw_curves(arms, levels)
    assert len(elements(picture, "polyline", "arm0")) == 2
    assert "self: no mean" in [e.text for e in elements(picture, "text")]
    # Where both are, on one grid, is enough: a run that is not through, or begins later.
    assert plot.mean_curve([[(0, 1.0), (5, 2.0), (10, 3.0)], [(5, 4.0), (10, 5.0), (15, 6.0)]]) == [
        (5, 3.0), (10, 4.0)]


def test_the_context_gain_is_drawn_below(tmp_path):
    runs = [make_run(tmp_path / "old-0", [9.0, 5.0, 4.0]),
            make_run(tmp_path / "new-0", [9.0, 5.0, 4.0], gains=(0.0, 0.25, 1.0)),
            make_run(tmp_path / "new-1", [9.0, 5.0, 4.0], gains=(0.0, 0.75, 2.0))]
    arms, levels, gains = plot.curves(runs)
    assert list(arms) == ["old", "new"] and list(gains) == ["new"]
    picture = plot.draw_curves(arms, levels, gains=gains)
    below, = elements(picture, "}g")
    assert "new 1.50" in [e.text for e in below]
    assert {e.get("class") for e in below if "stroke-width" in e.attrib} == {"grid", "arm1"}
    assert not elements(plot.draw_curves(arms, levels), "}g")


def test_losses_that_cannot_be_compared_are_not_drawn(tmp_path):
    first = make_run(tmp_path / "random-0", [9.0, 5.0])
    with pytest.raises(UserError, match="different tokenizers"):
        plot.curves([first, make_run(tmp_path / "b-0", [9.0, 5.0], tokenizer="u")])
    assert plot.curves([first, make_run(tmp_path / "c-0", [9.0, 5.0], entropy=6.2)])[1] == {}
    with pytest.raises(UserError, match="no two evaluations"):
        plot.curves([first, make_run(tmp_path / "d-0", [9.0, None])])


def test_a_difference_is_a_dot_in_its_bar_on_a_common_scale():
    rows = [("self <high>", 1.0, -1.0, 3.0), ("random weights", -4.0, -5.0, -3.0)]
    picture = draw_differences([("primary", rows)], "points", "{:+.1f}".format, {"the claim": 6.0})
    bars = [points_of(e) for e in elements(picture, "polyline", "arm0")]
    dots = [float(e.get("cx")) for e in elements(picture, "circle")]
    (zero, _), _ = points_of(elements(picture, "polyline", "ink")[0])
    point = dots[0] - zero
    assert [x - zero for x in dots] == pytest.approx([point, -4 * point], abs=0.5)
    ends = [x - zero for bar in bars for x, _ in bar]
    assert ends == pytest.approx([-point, 3 * point, -5 * point, -3 * point], abs=0.5)
    claim, = elements(picture, "polyline", "arm1")
    assert [x - zero for x, _ in points_of(claim)] == pytest.approx([6 * point] * 2, abs=0.5)
    words = [e.text for e in elements(picture, "text")]
    assert {"+1.0 [-1.0, +3.0]", "the claim +6.0"} <= set(words)
    one_pair = draw_differences([("", [("self", 1.0, None, None)])], "points", str)
    assert not elements(one_pair, "polyline", "arm0") and len(elements(one_pair, "circle")) == 1


def test_labels_do_not_lie_on_one_another():
    assert plot.apart([10, 12, 100], 200, gap=17) == [10, 27, 100]
    assert plot.apart([200, 198, 197, 50], 200, gap=17) == [200, 183, 166, 50]


def test_a_picture_never_takes_the_place_of_another_file(tmp_path, monkeypatch, capsys):
    run, picture = make_run(tmp_path / "self-0", [9.0, 5.0]), tmp_path / "picture.svg"
    (tmp_path / "logo.svg").write_text("<svg></svg>")
    (tmp_path / "folder.svg").mkdir()
    for target in (picture, picture, tmp_path / "folder.svg", tmp_path / "logo.svg"):
        monkeypatch.setattr("sys.argv", ["plot", str(run), "--out", str(target)])
        if target == picture:  # its own picture may be drawn anew
            plot.main()
            assert picture.read_text().startswith("<svg")
        else:
            with pytest.raises(UserError, match="not a picture"):
                plot.main()
    assert (tmp_path / "logo.svg").read_text() == "<svg></svg>"
    for target in (tmp_path / "picture.png", tmp_path / "picture"):
        monkeypatch.setattr("sys.argv", ["plot", str(run), "--out", str(target)])
        with pytest.raises(UserError, match="give a name that ends in .svg"):
            plot.main()
        assert not target.exists()
