from __future__ import annotations

from pathlib import Path

import pytest

from skyrl_train.errors import DataError
from skyrl_train.tracking.run_folder import RunFolder

pytest.importorskip("matplotlib", reason="matplotlib is not installed")


def runs(tmp_path: Path) -> list[Path]:
    folders = [RunFolder(tmp_path / f"seed{seed}") for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        for step in range(6):
            evaluated = {"eval/all/avg_score": step / 5} if step % 5 == 0 and seed == 0 else {}
            folder.append_metrics(step, {"reward/mean": float("nan") if step == 2 else step / (5 + seed)} | evaluated)
    return [folder.path for folder in folders]


def test_a_picture_with_a_panel_for_each_metric_there_is(tmp_path: Path):
    from matplotlib.image import imread

    from skyrl_train.tracking.curves import plot

    folders = runs(tmp_path)
    both = plot(folders, tmp_path / "pictures" / "both.png", title="two seeds")
    one = plot({"a": folders[0] / "metrics.jsonl"}, tmp_path / "one.png", metrics=["reward/mean", "absent"])
    assert imread(both).shape[1] == 2 * imread(one).shape[1]
    assert imread(both)[..., :3].std() > 0.01  # something is drawn


def test_nothing_to_draw(tmp_path: Path):
    from skyrl_train.tracking.curves import plot

    with pytest.raises(DataError, match=r"none of absent is in seed0, seed1"):
        plot(runs(tmp_path), tmp_path / "x.png", metrics=["absent"])
    assert not (tmp_path / "x.png").exists()


def test_labels_of_folders_of_one_name_are_their_paths(tmp_path: Path):
    from skyrl_train.tracking.curves import _labelled

    paths = [tmp_path / "a" / "run" / "metrics.jsonl", tmp_path / "b" / "run" / "metrics.jsonl"]
    assert list(_labelled(paths)) == [str(path.parent) for path in paths]
