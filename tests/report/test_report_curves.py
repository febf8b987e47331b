"""What the report draws of a log: which panels, over which axes, and what is left of long logs."""

import numpy as np
import pytest
from support.logs import BEGIN, EPOCHS, FINISHED, event, write_log

from moco.report import curves, figures, runs


def the_run(folder, *records, **more):
    (run,) = runs.find([str(write_log(folder, *records, **more))])
    return run


def drawn(run, key):
    lines = curves.lines_of([run])
    (panel,) = (panel for panel in curves.panels_of(lines) if panel.key == key)
    return {curve.label: curve for curve in curves.curves(panel, lines)}


def test_a_thinned_curve_keeps_its_ends_its_peaks_and_its_gaps():
    values = np.sin(np.arange(200_000) / 999)
    values[[12_345, 77_777, 150_000]] = 50.0, -50.0, np.nan
    kept = curves.thinned(values, 1000)
    assert {0, 12_345, 77_777, 150_000, 199_999} <= set(kept.tolist())
    assert len(kept) <= 1003
    assert (np.diff(kept) > 0).all()
    assert curves.thinned(values[:1000], 1000).tolist() == [*range(1000)]


def test_smoothing_a_thinned_curve_goes_by_its_means_and_not_by_its_peaks(tmp_path):
    values = [*([1.0] * 99 + [101.0]) * 500, None]
    run = the_run(tmp_path, *({"step": step, "grad_norm": value} for step, value in enumerate(values)))
    curve = drawn(run, "grad_norm")[""]
    assert len(curve.y) < len(values) and np.nanmax(curve.y) == 101
    assert curve.level is not None
    assert np.nanmean(curve.level) == pytest.approx(2, rel=0.02)  # as of all values
    assert np.nanmean(curve.y) > 20
    np.testing.assert_array_equal(np.isnan(curve.level), np.isnan(curve.y))


def test_numbers_that_no_float32_has_are_none(tmp_path):
    odd = {"loss": 1e300, "epoch": -1e308, "time": 1e308}
    run = the_run(tmp_path, {"step": 1e308, "loss": 1.0}, {"step": 1, **odd}, {"step": 2, "loss": 2.0, "epoch": 1})
    assert run.damaged == 1 and [*run.figures["loss"][1]] == [2.0]
    assert "time" not in run.figures and [*run.figures["epoch"][1]] == [1.0]


def test_an_epoch_ends_with_its_last_record(tmp_path):
    run = the_run(tmp_path, *EPOCHS, {"step": 5, "epoch": 2, "loss": 1.0}, {"step": 4, "epoch": 1, "knn": 50.0})
    assert drawn(run, "loss")["training batches"].x["epoch"].tolist() == [0.5, 1.0, 1.5, 2.0, 2.5]
    assert drawn(run, "knn")[""].x["epoch"].tolist() == [2.0]


def test_finished_epochs_of_a_log_say_where_each_ends(tmp_path):
    """Seven steps an epoch and a record every ten: no epoch ends with its last record."""
    records = [{"step": step, "epoch": (step - 1) // 7, "loss": 1.0} for step in (10, 20, 28, 35)]
    run = the_run(tmp_path, *records[:3], {"step": 28, "epoch": 3, "finished_epochs": 4, "knn": 50.0}, records[3])
    assert drawn(run, "loss")["training batches"].x["epoch"] == pytest.approx([10 / 7, 20 / 7, 4, 5])
    assert drawn(run, "knn")[""].x["epoch"].tolist() == [4.0]


@pytest.mark.parametrize(
    ("last", "more", "expected"),
    [(BEGIN, {}, None), (FINISHED, {}, [0.5, 1]), (BEGIN, {"finished_epochs": 1}, [0.5, 1])],
    ids=["running", "finished", "measured"],
)
def test_how_long_a_first_epoch_is_shows_at_its_end(tmp_path, last, more, expected):
    run = the_run(tmp_path, *EPOCHS[:2], *[{"step": 2, "epoch": 0, **more}] * bool(more), events=[last])
    found = drawn(run, "contrast")["top-1"].x["epoch"]
    assert (None if found is None else found.tolist()) == expected


def test_hours_between_a_stop_and_its_resumption_are_no_time_of_the_run(tmp_path):
    again = event("begin", 9_000.0, 2, 1, resumed="x")
    records = [{"step": s, "epoch": 0, "time": t, "loss": 1.0} for s, t in ((1, 110), (2, 130), (3, 9_005), (4, 9_015))]
    run = the_run(tmp_path / "whole", *records, events=[BEGIN, again])
    assert drawn(run, "loss")["training batches"].x["time"].tolist() == [10.0, 30.0, 35.0, 45.0]
    older = the_run(tmp_path / "older", {"step": 1, "loss": 1.0})
    (curve,) = drawn(older, "loss").values()
    assert curve.x["time"] is curve.x["epoch"] is None


def test_steps_of_an_older_version_before_a_resumption_have_no_place_in_time(tmp_path):
    old = [{"step": 1, "loss": 1.0, "lr": 1.0}, {"step": 2, "loss": 1.0}]
    new = [{"step": s, "loss": 1.0, "time": 9_000.0 + s} for s in (3, 4)]
    run = the_run(tmp_path, *old, *new, events=[event("begin", 9_000.0, 2, resumed="x")])
    (curve,) = drawn(run, "loss").values()
    np.testing.assert_array_equal(curve.x["time"], [np.nan, np.nan, 3, 4])
    assert drawn(run, "lr")[""].x["time"] is None


def test_a_figure_without_a_panel_gets_one_and_places_get_none(tmp_path):
    records = [{"step": 1, "epoch": 0, "time": 1.0, "eta_seconds": 3, "mine/x": 1.0, "nothing": None, "knn_5": 20.0}]
    lines = curves.lines_of([the_run(tmp_path, *records)])
    panels = {panel.title: panel for panel in curves.panels_of(lines)}
    assert list(panels) == ["k-NN accuracy on held-out images", "mine/x"]
    assert panels["k-NN accuracy on held-out images"].names == {"knn": "first k", "knn_5": "k = 5"}


def test_each_rate_of_a_probe_is_a_line(tmp_path):
    record = {"step": 1, "epoch": 0, "loss/lr30": 2.0, "loss/lr0.1": 3.0, "images_per_second": 9.0}
    lines = curves.lines_of([the_run(tmp_path / "p", record, log="lincls")])
    assert [line.name for line in lines] == ["p", "p, lr 30", "p, lr 0.1"]
    assert [line.figures for line in lines[1:]] == [{"loss": "loss/lr30"}, {"loss": "loss/lr0.1"}]
    assert len({line.colour for line in lines}) == 3


def test_every_line_of_many_has_a_colour_of_its_own():
    for many in (10, 11, 60):
        assert len({curves.colour(i, many) for i in range(many)}) == many


@pytest.mark.parametrize("align", curves.AXES)
def test_panels_are_written_as_png(tmp_path, align):
    run = the_run(tmp_path / "run", *EPOCHS, events=[BEGIN])
    lines = curves.lines_of([run])
    found = figures.figure(curves.PANELS[0], lines, align)
    (line, *_) = found.axes[0].get_lines()
    assert line.get_ydata().tolist() == pytest.approx([1, 0.5, 1 / 3, 0.25])
    expected = {"step": [1, 2, 3, 4], "epoch": [0.5, 1, 1.5, 2], "time": [10, 20, 30, 40]}[align]
    assert line.get_xdata().tolist() == expected
    assert found.axes[0].get_xlabel() == {"step": "steps", "epoch": "epochs", "time": "seconds"}[align]


def test_a_run_may_be_named_in_letters_that_dejavu_has_not(tmp_path):
    lines = curves.lines_of([the_run(tmp_path / "猫 $x", *EPOCHS)])  # filterwarnings = error
    written = figures.write(str(tmp_path), {"log": (curves.PANELS[2:3], lines)}, "step")
    assert written == [str(tmp_path / "log_contrast.png")]
    assert figures.uri(curves.PANELS[2], lines, "step").startswith("data:image/png")
