"""Figures of a run in a tracker, of which a stand-in takes the place."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import pytest

from spt_jax.config import LoRAConfig, SPTConfig, TrainConfig
from spt_jax.finetune import DataConfig, FinetuneConfig, finetune
from tests.spt_jax.finetune.test_finetune import reviews, write_csv
from tests.spt_jax.models.builders import write_readable_checkpoint


class Service(types.ModuleType):
    """What trackio and wandb have in common."""

    def __init__(self, *, breaks: bool = False) -> None:
        super().__init__("trackio")
        self.__spec__ = types.SimpleNamespace(name="trackio")  # type: ignore[assignment]
        self.began: list[dict] = []
        self.logged: list[tuple[int, dict]] = []
        self.finished, self.breaks = 0, breaks

    def init(self, **options: object) -> None:
        self.began.append(options)

    def log(self, values: dict, step: int) -> None:
        if self.breaks:
            raise ConnectionError("the service is down")
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def config(tmp_path) -> FinetuneConfig:
    sizes = {"num_positions": 64, "width": 8, "num_heads": 2, "hidden": 16, "num_layers": 1}
    model = write_readable_checkpoint(tmp_path / "base", **sizes)
    rows = write_csv(tmp_path / "a.csv", ["text", "label"], reviews(20, 0))
    return FinetuneConfig(
        model=str(model), data=DataConfig(train_file=rows), tracker="trackio", project="films",
        spt=SPTConfig(lora=LoRAConfig(rank=4), attention=None, ffn=None),
        train=TrainConfig(steps=2, batch_size=4), out=tmp_path / "run",
    )  # fmt: skip


def test_a_tracker_gets_every_step_and_evaluation(config, monkeypatch):
    service = Service()
    monkeypatch.setitem(sys.modules, "trackio", service)
    result = finetune(config)
    (began,) = service.began
    assert (began["project"], began["name"]) == ("films", "run")
    assert began["config"]["train"]["steps"] == 2
    steps = [step for step, values in service.logged if "train/loss" in values]
    assert steps == [1, 2]
    (evaluated,) = [values for _, values in service.logged if "evaluation/accuracy" in values]
    assert evaluated["evaluation/accuracy"] == result.figures["accuracy"]
    assert service.finished == 1


def test_a_service_that_is_down_ends_no_run(config, monkeypatch, capsys):
    service = Service(breaks=True)
    monkeypatch.setitem(sys.modules, "trackio", service)
    assert finetune(config).figures["steps"] == 2
    assert capsys.readouterr().err.count("the service is down") == 1
    assert service.finished == 1


def test_a_tracker_that_is_not_installed_is_named_before_long_work(config, tmp_path):
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'spt-jax\[wandb\]'"):
        finetune(replace(config, tracker="wandb"))
    assert not (tmp_path / "run").exists()
