"""Reports show the stored results."""

import dataclasses
import json
from pathlib import Path

import pytest

pytest.importorskip("ml_collections")

from experiments import report, sweep
from experiments.base import cli, figures
from experiments.sweeps import grids, jobs, plots

REPOSITORY = Path(__file__).parents[2]
TINY = jobs.Grid(
    "Tiny",
    tuple(
        jobs.Job(f"{layer}, width {dim}", layer, {"model.dim": dim, jobs.RATE: rate})
        for layer in ("lru", "gru")
        for dim in (16, 32)
        for rate in (0.1, 0.2)
    ),
    {"accuracy": "accuracy"},
    "accuracy",
    {"lru, width 16": "0.9"},
    "a paper",
)


def row(label, seed, rate, accuracy=None, seconds=60.0):
    summary = {} if accuracy is None else {"summary": {"accuracy": accuracy, "step": 9}}
    return {
        "grid": "tiny",
        "label": label,
        "config": label.split(",")[0],
        "overrides": {"seed": seed, "model.dim": int(label[-2:]), jobs.RATE: rate},
        "seconds": seconds,
        "cores": 2,
        "versions": {"python": "3", "jax": "0", "seqjax": "0"},
    } | summary


ROWS = [
    row("lru, width 16", 0, 0.1, 0.2),
    row("lru, width 16", 0, 0.2, 0.5),
    row("lru, width 16", 1, 0.2, 0.7),
    row("lru, width 32", 0, 0.1, 0.9),
    row("gru, width 16", 0, 0.1, None),
]


def test_a_report_shows_the_best_rate_and_every_seed():
    text = report.table(TINY, ROWS)
    assert "| lru, width 16 | 0.600 (0.500 to 0.700) | 0.9 | 9 | 2 | 0.2 | 1.0 |" in text
    assert "| lru, width 32 | 0.900 |  | 9 | 1 | 0.1 | 1.0 |" in text
    assert "| gru, width 16 |  |  |  | 1, 1 diverged | 0.1 | 1.0 |" in text
    assert "Published: a paper." in text
    made_with = report.made_with("tiny", TINY, ROWS)
    assert made_with.startswith("`python -m experiments.sweep --grids=tiny`: 0.1 hours, python 3")
    assert made_with.endswith("4 of 8 jobs have not run.")
    every = [row(job.label, 0, job.overrides[jobs.RATE]) for job in TINY.jobs]
    assert "have not run" not in report.made_with("tiny", TINY, every)


def test_a_column_shows_ratios_to_a_label():
    grid = dataclasses.replace(TINY, relative={"accuracy": "lru, width 16"})
    text = report.table(grid, ROWS)
    assert "| lru, width 16 | 1.000 (0.833 to 1.167) |" in text
    assert "| lru, width 32 | 1.500 |" in text
    assert "| lru, width 32 |  |" in report.table(grid, ROWS[3:])


def test_names_of_lines_are_apart_and_in_order():
    heights = figures._apart([0.5, 0.1, 0.5, 0.52, 0.9], 0.1)
    assert heights == pytest.approx([0.4067, 0.1, 0.5067, 0.6067, 0.9], abs=1e-3)
    assert min(figures._apart([0.0, 0.01, 0.02], 0.1)) == pytest.approx(0)
    styles = [figures.look(index) for index in range(49)]
    assert len({(style["color"], style["marker"]) for style in styles}) == 49


def test_a_report_keeps_other_settings_apart():
    other, own = dict(ROWS[4]), dict(ROWS[0])
    other |= {"set": {"steps": 7}, "overrides": other["overrides"] | {"steps": 7}}
    own |= {"set": {"model.dim": 8}, "overrides": own["overrides"] | {"model.dim": 8}}
    gone = ROWS[0] | {"config": "a grid may lose jobs"}
    groups = report.by_settings(TINY, [ROWS[3], other, own, gone])
    assert groups == {"": [ROWS[3]], " --set=steps=7": [other], " --set=model.dim=8": [own]}


def test_a_report_has_its_figure(monkeypatch, tmp_path, capsys):
    grid = dataclasses.replace(TINY, figure="model.dim")
    monkeypatch.setitem(grids.GRIDS, "tiny", grid)
    results = tmp_path / "r.jsonl"
    given = {"data.path": "my text"}
    longer = ROWS[0] | {"overrides": ROWS[0]["overrides"] | given, "set": given}
    results.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, longer]))
    arguments = ["report", f"--results={results}", f"--figures={tmp_path}"]
    assert cli.run(report.define_flags, report.main, arguments) == 0
    assert (tmp_path / "tiny.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "![tiny](tiny.png)" in printed
    assert "### With `--set='data.path=my text'`" in printed
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert len(drawn) == 2
    assert all(f"![tiny]({name})" in printed for name in drawn)
    assert "Not run yet: `python -m experiments.sweep --grids=mqar`." in printed


def test_the_page_is_the_report_of_the_results(tmp_path, capsys):
    figures = tmp_path / "not" / "there"
    arguments = ["report", f"--results={REPOSITORY / sweep.RESULTS}", f"--figures={figures}"]
    assert cli.run(report.define_flags, report.main, arguments) == 0
    assert (
        capsys.readouterr().out
        == (REPOSITORY / "experiments" / "results" / "RESULTS.md").read_text()
    )
    assert all(
        (REPOSITORY / "experiments" / "results" / made.name).exists() for made in figures.iterdir()
    )


def test_curves_run_over_tokens_and_seconds():
    grid = dataclasses.replace(TINY, figure="curve")
    summary = {"accuracy": 0.5, "step": 10, "tokens": 1000, "tokens_per_second": 50.0}
    ran = row("lru, width 16", 0, 0.1) | {"summary": summary, "curve": [[5, 0.4], [10, 0.5]]}
    by_seconds, by_tokens = plots.curves(grid, [ran, row("gru, width 16", 0, 0.1, None)])
    assert by_tokens == {"lru, width 16": [(500.0, 0.4), (1000.0, 0.5)]}
    assert by_seconds == {"lru, width 16": [(10.0, 0.4), (20.0, 0.5)]}


def test_the_horizon_counts_right_answers_beyond_chance():
    grid = dataclasses.replace(TINY, answers=200)
    rows = [
        row("lru, width 16", seed, 0.1) | {"summary": {"accuracy": 0.1, "scaled_accuracy": score}}
        for seed, score in ((0, 0.25), (1, 0.5))
    ]
    head, _, line = report.table(grid, rows).splitlines()[:3]
    cells = dict(zip(head.split(" | "), line.split(" | "), strict=True))
    assert cells["horizon"] == "75.0"
    assert "horizon" not in report.table(TINY, rows)


def tracked(label, words, *accuracies):
    """Return a result of state tracking with accuracies at 40 and 256 symbols."""
    summary = {"chance": 0.5, "step": 1}
    summary |= dict(zip(("accuracy_40", "accuracy_256"), accuracies, strict=True))
    job = jobs.Job(label, f"{grids.STATE}:{words}", {})
    return job, {"label": label, "config": job.config, "overrides": {}, "summary": summary}


def test_a_map_has_layers_by_tasks(tmp_path):
    """Draw labels of a layer, of a layer with an option, and of a task with an option."""
    made = [
        tracked("deltanet, [-1, 1]", "parity,deltanet,negative", 1.0, 0.75),
        tracked("S3, 2 updates", "S3,deltaproduct", 0.6, 0.4),
        tracked("S3, gru", "S3,gru", 1.0, 1.0),
    ]
    rows = [row for _, row in made]
    columns = {"accuracy_40": "T = 40", "accuracy_256": "T = 256", "scaled_accuracy": ""}
    grid = dataclasses.replace(
        TINY, jobs=tuple(job for job, _ in made), columns=columns, metric="accuracy_256"
    )
    cells = plots.tracking_cells(grid, [*rows, rows[0] | {"label": "gru", "summary": {}}])
    assert cells == {
        ("deltanet, [-1, 1]", "parity"): [1.0, 0.5],
        ("deltaproduct, 2 updates", "S3"): pytest.approx([0.2, -0.2]),
        ("gru", "S3"): [1.0, 1.0],
    }
    plots.figure(tmp_path / "map.png", dataclasses.replace(grid, figure="map"), rows)
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_a_map_shows_numbers_and_gray_cells():
    _, [axis] = figures.panels(1, (3, 2))
    figures.draw_map(axis, {("a", "x"): 0.979, ("b", "y"): -0.1}, ["a", "b"], ["x", "y"])
    assert [text.get_text() for text in axis.texts] == ["0.98", "0.00"]
    assert axis.images[0].get_array().mask.tolist() == [[False, True], [True, False]]


def test_a_report_without_state_tracking_has_no_map(tmp_path):
    grouped = {name: {} for name in grids.GRIDS}
    assert report.overview(tmp_path, grouped, ours=True) == ""
    assert not list(tmp_path.iterdir())


def test_a_figure_over_lengths_takes_them_from_the_columns(tmp_path):
    columns = {"accuracy_64": "T = 64", "accuracy_1024": "T = 1,024"}
    grid = dataclasses.replace(TINY, columns=columns, metric="accuracy_1024", figure="length")
    rows = [
        row("lru, width 16", seed, 0.1) | {"summary": {"accuracy_64": 1.0, "accuracy_1024": score}}
        for seed, score in ((0, 0.2), (1, 0.4))
    ]
    [lines] = plots._points(grid, rows)
    assert lines == {"lru, width 16": [(64.0, 1.0), (1024.0, pytest.approx(0.3))]}
    plots.figure(tmp_path / "lengths.png", grid, rows)


def test_lines_of_hybrids_start_with_attention(tmp_path):
    grid = grids.GRIDS["hybrid"]
    bits = dict(zip([job.label for job in grid.jobs], range(1, len(grid.jobs) + 1), strict=True))
    rows = [
        {"label": job.label, "overrides": job.overrides, "summary": {grid.metric: bits[job.label]}}
        for job in grid.jobs
    ]
    [lines] = plots._points(grid, rows)
    assert list(lines) == ["lru", "mamba", "gated_deltanet"]
    assert lines["lru"] == [(0.0, 1), (1.0, 2), (2.0, 3), (3.0, 4), (4.0, bits["lru, 1:0"])]
    assert lines["mamba"][0] == (0.0, 1)
    plots.figure(tmp_path / "hybrid.png", grid, rows)
