import json

import matplotlib.image
import numpy as np
import pytest

from jlora.train.reporting.metrics import MetricsWriter, plot_curves, read_metrics, smooth
from jlora.train.reporting.trackers import open_trackers


def write(workdir, steps, *, start_step=0):
    with MetricsWriter(workdir, start_step=start_step) as writer:
        for step in steps:
            writer.write(step, {"loss": 1.0 / step, "learning_rate": 1e-3})


def test_one_object_a_step_with_plain_numbers(tmp_path):
    with MetricsWriter(tmp_path / "new" / "workdir") as writer:
        writer.write(1, {"loss": np.float32(0.5), "tokens": np.int64(7), "grad_norm": float("nan")})
    text = (tmp_path / "new" / "workdir" / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "loss": 0.5, "tokens": 7, "grad_norm": null}\n'


def test_every_object_is_on_disk_before_the_next_step(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"loss": 2.0})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]
    writer.close()
    writer.close()


def test_resuming_replaces_the_steps_after_the_checkpoint(tmp_path):
    write(tmp_path, range(1, 8))
    write(tmp_path, range(6, 10), start_step=5)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert not list(tmp_path.glob("*.part"))


def test_a_new_run_starts_an_empty_file(tmp_path):
    write(tmp_path, range(1, 4))
    write(tmp_path, range(1, 3))
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


def test_a_line_cut_short_by_a_crash_is_dropped(tmp_path):
    write(tmp_path, [1, 2])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    write(tmp_path, [3], start_step=2)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]


def test_every_damaged_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('nonsense\n{"step": 1}\n{"step"\n')
    with pytest.raises(ValueError, match=r"(?s)metrics\.jsonl:1: .*metrics\.jsonl:3: "):
        read_metrics(tmp_path)


def test_reading_a_folder_without_metrics_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="not the workdir of a run"):
        read_metrics(tmp_path)


def test_tensorboard_files_hold_the_same_numbers(tmp_path):
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    settings = {"train": {"project": "tests", "run_name": None}}
    opened = open_trackers(["tensorboard"], tmp_path, settings, start=0, note=print)
    with MetricsWriter(tmp_path, trackers=opened) as writer:
        writer.write(3, {"loss": 0.25})
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, found = path.read_bytes(), []
    while data:
        length = int.from_bytes(data[:8], "little")
        body, check = data[12 : 12 + length], data[12 + length : 16 + length]
        assert masked_crc32c(body) == int.from_bytes(check, "little")
        event = Event.FromString(body)
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        data = data[16 + length :]
    assert found == [(3, "loss", 0.25)]


def test_smoothing_is_the_mean_of_the_neighbours():
    np.testing.assert_allclose(smooth(np.arange(20.0), 7)[3:-3], np.arange(20.0)[3:-3])
    np.testing.assert_allclose(smooth([1.0, 5.0, 3.0], 3), [3.0, 3.0, 4.0])
    np.testing.assert_allclose(smooth([1.0, 5.0, 3.0], 1), [1.0, 5.0, 3.0])


@pytest.mark.parametrize("steps", [1, 2, 200])
def test_curves_are_drawn_from_the_file(tmp_path, steps):
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, steps + 1):
            writer.write(step, {"loss": 1 / step, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_second": 5e3})
            if step % 50 == 0:
                writer.write(step, {"eval_loss": 2 / step})
    path = plot_curves(tmp_path)
    first = path.read_bytes()
    assert path == tmp_path / "curves.png"
    assert matplotlib.image.imread(path).std() > 0.01
    assert plot_curves(tmp_path).read_bytes() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_a_value_that_was_never_finite_leaves_a_gap_and_no_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "loss": None}) + "\n" for i in (1, 2)))
    assert plot_curves(tmp_path).stat().st_size > 1000
