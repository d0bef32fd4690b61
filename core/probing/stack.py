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
from ..head_settings import head_settings, structure
from ..heads import HEADS, build_head
from ..losses import LOSSES, class_weights
from ..optimizers import OPTIMIZERS, Settings
from ..precision import FLOAT32, autocast, product_type
from ..schedules import rate_factors
from .stack_layers import LayerInput, Masks, csra_logits, layered_logits, write_gradients
from .stack_losses import CompiledLosses, DifferentiatedLosses, LossRun, StackLosses
from .stack_updates import (
    CompiledUpdates,
    OptimizerRun,
    RuleUpdates,
    StackUpdates,
    Weights,
)

EVALUATION_VALUES = 1 << 24
"""Outputs of a layer held at once while evaluating: bounds memory, not results."""


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
            losses, updates and what is judged are float32.
        compiled: compute losses and updates by `core.kernels`; None: where the device is a CPU.
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
        compiled: bool | None = None,
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
            torch.stack([p.detach() for p in params]).to(self.device)
            for params in zip(*(h.parameters() for h in heads), strict=True)
        ]
        num_slots = max(OPTIMIZERS[c.optimizer].num_slots for c in members)
        self.slots = [[torch.zeros_like(p) for p in self.params] for _ in range(num_slots)]
        self.best = [p.clone() for p in self.params]
        self.step_number = 0
        self._rates_HT = self._schedule(members, steps_per_epoch)
        self._settings = self._setting_tensors(members)
        self._class_weights_HC = self._class_weight_tensor(members, train_targets_NC)
        self._chances = [Masks(c.seed, self.device) if c.dropout > 0 else None for c in members]
        self._compiled = self.device.type == "cpu" if compiled is None else compiled
        self._make_steps()

    def __len__(self) -> int:
        return len(self.members)

    def __getstate__(self) -> dict[str, Any]:
        """Without what only points into the rest, or is written before it is read."""
        made = ("_narrow", "_gradients", "_losses", "_updates")
        return {key: value for key, value in self.__dict__.items() if key not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_steps()

    @property
    def member_configs(self) -> list[TrialConfig]:
        """The settings of the heads still in the stack, in stack order."""
        return [self.configs[i] for i in self.members]

    # ---- training -------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, features: Tensor, targets_BC: Tensor) -> Tensor:
        """One update of every head on one batch.

        Features are [B, D], or [B, P, D] for csra. Returns the mean losses before the update [H]
        (float64), on the device.
        """
        if HEADS[self.configs[0].head].spatial:
            losses_H = self._csra_gradients(features, targets_BC)
        else:
            losses_H = self._layered_gradients(features, targets_BC)
        self.step_number += 1
        self._updates(self.step_number)
        return losses_H

    def _layered_gradients(self, features_BD: Tensor, targets_BC: Tensor) -> Tensor:
        """Losses [H]; the gradients are written. By hand: of few heads, autograd would take most
        of the time."""
        inputs: list[LayerInput] = []
        logits_HBC = layered_logits(
            self._layers(self._products()),
            features_BD.to(product_type(self.precision)),
            drop=self._drop if self.configs[0].dropout > 0 else None,
            inputs=inputs,
        )
        losses_H, slopes_HBC = self._losses.slopes(logits_HBC, targets_BC)
        weights = self._products()[::2]
        write_gradients(weights, inputs, slopes_HBC, self._layers(self._gradients))
        return losses_H

    def _csra_gradients(self, features_BPD: Tensor, targets_BC: Tensor) -> Tensor:
        """Losses [H]; the gradients are written."""
        leaves = [param.detach().requires_grad_() for param in self.params]
        with torch.enable_grad(), autocast(self.device, self.precision):
            logits_HBC = csra_logits((leaves[0], leaves[1]), self._settings, features_BPD)
        losses_H, slopes_HBC = self._losses.slopes(logits_HBC.detach(), targets_BC)
        gradients = torch.autograd.grad(logits_HBC, leaves, slopes_HBC)
        for place, gradient in zip(self._gradients, gradients, strict=True):
            place.copy_(gradient)
        return losses_H

    def _drop(self, shape_BK: Sequence[int]) -> Tensor:
        """Inverted dropout with each head's own generator: masks [H, B, K]."""
        masks_HBK = torch.empty(len(self), *shape_BK, device=self.device)
        for mask_BK, chance, config in zip(
            masks_HBK, self._chances, self.member_configs, strict=True
        ):
            assert chance is not None
            keep = 1 - config.dropout
            torch.mul(chance(mask_BK.shape, keep), 1 / keep, out=mask_BK)
        return masks_HBK

    # ---- evaluation and leaving -----------------------------------------------------------

    @torch.no_grad()
    def logits(self, features: Tensor, *, exact: bool = True) -> Tensor:
        """Logits [H, B, C] (float32) of every head with its present weights; features as for
        `step`. Not `exact`: products are computed in the precision of training."""
        if exact or self._narrow is None:
            return self._logits(self.params, self._settings, features)
        return self._logits(self._products(), self._settings, features)

    @torch.no_grad()
    def best_logits(self, features: Tensor, places: Sequence[int]) -> Tensor:
        """Logits [h, B, C] of the heads at these stack places with their remembered weights."""
        index = torch.tensor(list(places), device=self.device)
        settings = {key: value[index] for key, value in self._settings.items()}
        return self._logits([b[index] for b in self.best], settings, features)

    def _logits(self, params: Sequence[Tensor], settings: Settings, features: Tensor) -> Tensor:
        layers = self._layers(params)
        features = features.to(params[0].dtype)
        if HEADS[self.configs[0].head].spatial:
            return csra_logits(layers[0], settings, features)
        return layered_logits(layers, features).float()

    @torch.no_grad()
    def losses(self, logits_HBC: Tensor, targets_BC: Tensor) -> Tensor:
        """The mean loss of each head [H] (float64)."""
        return self._losses.means(logits_HBC, targets_BC)

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
        self.params = [p[index] for p in self.params]
        self.slots = [[s[index] for s in slot] for slot in self.slots]
        self.best = [b[index] for b in self.best]
        self._rates_HT = self._rates_HT[index]
        self._settings = {k: v[index] for k, v in self._settings.items()}
        if self._class_weights_HC is not None:
            self._class_weights_HC = self._class_weights_HC[index]
        self._make_steps()

    # ---- set-up ---------------------------------------------------------------------------

    @staticmethod
    def _layers(params: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Weights and biases of each."""
        return list(zip(params[::2], params[1::2], strict=True))

    def _products(self) -> list[Tensor]:
        """The params in the type that products are computed in."""
        return self.params if self._narrow is None else self._narrow

    def _make_steps(self) -> None:
        """What a step needs besides the state, for the heads that are in the stack: gradients,
        copies of the weights, and what computes losses and updates of those that are alike."""
        kind = product_type(self.precision)
        csra = HEADS[self.configs[0].head].spatial
        self._narrow: list[Tensor] | None = None
        if kind != torch.float32 and not csra:
            self._narrow = [param.to(kind) for param in self.params]
        # Biases' and autograd's own are float32.
        self._gradients = [
            torch.empty_like(param, dtype=torch.float32 if csra or place % 2 else kind)
            for place, param in enumerate(self.params)
        ]
        self._losses = self._losses_of_runs()
        self._updates = self._updates_of_runs()

    def _losses_of_runs(self) -> StackLosses:
        runs = [
            LossRun(
                name=name,
                heads=heads,
                settings={
                    key: self._settings[key][heads]
                    for key in ("label_smoothing", *LOSSES[name].parameters)
                },
                class_weights_hC=None
                if self._class_weights_HC is None
                else self._class_weights_HC[heads],
            )
            for name, heads in _runs([c.loss for c in self.member_configs])
        ]
        if self._compiled:
            return CompiledLosses(runs, num_classes=self.params[-1].shape[1])
        return DifferentiatedLosses(runs)

    def _updates_of_runs(self) -> StackUpdates:
        runs = [
            OptimizerRun(
                name=name,
                heads=heads,
                settings={
                    key: self._settings[key][heads]
                    for key in ("weight_decay", *OPTIMIZERS[name].parameters)
                },
            )
            for name, heads in _runs([c.optimizer for c in self.member_configs])
        ]
        weights = [
            Weights(
                values=param,
                gradient=gradient,
                narrow=None if self._narrow is None else self._narrow[place],
                slots=[slot[place] for slot in self.slots],
                decaying=place % 2 == 0,
            )
            for place, (param, gradient) in enumerate(
                zip(self.params, self._gradients, strict=True)
            )
        ]
        kind = CompiledUpdates if self._compiled else RuleUpdates
        return kind(weights, runs, self._rates_HT)

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
