"""Predictions and evaluations as a person reads them in a terminal (rich)."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from core.models.evaluation import learnt_nothing

from ..predict import FilePrediction, ModelEvaluation

NUM_SHOWN = 3
"""Classes shown a picture."""


def prediction_table(predictions: Sequence[FilePrediction]) -> Table:
    """One row a picture: the most probable classes; bold where the class reaches its threshold."""
    table = Table()
    table.add_column("picture", overflow="fold")
    for place in range(1, NUM_SHOWN + 1):
        table.add_column(f"{place}.", no_wrap=True)
    for prediction in predictions:
        cells = [
            Text(
                f"{name} {probability:.0%}",
                style="bold" if name in (prediction.predicted or ()) else "",
            )
            for name, probability in list(prediction.probabilities.items())[:NUM_SHOWN]
        ]
        table.add_row(Text(str(prediction.path)), *cells)
    return table


def evaluation_view(result: ModelEvaluation) -> RenderableType:
    """The scores, a warning if the model may have learnt nothing, and a table of the classes."""
    scores = result.evaluation
    top3, gain = scores.top3_accuracy, scores.gain
    lines = [
        Text(f"{result.model_uri} on the {result.split} split of {result.data}", style="bold"),
        Text(
            "the data that it was trained on"
            if result.same_data
            else "not the data that it was trained on"
        ),
        Text(f"{scores.num_images} pictures, {scores.num_labels} labels"),
        Text(f"top3_accuracy   {top3.value:.1%}  ({top3.low:.1%} to {top3.high:.1%})"),
        Text(f"prior baseline  {scores.prior_baseline:.1%}"),
        Text(f"gain            {gain.value:+.1%}  ({gain.low:+.1%} to {gain.high:+.1%})"),
        Text(f"mAP             {scores.mean_average_precision:.1%}"),
        Text(f"F1 micro/macro  {scores.micro_f1:.1%} / {scores.macro_f1:.1%}"),
        Text(f"calibration err {scores.calibration_error:.1%}"),
    ]
    if result.split == "train":
        lines.append(Text("These pictures were trained on: the scores flatter.", style="bold red"))
    if learnt_nothing(scores):
        lines.append(
            Text(
                "This model may have learnt nothing: always predicting the commonest classes "
                "is about as good.",
                style="bold red",
            )
        )
    return Group(*lines, _class_table(result))


def _class_table(result: ModelEvaluation) -> Table:
    table = Table("class", "positives", "recall@3", "average precision", "F1", "threshold")
    for row in sorted(result.evaluation.per_class, key=lambda row: -row.num_positives):
        shares = (row.recall_at_3, row.average_precision, row.f1)
        cells = ["-" if share != share else f"{share:.1%}" for share in shares]
        table.add_row(Text(row.name), str(row.num_positives), *cells, f"{row.threshold:.2f}")
    return table
