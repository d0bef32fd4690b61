"""Search spaces of two parts: what is shared, what each has, and mistakes in either of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from core.errors import InputError
from tuner.spaces.file import parse_space
from tuner.spaces.space import SearchSpace, load_space
from tuner.studies.parts import check_finetune_trials, make_plans

TWO_PARTS = """\
name: both
description: Two parts.
objective: mean_average_precision
probe:
  trials: 9
  cohort_size: 3
  sampler: {name: random}
  pruner: none
  parameters:
    backbone: [squeezenet1_1, ffn]
    epochs: 5
finetune:
  from_probes: 2
  trials: 4
  cohort_size: 1
  sampler: {name: tpe, startup_trials: 2}
  pruner: {name: successive_halving, min_epochs: 1}
  parameters:
    backbone: squeezenet1_1
    image_size: [64, 96]
    unfrozen_stages: [1, 2]
    epochs: 3
    head_start: [random, probe]
  points: [{unfrozen_stages: 2}]
"""


def load(folder: Path, text: str) -> SearchSpace:
    path = folder / "my.yaml"
    path.write_text(text)
    return load_space(path)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> SearchSpace:
    return load(tmp_path_factory.mktemp("space"), TWO_PARTS)


def test_what_the_parts_share_and_what_each_has(both: SearchSpace) -> None:
    probe, finetune = both.parts
    assert probe is both
    for part in both.parts:
        assert (part.name, part.description) == ("both", "Two parts.")
        assert part.objective == "mean_average_precision"
    assert (probe.mode, probe.trials, probe.cohort_size, probe.max_epochs) == ("probe", 9, 3, 5)
    assert (probe.sampler.name, probe.pruner.name) == ("random", "none")
    assert (finetune.mode, finetune.trials, finetune.cohort_size) == ("finetune", 4, 1)
    assert (finetune.sampler.name, finetune.pruner.name) == ("tpe", "successive_halving")
    assert (finetune.max_epochs, finetune.points) == (3, ({"unfrozen_stages": 2},))
    assert both.from_probes == 2 and both.finetunes
    assert finetune.parts == [finetune]


def test_defaults(tmp_path: Path) -> None:
    plain = load(
        tmp_path,
        "{probe: {parameters: {backbone: ffn}}, finetune: {parameters: {backbone: vgg16}}}",
    )
    assert (plain.name, plain.from_probes, plain.objective) == ("my", 4, "top3_accuracy")
    assert [part.mode for part in plain.parts] == ["probe", "finetune"]
    alone = load(tmp_path, "parameters: {backbone: ffn}")
    assert (alone.parts, alone.finetunes, alone.finetune) == ([alone], False, None)
    assert load(tmp_path, "{mode: finetune, parameters: {backbone: vgg16}}").finetunes


def test_written_out_and_read_back(both: SearchSpace) -> None:
    again = parse_space(both.to_dict())
    assert again == both
    assert again.fingerprint() == both.fingerprint()


def test_the_second_part_is_read_back_alone(both: SearchSpace) -> None:
    """As its own study keeps it; `head_start: probe` means something there alone."""
    _, finetune = both.parts
    assert parse_space(finetune.to_dict(), after_probes=True) == finetune
    with pytest.raises(InputError, match=r"both, parameters\.head_start: there are no probes"):
        parse_space(finetune.to_dict())


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("trials: 4", "trials: 40", True),
        ("from_probes: 2", "from_probes: 3", True),
        ("unfrozen_stages: [1, 2]", "unfrozen_stages: [1, 2, 3]", False),
        ("epochs: 5", "epochs: 6", False),
    ],
)
def test_fingerprint_is_of_both_parts(
    both: SearchSpace, tmp_path: Path, old: str, new: str, same: bool
) -> None:
    assert TWO_PARTS.count(old) == 1
    changed = load(tmp_path, TWO_PARTS.replace(old, new))
    assert (changed.fingerprint() == both.fingerprint()) == same


# (text in TWO_PARTS, what replaces it, message)
MISTAKES: list[tuple[str, str, str]] = [
    (
        "    epochs: 5",
        "    mixup_alpha: 0.2",
        "line 11, probe.parameters.mixup_alpha: mixup_alpha is not read by a probe, which trains "
        "the head alone\n  leave it out, or move it to the `finetune` part",
    ),
    (
        "    epochs: 5",
        "    unfrozen_stages: [1, 2]",
        "line 11, probe.parameters.unfrozen_stages: unfrozen_stages is not read by a probe",
    ),
    (
        "    epochs: 3",
        "    views: flip",
        "line 22, finetune.parameters.views: views is not read by fine-tuning\n"
        "  leave it out; horizontal_flip",
    ),
    ("  trials: 9", "  trials: 0", "line 5, probe.trials: input should be greater than or equal"),
    (
        "  trials: 9",
        "  mode: probe",
        "line 5, probe.mode: unknown key 'mode'\n  valid: cohort_size, ",
    ),
    ("  trials: 9", "  from_probes: 3", "line 5, probe.from_probes: unknown key 'from_probes'"),
    ("  from_probes: 2", "  from_probe: 2", "finetune.from_probe: unknown key 'from_probe'\n  did"),
    ("  from_probes: 2", "  from_probes: -1", "line 13, finetune.from_probes: input should be gr"),
    ("  from_probes: 2", "  from_probes: two", "finetune.from_probes: input should be a valid int"),
    (
        "name: both",
        "trials: 3",
        "line 1, trials: unknown key 'trials'\n  valid: constraints, description, ",
    ),
    ("name: both", "mode: finetune", "line 1, mode: unknown key 'mode'"),
    ("name: both", "parameters: {}", "line 1, parameters: unknown key 'parameters'"),
    ("  pruner: none", "  pruner: non", "line 8, probe.pruner: unknown pruner 'non'\n  did you me"),
    ("{name: tpe, startup", "{name: tpee, startup", "line 16, finetune.sampler: unknown sampler"),
    (
        "    epochs: 5",
        "    mode: probe",
        "probe.parameters.mode: mode is for all trials\n  the par",
    ),
    (
        "    backbone: squeezenet1_1\n",
        "    backbone: [squeezenet1_1, onnx/a.onnx]\n",
        "line 19, finetune.parameters.backbone: onnx/a.onnx can only be probed",
    ),
    (
        "points: [{unfrozen_stages: 2}]",
        "points: [{unfrozen_stages: 3}]",
        "line 24, finetune.points[0].unfrozen_stages: 3 is outside {'choice': [1, 2]}",
    ),
    (
        "    unfrozen_stages: [1, 2]",
        "    ema_decay: {low: 0.9, high: 1.0}",
        "line 21, finetune.parameters.ema_decay: 0 <= ema_decay < 1 must hold, but got ema_decay=1",
    ),
    (
        "    unfrozen_stages: [1, 2]",
        "    drop_path: [0.1, 1.0]",
        "line 21, finetune.parameters.drop_path: 0 <= drop_path < 1 must hold",
    ),
    (
        "    unfrozen_stages: [1, 2]",
        "    clip_norm: [null, 0.0]",
        "finetune.parameters.clip_norm: clip_norm > 0 must hold, but got clip_norm=0.0",
    ),
    (
        "    unfrozen_stages: [1, 2]",
        "    unfrozen_stages: 1\n    batch_norm: [frozen, thawed]",
        "unknown batch_norm 'thawed'\n  valid: frozen, train",
    ),
    (
        "    unfrozen_stages: [1, 2]",
        "    unfrozen_stages: {low: 0, high: 2}\n    layer_lr_decay: {low: 0.5, high: 1.0}",
        "line 22, finetune.parameters.layer_lr_decay: layer_lr_decay is searched where "
        "unfrozen_stages is 0, which does not read it\n  add `when: {unfrozen_stages: [1, 2]}`",
    ),
    (
        "    unfrozen_stages: [1, 2]",
        "    randaugment_ops: [1, 2]",
        "line 21, finetune.parameters.randaugment_ops: randaugment_ops is searched where "
        "randaugment_magnitude is 0, which does not read it\n"
        "  leave it out, or give randaugment_magnitude, too",
    ),
]


@pytest.mark.parametrize(("old", "new", "message"), MISTAKES, ids=[new for _, new, _ in MISTAKES])
def test_mistakes_are_refused_in_their_part(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert TWO_PARTS.count(old) == 1
    text = TWO_PARTS.replace(old, new)
    # Settings that the others would miss.
    text = (
        text.replace("points: [{unfrozen_stages: 2}]", "points: []")
        if "points" not in new
        else text
    )
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        load(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "my.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("probe: {parameters: {backbone: ffn}}", "my.yaml: finetune is missing"),
        ("finetune: {parameters: {backbone: vgg16}}", "my.yaml: probe is missing"),
        ("probe: 3\nfinetune: {}", "line 1, probe: input should be a valid mapping, but got 3"),
        (
            "probe: {parameters: {backbone: ffn}}\nfinetune: {trials: 3}",
            "line 2, finetune: parameters is missing",
        ),
        (
            "probe: {parameters: {backbone: ffn}}\nfinetune:\n  parameters: {epochs: 3}",
            "line 3, finetune.parameters: backbone is missing",
        ),
        (
            "mode: finetune\nparameters: {backbone: vgg16, head_start: [random, probe]}",
            "line 2, parameters.head_start: there are no probes that a head could start from\n"
            "  leave it out, or write a space with a `probe` and a `finetune` part",
        ),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        load(tmp_path, text)


def test_what_a_condition_makes_read_may_be_searched(tmp_path: Path) -> None:
    space = load(
        tmp_path,
        TWO_PARTS.replace(
            "    unfrozen_stages: [1, 2]",
            "    unfrozen_stages: {low: 0, high: 2}\n"
            "    layer_lr_decay: {when: {unfrozen_stages: [1, 2]}, low: 0.5, high: 1.0}\n"
            "    randaugment_magnitude: [0, 9]\n"
            "    randaugment_ops: {when: {randaugment_magnitude: 9}, choice: [1, 2]}",
        ),
    )
    _, finetune = space.parts
    assert {"layer_lr_decay", "randaugment_ops"} <= finetune.parameters.keys()


def test_plans_of_both_parts(both: SearchSpace) -> None:
    probe, finetune = make_plans(both)
    assert finetune is not None
    assert (probe.trials, finetune.trials) == (9, 4)
    assert (probe.deadline, finetune.deadline) == (None, None)
    assert {r.pooling for r in probe.requests} == {"avg"}
    assert {(r.pooling, r.image_size) for r in finetune.requests} == {
        ("pixels", 64),
        ("pixels", 96),
    }
    probe, finetune = make_plans(both, trials=7, finetune_trials=2, hours=2)
    assert finetune is not None and probe.deadline is not None and finetune.deadline is not None
    assert (probe.trials, finetune.trials) == (7, 2)
    assert finetune.deadline - probe.deadline == pytest.approx(3600, abs=60), "half is for probes"
    with pytest.raises(InputError, match="--hours: the time must be positive, but got -1"):
        make_plans(both, hours=-1)


def test_finetune_trials_are_for_two_parts(both: SearchSpace) -> None:
    check_finetune_trials(3, both)
    check_finetune_trials(None, both.parts[1])
    with pytest.raises(InputError, match=r"--finetune-trials: at least one trial is needed.* 0"):
        check_finetune_trials(0, both)
    with pytest.raises(InputError, match=r"--finetune-trials: the space both has no fine-tuning"):
        check_finetune_trials(3, both.parts[1])
