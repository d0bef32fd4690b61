"""Each mistake in a search space is refused at its file, line and key, with what would be right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from core.errors import InputError
from tuner.spaces.space import load_space

# Below `parameters: {backbone: ffn}`, which is lines 1 and 2: (YAML from line 3 on, message).
PARAMETERS: list[tuple[str, str]] = [
    ("lr: 0", "line 3, parameters.lr: lr > 0 must hold, but got lr=0.0"),
    ("head: []", "line 3, parameters.head: there is nothing to choose from"),
    ("head: {choice: []}", "line 3, parameters.head.choice: there is nothing to choose from"),
    (
        "lr: {low: 1, high: 0.1}",
        "line 3, parameters.lr.low: low <= high must hold, but got low=1.0",
    ),
    ("lr: {low: 0, high: 1, log: true}", "parameters.lr.low: a log range starts above 0"),
    ("lr: {low: 0, high: 1}", "parameters.lr: lr > 0 must hold, but got lr=0.0"),
    ("lr: {low: .nan, high: 1}", "parameters.lr.low: input should be a finite number, but got nan"),
    ("lr: .inf", "parameters.lr: expected a finite number, but got inf"),
    ("lr: {low: 0.1}", "parameters.lr: high is missing"),
    ("lr: fast", "parameters.lr: expected a finite number, but got 'fast'"),
    ("lr: [0.1, 0.10]", "parameters.lr[1]: 0.1 is there twice"),
    ("lr: [{low: 0.1, high: 1}, 3]", "parameters.lr[0]: expected a finite number, but got {'low"),
    ("lr: {low: 0.1, high: 1, log: true, step: 0.1}", "lr.step: a log range has no step"),
    ("lr: {low: 0.1, high: 1, step: 1e-9}", "lr.step: that is more than 1,000,000 steps"),
    ("lr: {choice: [1], low: 1}", "lr.low: unknown key 'low'\n  valid: choice, when"),
    ("lr: {when: {backbone: ffn}}", "expected a choice, a range or a constant, but got {'when'"),
    ("momentum: 1", "parameters.momentum: 0 <= momentum < 1 must hold, but got momentum=1.0"),
    ("batch_size: {low: 1, high: 2, step: 0}", "step: input should be greater than 0, but got 0"),
    ("batch_size: {low: 32, high: 96, stepp: 1}", "unknown key 'stepp'\n  did you mean step?"),
    ("batch_size: {low: 1.5, high: 3}", "low: expected a whole number, but got 1.5"),
    (
        "batch_size: {low: 32, high: 100, step: 64}",
        "batch_size.high: steps of 64 from 32 do not end at 100\n  write high: 96",
    ),
    ("loss: {low: 1, high: 2}", "parameters.loss: loss is not a number\n  write {choice:"),
    ("loss: bcee", "parameters.loss: unknown loss 'bcee'\n  valid: asymmetric, bce, cross_entropy"),
    ("head: lstm", "parameters.head: unknown head 'lstm'\n  valid: csra, linear, mlp"),
    ("optimizer: [adam, adamm]", "unknown optimizer 'adamm'\n  valid: adam, adamw, rmsprop, sgd"),
    ("schedule: step", "unknown schedule 'step'\n  valid: constant, cosine, one_cycle"),
    ("optimiser: adam", "unknown parameter 'optimiser'\n  did you mean optimizer? valid: accum"),
    ("mode: probe", "line 3, parameters.mode: mode is for all trials\n  write `mode:` at the top"),
    ("seed: [1, 2]", "parameters.seed: seed must not be searched"),
    ("unfrozen_stages: 2", "unfrozen_stages is not read by a probe"),
    ("backbone: vgg16", "line 3: parameters.backbone is given twice, first in line 2"),
    ("lr: {low: 1, high: 2, when: 3}", "parameters.lr.when: input should be a valid mapping"),
    ("lr: {low: 1, high: 2, when: {x: 3}}", "parameters.lr.when.x: unknown parameter 'x'"),
    ("lr: {low: 1, high: 2, when: {head: []}}", "when.head: no value meets an empty list"),
    (
        "momentum: {low: 0.1, high: 0.9, when: {optimizer: sgd}}",
        "momentum.when.optimizer: a condition on optimizer, which the space does not have",
    ),
    (
        "optimizer: [adam, adamw]\n  momentum: {low: 0, high: 0.9, when: {optimizer: sgd}}",
        "line 4, parameters.momentum.when.optimizer: optimizer never takes the value 'sgd'\n"
        "  it takes: adam, adamw",
    ),
    (
        "dropout: {low: 0, high: 0.9}\n  lr: {low: 1, high: 2, when: {dropout: 0.3}}",
        "line 4, parameters.lr.when.dropout: dropout is a real range",
    ),
    (
        "optimizer: [adam, sgd]\n  momentum: {low: 0.1, high: 0.9}",
        "line 4, parameters.momentum: momentum is searched where optimizer is adam, which does not "
        "read it\n  add `when: {optimizer: [sgd]}`",
    ),
    (
        "head: [linear, csra]\n  pooling: [avg, max]",
        "pooling is searched where head is csra, which does not read it",
    ),
    ("blocks: 5", "line 3, parameters.blocks: 1 <= blocks <= 4 must hold, but got blocks=5"),
    (
        "blocks: [1, 2]",
        "line 3, parameters.blocks: ffn has no stages that can be read, so blocks = 1 must hold",
    ),
    ("views: [plain, turned]", "unknown views 'turned'\n  valid: flip, flip_crop, plain"),
    (
        "head: {choice: [linear, mlp], when: {loss: bce}}\n"
        "  loss: {choice: [bce, focal], when: {head: linear}}",
        "line 3, parameters.head: conditions go in a circle: head -> loss -> head",
    ),
    (
        "head: [linear, mlp]",
        "line 3, parameters.head: an mlp head has at least one hidden layer, other heads have none "
        "must hold, but got hidden_sizes=()\n  a trial could have head: mlp and no hidden_sizes",
    ),
    (
        "head: mlp\n  hidden_sizes: [256, 128]",
        "line 4, parameters.hidden_sizes: [256, 128] may mean one value or several\n"
        "  write {constant: [256, 128]} or {choice: [[256, 128]]}",
    ),
    (
        "optimizer: sgd\n  momentum: [0.9, 0]\n  nesterov: [false, true]",
        "parameters.nesterov: (not nesterov) or momentum > 0 must hold, but got nesterov=True",
    ),
    (
        "optimizer: [sgd, adam]\n  lr:\n    - {low: 1, high: 2}\n"
        "    - {low: 2, high: 3, when: {optimizer: sgd}}",
        "line 6, parameters.lr[1]: an earlier branch holds wherever this one does",
    ),
    (
        "optimizer: [sgd, adam]\n  loss: {when: {optimizer: sgd}, choice: [bce, focal]}\n"
        "  lr: {when: {loss: focal, optimizer: adam}, choice: [0.1, 0.2]}",
        "line 5, parameters.lr: no trial ever meets its condition",
    ),
]

# Whole files: (YAML, message).
FILES: list[tuple[str, str]] = [
    (
        "parameter: {backbone: ffn}",
        "line 1, parameter: unknown key 'parameter'\n  did you mean par",
    ),
    ("mode: probe", "my.yaml: parameters is missing"),
    ("parameters:", "parameters: input should be a valid mapping, but got None"),
    ("parameters: {}", "parameters: backbone is missing\n  for example `backbone: ffn`"),
    ("parameters: {lr: 1}", "parameters: backbone is missing"),
    ("parameters: {1: 2}", "line 1: a key must be a name, but this one is 1"),
    ("parameters: {true: 2}", "line 1: a key must be a name, but this one is true"),
    ("? [a]\n: 1", "line 1: a key must be a name, but this one is a sequence"),
    ("[1, 2]", "a search space is a mapping, but this file holds a list"),
    ("# nothing", "a search space is a mapping, but this file holds nothing"),
    ("parameters: [", "line 1: it is not valid YAML: "),
    ("a: &a [*a]", "an anchor refers to itself"),
    ("a: !!python/name:os.system x", "it is not valid YAML: could not determine a constructor"),
    ("parameters: {backbone: resnet5}", "unknown backbone 'resnet5'\n  did you mean resnet50"),
    ("parameters: {backbone: [ffn, timm/resnet1]}", "unknown backbone 'timm/resnet1'"),
    ("parameters: {backbone: 3}", "parameters.backbone: expected a name, but got 3"),
    (
        "mode: finetune\nparameters:\n  backbone: [resnet18, onnx/a.onnx]",
        "line 3, parameters.backbone: onnx/a.onnx can only be probed",
    ),
    (
        "parameters:\n  backbone: resnet18\n  head: [linear, csra]\n  blocks: {low: 1, high: 3}",
        "line 4, parameters.blocks: blocks is searched where head is csra, which does not read it",
    ),
    (
        "mode: finetune\nparameters:\n  backbone: resnet18\n  views: [plain, flip]",
        "line 4, parameters.views: views is not read by fine-tuning\n"
        "  leave it out; horizontal_flip",
    ),
]

# Beside `parameters: {backbone: ffn, lr: {low: 0.1, high: 1}}`: (YAML, message).
TOP: list[tuple[str, str]] = [
    ("mode: prob", "line 2, mode: input should be 'probe' or 'finetune', but got 'prob'"),
    (
        "objective: accuracy",
        "objective: input should be 'top3_accuracy' or 'mean_average_precision'",
    ),
    ("trials: ten", "trials: input should be a valid integer, but got 'ten'"),
    ("trials: 0", "trials: input should be greater than or equal to 1, but got 0"),
    ("cohort_size: true", "cohort_size: input should be a valid integer, but got True"),
    ("sampler: tpee", "line 2, sampler: unknown sampler 'tpee'\n  did you mean tpe? valid: brute_"),
    ("sampler: {name: tpe, startup: 3}", "sampler.startup: unknown key 'startup'\n  did you mean"),
    ("sampler: {name: 3}", "sampler: expected a name, but got 3"),
    ("sampler: {startup_trials: 3}", "sampler: its name is missing"),
    ("sampler:\n", "sampler: expected a name, but got None"),
    ("sampler: grid", "line 2, sampler: lr can take endlessly many values"),
    (
        "pruner: asha",
        "pruner: unknown pruner 'asha'\n  valid: hyperband, median, none, successive_",
    ),
    ("pruner: {name: median, min_epochs: 0}", "pruner.min_epochs: input should be greater than or"),
    ("points: [{lr: 0.5}, {lr: 2}]", "line 2, points[1].lr: 2.0 is outside {'low': 0.1, 'high'"),
    ("points: [{rl: 1}]", "points[0].rl: unknown parameter 'rl'"),
    ("points: {lr: 1}", "points: input should be a valid list, but got {'lr': 1}"),
]


def assert_refused(folder: Path, text: str, message: str) -> None:
    path = folder / "my.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        load_space(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(("text", "message"), PARAMETERS, ids=[text for text, _ in PARAMETERS])
def test_wrong_parameter(tmp_path: Path, text: str, message: str) -> None:
    assert_refused(tmp_path, f"parameters:\n  backbone: ffn\n  {text}\n", message)


@pytest.mark.parametrize(("text", "message"), FILES, ids=[text for text, _ in FILES])
def test_wrong_file(tmp_path: Path, text: str, message: str) -> None:
    assert_refused(tmp_path, text, message)


@pytest.mark.parametrize(("text", "message"), TOP, ids=[text for text, _ in TOP])
def test_wrong_top_level(tmp_path: Path, text: str, message: str) -> None:
    parameters = "parameters: {backbone: ffn, lr: {low: 0.1, high: 1}}"
    assert_refused(tmp_path, f"{parameters}\n{text}", message)


def test_missing_file_names_the_shipped_spaces(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no search space 'prob'\n  did you mean probe\? .*seed"):
        load_space("prob")
    with pytest.raises(InputError, match=r"one of: demo, finetune, probe, seed"):
        load_space(tmp_path / "not_there.yaml")


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read it: Is a directory"):
        load_space(tmp_path)
    path = tmp_path / "latin.yaml"
    path.write_bytes("description: é".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin.yaml: it is not UTF-8 text"):
        load_space(path)


def test_constants_may_stand_where_they_are_not_read(tmp_path: Path) -> None:
    """Only searching what is not read misleads; a constant is harmless."""
    path = tmp_path / "my.yaml"
    path.write_text("parameters: {backbone: ffn, optimizer: [adam, sgd], momentum: 0.9}")
    assert load_space(path).size() == 2
