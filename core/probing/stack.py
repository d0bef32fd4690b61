"""Many heads trained as one: stacked tensors, a few big matrix products instead of many small.

All heads of a stack see the same batches and have the same shape; everything else (loss, rates,
optimizer, dropout, seed, length) is each head's own. A head in a stack equals the same head
trained alone with `torch.optim` (tests/contracts/test_stack.py). Heads leave without touching
the others. Letters: H heads, B batch, D features, P places of a map, K outputs of a layer,
C classes, T steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import TrialConfig
from ..heads import HEADS, build_head
from ..loss_gradients import LOSSES_WITH_GRADIENTS
from ..losses import LOSSES, class_weights
from ..optimizers import OPTIMIZERS, Settings
from ..precision import FLOAT32, autocast, product_type
from ..schedules import rate_factors
from .stack_layers import Masks, csra_logits, layered_logits, linear_gradients, linear_logits
from .stack_updates import StackUpdates

EVALUATION_VALUES = 1 << 24
"""Outputs of a layer held at once while evaluating: bounds memory, not results."""


def structure(config: TrialConfig) -> tuple[object, ...]:
    """What heads must share to be stacked."""
    return (config.head, config.hidden_sizes, config.dropout > 0 and config.head != "csra")


def bytes_of_head(
    config: TrialConfig,
    *,
    num_features: int,
    num_places: int,
    num_classes: int,
    num_evaluated: int,
) -> int:
    """Memory of one stacked head: weights, gradient, two slots, best weights; what a step holds of
    its batch (estimated: some six times each layer's outputs, and 20 values a logit in the
    costliest loss); the logits of the pictures it is evaluated on with two temporaries."""
    widths = [num_features, *config.hidden_sizes, num_classes]
    weights = sum((inputs + 1) * outputs for inputs, outputs in itertools.pairwise(widths))
    step = config.batch_size * (6 * num_places * sum(widths[1:]) + 20 * num_classes)
    return 4 * (5 * weights + step + 3 * num_evaluated * num_classes)


class HeadStack:
    """The heads of `configs`, which share `structure`, as stacked parameters.

    `members` are the places in `configs` of the heads still in the stack, in stack order.

    Args:
        configs: one a head.
        num_features: D.
        train_targets_NC: 0/1 targets of the training split, for class weights.
        steps_per_epoch: batches in one pass, for schedules.
        device: where the stack lives.
        precision: of the products of a step, forward and backward (`core.precision`). Weights,
            losses, updates and everything that is evaluated are float32.
    """

    def __init__(
        self,
        configs: Sequence[TrialConfig],
        *,
        num_features: int,
        train_targets_NC: Tensor,
        steps_per_epoch: int,
        device: torch.device | str = "cpu",
        precision: str = FLOAT32,
    ) -> None:
        if len({structure(c) for c in configs}) != 1:
            raise ValueError("heads of one stack must have one structure")
        self.configs = list(configs)
        self.device = torch.device(device)
        self.precision = precision
        num_classes = train_targets_NC.shape[1]
        # Runs of equal loss, then equal optimizer, let each be computed on one slice.
        self.members = in_runs(configs)
        members = [configs[i] for i in self.members]
        heads = [
            build_head(num_features=num_features, num_classes=num_classes, **head_settings(c))
            for c in members
        ]
        self.params: list[Tensor] = [
            torch.stack([p.detach() for p in params]).to(self.device).requires_grad_()
            for params in zip(*(h.parameters() for h in heads), strict=True)
        ]
        num_slots = max(OPTIMIZERS[c.optimizer].num_slots for c in members)
        self.slots = [[torch.zeros_like(p) for p in self.params] for _ in range(num_slots)]
        self.best = [p.detach().clone() for p in self.params]
        self._gradient = torch.empty_like(self.params[0], requires_grad=False)
        self.step_number = 0
        self._rates_HT = self._schedule(members, steps_per_epoch)
        self._settings = self._setting_tensors(members)
        self._numbers = [_optimizer_numbers(c) for c in members]
        self._class_weights_HC = self._class_weight_tensor(members, train_targets_NC)
        self._find_runs()
        first = members[0]
        self._one_layer = first.head == "linear" and first.dropout == 0
        self._chances = [Masks(c.seed, self.device) if c.dropout > 0 else None for c in members]

    def __len__(self) -> int:
        return len(self.members)

    def __getstate__(self) -> dict[str, Any]:
        """Without what only points into the rest, or is written before it is read."""
        made = ("_updates", "_loss_runs", "_gradient")
        return {key: value for key, value in self.__dict__.items() if key not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._gradient = torch.empty_like(self.params[0], requires_grad=False)
        self._find_runs()

    @property
    def member_configs(self) -> list[TrialConfig]:
        """The settings of the heads still in the stack, in stack order."""
        return [self.configs[i] for i in self.members]

    # ---- training -------------------------------------------------------------------------

    def step(self, features: Tensor, targets_BC: Tensor) -> Tensor:
        """One update of every head on one batch.

        Features are [B, D], or [B, P, D] for csra. Returns the losses before the update [H],
        detached, on the device.
        """
        if self._one_layer:
            losses_BH, gradients = self._by_hand(features, targets_BC)
        else:
            losses_BH, gradients = self._by_autograd(features, targets_BC)
        self.step_number += 1
        self._updates(gradients, self.step_number)
        return losses_BH.mean(0)

    @torch.no_grad()
    def _by_hand(self, features_BD: Tensor, targets_BC: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Losses [B, H] and the gradients of one layer: of few heads, autograd would take most of
        the time."""
        weight_HCD, bias_HC = self.params
        features_BD = features_BD.to(product_type(self.precision))
        logits_BHC = linear_logits(weight_HCD, bias_HC, features_BD)
        losses_BH, slopes_BHC = self._slopes(logits_BHC, targets_BC)
        return losses_BH, linear_gradients(slopes_BHC, features_BD, self._gradient)

    def _by_autograd(self, features: Tensor, targets_BC: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Losses [B, H] and the gradients of any head."""
        with autocast(self.device, self.precision):
            logits_BHC = self._forward(
                self.params, self._settings, features, training=True, gradient=self._gradient
            )
        losses_BH, slopes_BHC = self._slopes(logits_BHC.detach().float(), targets_BC)
        slopes_BHC = slopes_BHC.to(logits_BHC.dtype)
        return losses_BH, torch.autograd.grad(logits_BHC, self.params, slopes_BHC)

    @torch.no_grad()
    def _slopes(self, logits_BHC: Tensor, targets_BC: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [B, H], and the gradients of their means over the batch by the logits."""
        targets_B1C = targets_BC.unsqueeze(1)
        losses, slopes = [], []
        for name, run, settings in self._loss_runs:
            loss_Bh, slope_BhC = LOSSES_WITH_GRADIENTS[name](
                logits_BHC[:, run], targets_B1C, **settings
            )
            losses.append(loss_Bh)
            slopes.append(slope_BhC)
        if len(losses) == 1:
            return loss_Bh, slope_BhC.div_(len(targets_BC))
        return torch.cat(losses, 1), torch.cat(slopes, 1).div_(len(targets_BC))

    def logits(self, features: Tensor, *, training: bool = False) -> Tensor:
        """Logits [B, H, C] of every head with its present weights; features as for `step`."""
        return self._forward(self.params, self._settings, features, training=training)

    @torch.no_grad()
    def best_logits(self, features: Tensor, places: Sequence[int]) -> Tensor:
        """Logits [B, h, C] of the heads at these stack places with their remembered weights."""
        index = torch.tensor(list(places), device=self.device)
        settings = {key: value[index] for key, value in self._settings.items()}
        return self._forward([b[index] for b in self.best], settings, features)

    def _forward(
        self,
        params: Sequence[Tensor],
        settings: Settings,
        features: Tensor,
        *,
        training: bool = False,
        gradient: Tensor | None = None,
    ) -> Tensor:
        layers = list(zip(params[::2], params[1::2], strict=True))
        if HEADS[self.configs[0].head].spatial:
            return csra_logits(layers[0], settings, features, gradient)
        dropping = training and self.configs[0].dropout > 0
        return layered_logits(layers, features, self._drop if dropping else None, gradient)

    def _drop(self, x: Tensor) -> Tensor:
        """Inverted dropout with each head's own generator: [B, K] shared or [H, B, K] to the
        latter."""
        masks_HBK = torch.empty(len(self), *x.shape[-2:], device=self.device)
        for mask_BK, chance, config in zip(
            masks_HBK, self._chances, self.member_configs, strict=True
        ):
            assert chance is not None
            keep = 1 - config.dropout
            torch.mul(chance(mask_BK.shape, keep), 1 / keep, out=mask_BK)
        return x * masks_HBK.to(x.dtype)

    def losses(self, logits_BHC: Tensor, targets_BC: Tensor) -> Tensor:
        """The loss of each picture for each head [B, H]."""
        targets_B1C = targets_BC.unsqueeze(1)
        losses = [
            LOSSES[name].function(logits_BHC[:, run], targets_B1C, **settings)
            for name, run, settings in self._loss_runs
        ]
        return torch.cat(losses, dim=1)

    # ---- evaluation and leaving -----------------------------------------------------------

    def rows_at_once(self, num_places: int) -> int:
        """How many pictures a call of `logits` should get, to bound memory while evaluating."""
        widest = max(param.shape[1] for param in self.params)
        return max(1, EVALUATION_VALUES // (len(self) * num_places * widest))

    def rate(self, place: int) -> float:
        """The learning rate of the head's last step."""
        return float(self._rates_HT[place, self.step_number - 1])

    @torch.no_grad()
    def remember(self, places: Sequence[int]) -> None:
        """Keep the present weights of the heads at these stack places as their best."""
        if places:
            index = torch.tensor(places, device=self.device)
            for best, param in zip(self.best, self.params, strict=True):
                best[index] = param[index]

    def best_state(self, place: int) -> dict[str, Tensor]:
        """The remembered weights of one head, named as in its module of `core.heads`."""
        names = [f"layers.{i // 2}.{('weight', 'bias')[i % 2]}" for i in range(len(self.best))]
        return {n: b[place].detach().cpu().clone() for n, b in zip(names, self.best, strict=True)}

    @torch.no_grad()
    def keep(self, places: Sequence[int]) -> None:
        """Let all heads leave but those at these stack places (ascending)."""
        index = torch.tensor(list(places), dtype=torch.long, device=self.device)
        self.members = [self.members[i] for i in places]
        self._chances = [self._chances[i] for i in places]
        self.params = [p.detach()[index].requires_grad_() for p in self.params]
        self.slots = [[s[index] for s in slot] for slot in self.slots]
        self.best = [b[index] for b in self.best]
        self._rates_HT = self._rates_HT[index]
        self._settings = {k: v[index] for k, v in self._settings.items()}
        self._numbers = [self._numbers[i] for i in places]
        self._gradient = self._gradient[: len(places)]
        if self._class_weights_HC is not None:
            self._class_weights_HC = self._class_weights_HC[index]
        self._find_runs()

    # ---- set-up ---------------------------------------------------------------------------

    def _find_runs(self) -> None:
        """The longest slices of the stack that have one loss, with its settings as the function
        takes them, and the updates of those that have one optimizer; in order."""
        members = self.member_configs
        self._loss_runs: list[tuple[str, slice, dict[str, Any]]] = []
        for name, run in _runs([c.loss for c in members]):
            settings: dict[str, Any] = {
                key: self._settings[key][run].unsqueeze(1) for key in LOSSES[name].parameters
            }
            # A loss without smoothing or weights does not compute with zeros and ones.
            if any(c.label_smoothing > 0 for c in members[run]):
                settings["label_smoothing"] = self._settings["label_smoothing"][run].unsqueeze(1)
            if self._class_weights_HC is not None:
                settings["class_weights_C"] = self._class_weights_HC[run]
            self._loss_runs.append((name, run, settings))
        optimizers = _runs([c.optimizer for c in members])
        self._updates = StackUpdates(
            self.params,
            self.slots,
            runs=[(OPTIMIZERS[name], run) for name, run in optimizers],
            settings=self._settings,
            numbers=self._numbers,
            rates_HT=self._rates_HT,
        )

    def _schedule(self, members: Sequence[TrialConfig], steps_per_epoch: int) -> Tensor:
        num_steps = max(c.epochs for c in members) * steps_per_epoch
        rates_HT = torch.zeros(len(members), num_steps)
        for row, c in zip(rates_HT, members, strict=True):
            factors = rate_factors(
                c.schedule,
                num_steps=c.epochs * steps_per_epoch,
                warmup_fraction=c.warmup_fraction,
            )
            row[: len(factors)] = torch.from_numpy(c.lr * factors)
        return rates_HT.to(self.device)

    def _setting_tensors(self, members: Sequence[TrialConfig]) -> dict[str, Tensor]:
        keys = {"weight_decay", "label_smoothing", "csra_lambda", "csra_temperature"}
        keys |= {k for c in members for k in LOSSES[c.loss].parameters}
        keys |= {k for c in members for k in OPTIMIZERS[c.optimizer].parameters}
        return {
            k: torch.tensor([float(getattr(c, k)) for c in members], device=self.device)
            for k in sorted(keys)
        }

    def _class_weight_tensor(
        self, members: Sequence[TrialConfig], targets_NC: Tensor
    ) -> Tensor | None:
        if all(c.class_weights == "none" for c in members):
            return None
        ones_C = torch.ones(targets_NC.shape[1])
        rows = [class_weights(c.class_weights, targets_NC.cpu()) for c in members]
        return torch.stack([ones_C if row is None else row for row in rows]).to(self.device)


def in_runs(configs: Sequence[TrialConfig]) -> list[int]:
    """The places of the configs in an order with few runs of equal loss and of equal optimizer:
    every other loss goes through the optimizers backwards."""
    losses = sorted({c.loss for c in configs})
    optimizers = sorted({c.optimizer for c in configs})

    def key(place: int) -> tuple[int, int, int]:
        loss = losses.index(configs[place].loss)
        optimizer = optimizers.index(configs[place].optimizer)
        return loss, -optimizer if loss % 2 else optimizer, place

    return sorted(range(len(configs)), key=key)


def _runs(values: Sequence[str]) -> Iterator[tuple[str, slice]]:
    """The longest slices of equal values, in order."""
    start = 0
    for value, run in itertools.groupby(values):
        stop = start + len(list(run))
        yield value, slice(start, stop)
        start = stop


def _optimizer_numbers(config: TrialConfig) -> dict[str, float]:
    keys = ("weight_decay", *OPTIMIZERS[config.optimizer].parameters)
    return {key: float(getattr(config, key)) for key in keys}


def head_settings(config: TrialConfig) -> dict[str, Any]:
    """The arguments of `build_head` that a trial sets."""
    return {
        "kind": config.head,
        "seed": config.seed,
        **{key: getattr(config, key) for key in HEADS[config.head].parameters},
    }
