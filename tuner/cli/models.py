"""`tuner predict` and `tuner evaluate`: using a model that a study registered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .options import data_options, home_of, table_arguments


@click.command()
@click.argument("model_uri")
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="A JSON list, one object a picture.")
@click.option("--tracking-uri", help="MLflow's address. Default: the store in the home folder.")
def predict(
    model_uri: str, images: tuple[Path, ...], as_json: bool, tracking_uri: str | None
) -> None:
    """Predict the classes of IMAGES with a model: models:/NAME@challenger, or a model's folder."""
    from rich.console import Console

    from ..predict import load_predictor, predict_files
    from ..views.predict_view import prediction_table

    address = tracking_uri or home_of().tracking_uri
    predictions = predict_files(load_predictor(model_uri, address), images)
    if as_json:
        click.echo(json.dumps([p.to_dict() for p in predictions], indent=2))
    else:
        Console().print(prediction_table(predictions))


@click.command()
@click.argument("model_uri")
@data_options
@click.option("--split", help="test, validation, train or all. Default: test where there is one.")
@click.option("--json", "as_json", is_flag=True, help="All metrics as JSON.")
@click.option("--tracking-uri", help="MLflow's address. Default: the store in the home folder.")
def evaluate(
    model_uri: str, split: str | None, as_json: bool, tracking_uri: str | None, **options: Any
) -> None:
    """Score a model on a labelled table, beside the prior baseline."""
    from rich.console import Console

    from core.data.table import read_table

    from ..predict import evaluate_model, load_predictor
    from ..views.predict_view import evaluation_view
    from ..views.steps import showing_steps

    address = tracking_uri or home_of().tracking_uri
    table = read_table(**table_arguments(options))
    predictor = load_predictor(model_uri, address)
    with showing_steps(Console(stderr=True)) as steps:
        result = evaluate_model(
            predictor,
            table,
            split=split,
            progress=lambda done, total: steps("predicting", done, total),
        )
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=2))
    else:
        Console().print(evaluation_view(result))
