"""Learning rate, gate temperature and the settings: the published protocol, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lcf_fast.errors import DTypeError, GeometryError
from lcf_fast.training.schedule import gate_temperature, learning_rate_factor
from lcf_fast.training.settings import TrainingSettings


def test_the_rate_rises_over_a_tenth_of_the_steps_and_falls_to_the_end() -> None:
    factors = [learning_rate_factor(step, 300, 0.1) for step in range(300)]
    assert factors[29] == 1.0
    assert factors[:30] == pytest.approx([(i + 1) / 30 for i in range(30)])
    assert factors[30:] == pytest.approx([(270 - i) / 270 for i in range(270)])
    assert min(factors) > 0


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.0), (1, 1.0), (2, 0.1), (7, 0.0), (7, 1.0), (10, 0.05)])
def test_every_step_has_a_rate_whatever_the_warm_up(steps: int, warmup: float) -> None:
    factors = [learning_rate_factor(step, steps, warmup) for step in range(steps)]
    assert max(factors) == 1.0
    assert min(factors) > 0
    peak = factors.index(1.0)
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


@pytest.mark.parametrize("steps", [50, 100, 276, 300])
def test_a_decimal_fraction_of_the_steps_is_taken_exactly(steps: int) -> None:
    for percent in range(1, 101):
        factors = [learning_rate_factor(step, steps, percent / 100) for step in range(steps)]
        assert factors.index(1.0) + 1 == -(-percent * steps // 100), percent


def test_the_temperature_falls_by_one_ratio_a_step() -> None:
    values = [gate_temperature(step, 300, 1.0, 0.001) for step in range(300)]
    assert values[0] == 1.0
    assert values[-1] == pytest.approx(0.001)
    ratios = [after / before for before, after in zip(values, values[1:])]
    assert ratios == pytest.approx([0.001 ** (1 / 299)] * 299)
    assert gate_temperature(0, 1, 1.0, 0.001) == 1.0


def test_the_defaults_are_the_published_protocol() -> None:
    shared, cross = TrainingSettings(), TrainingSettings.cross_context()
    assert (shared.steps, shared.batch_size, cross.steps, cross.batch_size) == (300, 260, 276, 256)
    for settings in (shared, cross):
        assert settings.learning_rate == 1e-4
        assert settings.weight_decay == 0.01
        assert settings.warmup == 0.1
        assert settings.clip_norm == 1.0
        assert settings.seed == 42
        assert settings.max_tokens == 2048
        assert (settings.gate_temperature_start, settings.gate_temperature_end) == (1.0, 0.001)


def test_settings_through_json_and_back() -> None:
    settings = TrainingSettings.cross_context(learning_rate=3e-4, device="cpu", micro_batch_size=3)
    assert TrainingSettings.from_dict(settings.to_dict()) == settings
    assert settings.micro_batches == 86  # 85 of three and one of one
    with pytest.raises(GeometryError, match="momentum"):
        TrainingSettings.from_dict({"momentum": 0.9})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch_size", -1),
        ("micro_batch_size", 300),
        ("learning_rate", math.nan),
        ("learning_rate", -1e-4),
        ("warmup", 1.5),
        ("clip_norm", 0.0),
        ("gate_temperature_end", 0.0),
        ("gate_temperature_start", math.inf),
        ("precision", "fp16"),
        ("seed", -1),
    ],
)
def test_a_value_out_of_range_is_named(field: str, value: Any) -> None:
    with pytest.raises(GeometryError, match=field):
        TrainingSettings(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"), [("steps", 1.5), ("seed", "42"), ("learning_rate", "1e-4"), ("steps", True)]
)
def test_a_value_of_another_type_is_named(field: str, value: Any) -> None:
    with pytest.raises(DTypeError, match=field):
        TrainingSettings(**{field: value})
