"""What a person sees of predictions and evaluations."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from core.models.evaluation import evaluate
from tuner.predict import FilePrediction, ModelEvaluation
from tuner.views.predict_view import evaluation_view, prediction_table


def shown(renderable: Any) -> str:
    stream = io.StringIO()
    Console(file=stream, width=120).print(renderable)
    return stream.getvalue()


def evaluated(*, skilled: bool, split: str = "test", same_data: bool = True) -> ModelEvaluation:
    rng = np.random.default_rng(0)
    targets_NC = (rng.random((200, 6)) < 0.3).astype(np.uint8)
    noise_NC = rng.random((200, 6))
    scores_NC = np.clip(targets_NC * 0.5 + noise_NC * 0.4, 0, 1) if skilled else noise_NC
    return ModelEvaluation(
        model_uri="models:/posters/3",
        data="/data/posters",
        split=split,
        same_data=same_data,
        evaluation=evaluate(
            scores_NC,
            targets_NC,
            class_names=["Action", "[red]N/A", "Sci-Fi", "War", "Music", "News"],
            train_targets=targets_NC,
            num_resamples=200,
        ),
    )


def test_the_three_best_classes_of_each_picture() -> None:
    prediction = FilePrediction(
        path=Path("a[b].jpg"),
        probabilities={"Drama": 0.81, "War": 0.4, "Action": 0.304, "News": 0.01},
        predicted=("Drama",),
    )
    text = shown(prediction_table([prediction]))
    for part in ("a[b].jpg", "Drama 81%", "War 40%", "Action 30%"):
        assert part in text
    assert "News" not in text


def test_scores_stand_beside_the_prior_baseline_with_intervals() -> None:
    result = evaluated(skilled=True)
    text = shown(evaluation_view(result))
    scores = result.evaluation
    interval = scores.top3_accuracy
    assert f"{interval.value:.1%}  ({interval.low:.1%} to {interval.high:.1%})" in text
    assert f"prior baseline  {scores.prior_baseline:.1%}" in text
    assert "models:/posters/3 on the test split of /data/posters" in text
    assert "[red]N/A" in text
    assert "learnt nothing" not in text
    assert "flatter" not in text


def test_a_model_that_learnt_nothing_cannot_be_missed() -> None:
    assert "may have learnt nothing" in shown(evaluation_view(evaluated(skilled=False)))


def test_scores_on_training_pictures_are_called_flattering() -> None:
    assert "scores flatter" in shown(evaluation_view(evaluated(skilled=True, split="train")))


def test_foreign_data_is_called_so() -> None:
    text = shown(evaluation_view(evaluated(skilled=True, same_data=False)))
    assert "not the data that it was trained on" in text
