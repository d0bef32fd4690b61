"""What one trial is: a flat, frozen record of every setting that training reads.

Search spaces produce it, `core` components get plain arguments taken from it, and MLflow shows its
fields as parameters. Cross-field rules live here, so that a trial that passes is a trial that runs.
A parameter that does not apply to the choice made (momentum without SGD) keeps its default.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from .errors import InputError, unknown_name

MODES = ("probe", "finetune")
FEATURE_NORMS = ("standardize", "none")
CLASS_WEIGHTS = ("none", "sqrt_inverse", "inverse")
BATCH_NORMS = ("frozen", "train")
HEAD_STARTS = ("random", "probe")
MAX_BLOCKS = 4
MAX_MAGNITUDE = 30


@dataclass(frozen=True, kw_only=True)
class TrialConfig:
    """The settings of one trial. All ranges are inclusive unless said otherwise."""

    backbone: str
    """Name in the backbone registry: `ffn`, a torchvision model, `timm/NAME` or `onnx/FILE`."""
    mode: str = "probe"
    """`probe`: head on cached features of the frozen backbone; `finetune`: backbone layers too."""
    pooling: str = "avg"
    """How a spatial feature map becomes one vector: `avg`, `max`, or `avg_max` for both side by
    side. Not read by the csra head."""
    blocks: int = 1
    """From how many of the backbone's last stages pooled features are taken and laid side by side,
    1 to 4. Not read by the csra head; ffn and ONNX backbones have one."""
    views: str = "plain"
    """`probe`: the views of each picture that training draws from, one an epoch: `plain`, `flip`
    (the mirror image, too) or `flip_crop` (corner crops and their mirror images, too: 10 passes of
    the backbone). Validation and test see the plain picture."""
    feature_norm: str = "standardize"
    """`standardize`: features are shifted and scaled per dimension by training-split statistics."""
    head: str = "linear"
    """`linear`, `mlp` or `csra`."""
    hidden_sizes: tuple[int, ...] = ()
    """Widths of the hidden layers of an `mlp` head, first to last; at least one for `mlp`."""
    dropout: float = 0.0
    """Probability of zeroing an input of each layer of the head, 0 <= p < 1. Not for csra."""
    csra_lambda: float = 0.1
    """Weight of the residual attention term of a `csra` head, >= 0."""
    csra_temperature: float = 1.0
    """Sharpness of the attention of a `csra` head, > 0; above 98: the maximum, as published."""
    loss: str = "bce"
    """`bce`, `cross_entropy`, `focal` or `asymmetric`."""
    gamma: float = 2.0
    """Focusing exponent of `focal`, >= 0."""
    gamma_positive: float = 1.0
    """Focusing exponent of `asymmetric` on positive labels, >= 0."""
    gamma_negative: float = 4.0
    """Focusing exponent of `asymmetric` on negative labels, >= 0."""
    clip: float = 0.05
    """Probability margin of `asymmetric` below which negatives cost nothing, 0 <= m < 1."""
    label_smoothing: float = 0.0
    """Share of the target moved to the other outcome (bce family) or classes (ce), 0 <= s < 1."""
    class_weights: str = "none"
    """Weight of a class' positive labels by its training frequency: see `core.losses`."""
    optimizer: str = "adamw"
    """`sgd`, `adam`, `adamw` or `rmsprop`."""
    lr: float = 1e-3
    """Peak learning rate, > 0."""
    weight_decay: float = 0.0
    """Decay of the weights (never of biases), >= 0; decoupled for adamw, L2 for the others."""
    momentum: float = 0.0
    """Momentum of `sgd`, 0 <= m < 1."""
    nesterov: bool = False
    """Nesterov momentum for `sgd`; needs momentum > 0."""
    beta1: float = 0.9
    """First-moment decay of `adam` and `adamw`, 0 <= b < 1."""
    beta2: float = 0.999
    """Second-moment decay of `adam` and `adamw`, 0 <= b < 1."""
    alpha: float = 0.99
    """Squared-gradient smoothing of `rmsprop`, 0 <= a < 1."""
    schedule: str = "constant"
    """`constant`, `cosine` (with warm-up) or `one_cycle`."""
    warmup_fraction: float = 0.0
    """Share of all steps in which the rate rises: `cosine` 0 <= f < 1, `one_cycle` 0 < f < 1."""
    epochs: int = 30
    """Passes over the training split, >= 1."""
    batch_size: int = 256
    """Pictures of one forward and backward pass, over all workers of the trial together, >= 1.
    Trials of one cohort share it."""
    seed: int = 0
    """Seeds the head's initial weights, dropout and augmentation, 0 <= seed < 2**63. The order of
    batches is the study's."""
    image_size: int | None = None
    """Side of the square input in pixels, >= 16; None for the backbone's own."""

    # From here on: read by `finetune` alone.
    unfrozen_stages: int | None = 0
    """`finetune`: how many stages, counted from the output, are trained; 0 is the head alone, None
    or more than there are is the whole backbone."""
    unfreeze_epochs: int = 0
    """`finetune`: stages are unfrozen one by one, from the output, a further one after every so
    many epochs, >= 0; the first is trained from the start. 0: all `unfrozen_stages` at once."""
    layer_lr_decay: float = 1.0
    """`finetune`: a stage's learning rate over that of the stage after it, 0 < d <= 1."""
    head_lr_multiplier: float = 1.0
    """`finetune`: the head's learning rate over the last stage's, > 0."""
    head_start: str = "random"
    """`finetune`: first weights of the head: `random`, or those of the best `probe` of the same
    backbone, head, pooling and blocks (where there is none: random)."""
    accumulation_steps: int = 1
    """`finetune`: batches whose gradients make one step of the optimizer, >= 1."""
    clip_norm: float | None = None
    """`finetune`: longer gradients are scaled down to this norm, > 0; None: as they are."""
    ema_decay: float = 0.0
    """`finetune`: share of the old in the moving average of the weights at each step, 0 <= d < 1.
    Above 0, the averaged weights are validated and kept."""
    batch_norm: str = "frozen"
    """`finetune`: `frozen` keeps the pretrained statistics of batch norms, `train` normalises by
    the batch and moves them, in unfrozen stages."""
    drop_path: float = 0.0
    """`finetune`: probability of skipping the deepest residual block while training, falling
    linearly to 0 at the input (stochastic depth), 0 <= p < 1."""
    horizontal_flip: bool = False
    """`finetune`: mirror each training picture with probability one half."""
    min_crop_scale: float = 1.0
    """`finetune`: train on random crops, resized, of at least this share of the picture's area,
    0 < s <= 1; 1: whole pictures."""
    randaugment_magnitude: int = 0
    """`finetune`: strength of the random operations on each training picture, 0 (none) to 30."""
    randaugment_ops: int = 2
    """`finetune`: how many random operations a training picture gets, >= 1."""
    mixup_alpha: float = 0.0
    """`finetune`: pairs of pictures are blended by a share from Beta(alpha, alpha), >= 0; 0: no
    mixup. With `cutmix_alpha`, too, each batch takes one of the two by chance."""
    cutmix_alpha: float = 0.0
    """`finetune`: a rectangle of a picture is replaced by another picture's, its share of the area
    from Beta(alpha, alpha), >= 0; 0: no cutmix."""

    def __post_init__(self) -> None:
        """Raises InputError that names the parameter, its value and the rule."""
        _check_names(self)
        _check_ranges(self)
        _check_combinations(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrialConfig:
        """Build from a flat mapping (JSON or a sampled space): lists become tuples, whole floats
        become ints where an int is meant. Unknown keys raise InputError with the valid ones."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for key in values:
            if key not in fields:
                raise unknown_name("parameter", key, fields, where=key)
        if "backbone" not in values:
            raise InputError("no backbone is given", where="backbone")
        return cls(**{key: coerce(key, fields[key].type, value) for key, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """The flat mapping that `from_dict` reads; tuples become lists, so that it is JSON."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _check_names(config: TrialConfig) -> None:
    """Every name is in its registry."""
    from .encoding.pooling import POOLINGS
    from .heads import HEADS
    from .images.views import VIEWS
    from .losses import LOSSES
    from .optimizers import OPTIMIZERS
    from .schedules import SCHEDULES

    for key, valid in (
        ("mode", MODES),
        ("pooling", POOLINGS),
        ("views", VIEWS),
        ("feature_norm", FEATURE_NORMS),
        ("head", HEADS),
        ("loss", LOSSES),
        ("class_weights", CLASS_WEIGHTS),
        ("optimizer", OPTIMIZERS),
        ("schedule", SCHEDULES),
        ("batch_norm", BATCH_NORMS),
        ("head_start", HEAD_STARTS),
    ):
        if getattr(config, key) not in valid:
            raise unknown_name(key, getattr(config, key), valid, where=key)


def _check_ranges(config: TrialConfig) -> None:
    """Every number is in its range."""
    for key in ("lr", "csra_temperature", "head_lr_multiplier"):
        _check(config, f"{key} > 0", key, getattr(config, key) > 0)
    for key in (
        "csra_lambda",
        "gamma",
        "gamma_positive",
        "gamma_negative",
        "weight_decay",
        "unfreeze_epochs",
        "mixup_alpha",
        "cutmix_alpha",
    ):
        _check(config, f"{key} >= 0", key, getattr(config, key) >= 0)
    for key in (
        "dropout",
        "clip",
        "label_smoothing",
        "momentum",
        "beta1",
        "beta2",
        "alpha",
        "warmup_fraction",
        "ema_decay",
        "drop_path",
    ):
        _check(config, f"0 <= {key} < 1", key, 0 <= getattr(config, key) < 1)
    for key in ("layer_lr_decay", "min_crop_scale"):
        _check(config, f"0 < {key} <= 1", key, 0 < getattr(config, key) <= 1)
    for key in ("epochs", "batch_size", "accumulation_steps", "randaugment_ops"):
        _check(config, f"{key} >= 1", key, getattr(config, key) >= 1)
    _check(config, f"1 <= blocks <= {MAX_BLOCKS}", "blocks", 1 <= config.blocks <= MAX_BLOCKS)
    _check(config, "0 <= seed < 2**63", "seed", 0 <= config.seed < 2**63)
    _check(config, "every width >= 1", "hidden_sizes", all(w >= 1 for w in config.hidden_sizes))
    size, stages, norm = config.image_size, config.unfrozen_stages, config.clip_norm
    _check(config, "image_size >= 16", "image_size", size is None or size >= 16)
    _check(config, "unfrozen_stages >= 0", "unfrozen_stages", stages is None or stages >= 0)
    _check(config, "clip_norm > 0", "clip_norm", norm is None or norm > 0)
    _check(
        config,
        f"0 <= randaugment_magnitude <= {MAX_MAGNITUDE}",
        "randaugment_magnitude",
        0 <= config.randaugment_magnitude <= MAX_MAGNITUDE,
    )


def _check_combinations(config: TrialConfig) -> None:
    """What one setting demands of another."""
    from .encoding.backbones import has_stages

    _check(
        config,
        "an mlp head has at least one hidden layer, other heads have none",
        "hidden_sizes",
        (config.head == "mlp") == bool(config.hidden_sizes),
    )
    _check(
        config,
        "(not nesterov) or momentum > 0",
        "nesterov",
        not config.nesterov or config.momentum > 0,
    )
    _check(
        config,
        "one_cycle needs warmup_fraction > 0",
        "warmup_fraction",
        config.schedule != "one_cycle" or config.warmup_fraction > 0,
    )
    _check(
        config,
        f"{config.backbone} has no stages that can be read, so blocks = 1",
        "blocks",
        config.blocks == 1 or has_stages(config.backbone),
    )


def _check(config: TrialConfig, rule: str, key: str, holds: bool) -> None:
    if not holds:
        raise InputError(f"{rule} must hold, but got {key}={getattr(config, key)!r}", where=key)


def coerce(key: str, kind: object, value: Any) -> Any:
    """A value as a field of the annotated type (a string, in this module), or InputError that
    names the parameter."""
    if kind == "tuple[int, ...]":
        items = value if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in items):
            raise InputError(f"expected a list of whole numbers, but got {value!r}", where=key)
        return tuple(items)
    if kind in ("int | None", "float | None") and value is None:
        return None
    if kind == "bool":
        if isinstance(value, bool):
            return value
        raise InputError(f"expected true or false, but got {value!r}", where=key)
    if kind == "str":
        if isinstance(value, str):
            return value
        raise InputError(f"expected a name, but got {value!r}", where=key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"expected a finite number, but got {value!r}", where=key)
    if kind in ("int", "int | None"):
        if value != int(value):
            raise InputError(f"expected a whole number, but got {value!r}", where=key)
        return int(value)
    return float(value)
