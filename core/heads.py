"""Heads: what turns a backbone's features into one logit a class.

These modules are the heads as they are served and fine-tuned; `core.probing.stack` trains many of
them at once on the same parameters (`layers`). N: pictures, D: features, C: classes, K: hidden
width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import unknown_name

CSRA_MAX_TEMPERATURE = 98.0
"""Above it, attention is the maximum over places; the authors write T = 99 for that."""


class LayeredHead(nn.Module):
    """Linear layers with ReLU between them; dropout before each. No hidden layer: linear head."""

    spatial = False

    def __init__(
        self, num_features: int, num_classes: int, hidden_sizes: Sequence[int], dropout: float
    ) -> None:
        super().__init__()
        widths = [num_features, *hidden_sizes, num_classes]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(widths))
        self.dropout = nn.Dropout(dropout)

    def forward(self, features_ND: Tensor) -> Tensor:
        """Features [N, D] to logits [N, C]."""
        x: Tensor = features_ND
        for i, layer in enumerate(self.layers):
            x = layer(self.dropout(x if i == 0 else torch.relu(x)))
        return x


class CSRAHead(nn.Module):
    """Class-specific residual attention (Zhu & Wu, ICCV 2021) with one attention head.

    A class' logit is its mean score over places plus `attention` times its attention-weighted
    score. Deviations: the classifier has a bias and is not normalised, so that attention 0 is
    exactly the linear head on averaged features.
    """

    spatial = True

    def __init__(
        self, num_features: int, num_classes: int, attention: float, temperature: float
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(num_features, num_classes)])
        self.attention = attention
        self.temperature = temperature

    def forward(self, features_NDhw: Tensor) -> Tensor:
        """Feature map [N, D, h, w] to logits [N, C]."""
        scores_NPC: Tensor = self.layers[0](features_NDhw.flatten(2).transpose(1, 2))
        return scores_NPC.mean(1) + self.attention * attend(scores_NPC, self.temperature, dim=1)


def attend(scores: Tensor, temperature: float | Tensor, *, dim: int) -> Tensor:
    """Scores averaged over `dim` (places) with the softmax of temperature x score as weights;
    above CSRA_MAX_TEMPERATURE the maximum. A tensor of temperatures broadcasts to the scores."""
    soft = (scores * torch.softmax(scores * temperature, dim=dim)).sum(dim)
    if isinstance(temperature, Tensor):
        top = (temperature > CSRA_MAX_TEMPERATURE).squeeze(dim)
        return torch.where(top, scores.amax(dim), soft)
    return scores.amax(dim) if temperature > CSRA_MAX_TEMPERATURE else soft


@dataclass(frozen=True, kw_only=True)
class HeadKind:
    """One kind of head and what it needs, as data."""

    build: Callable[..., LayeredHead | CSRAHead]
    """(num_features, num_classes, **parameters) -> module."""
    parameters: tuple[str, ...] = ()
    """Fields of `TrialConfig` it reads."""
    spatial: bool = False
    """True: reads the feature map [N, D, h, w]; False: the pooled features [N, D]."""


def _linear(num_features: int, num_classes: int, *, dropout: float = 0.0) -> LayeredHead:
    return LayeredHead(num_features, num_classes, (), dropout)


def _mlp(
    num_features: int, num_classes: int, *, hidden_sizes: Sequence[int], dropout: float = 0.0
) -> LayeredHead:
    return LayeredHead(num_features, num_classes, hidden_sizes, dropout)


def _csra(
    num_features: int, num_classes: int, *, csra_lambda: float = 0.1, csra_temperature: float = 1.0
) -> CSRAHead:
    return CSRAHead(num_features, num_classes, csra_lambda, csra_temperature)


HEADS: dict[str, HeadKind] = {
    "linear": HeadKind(build=_linear, parameters=("dropout",)),
    "mlp": HeadKind(build=_mlp, parameters=("dropout", "hidden_sizes")),
    "csra": HeadKind(build=_csra, parameters=("csra_lambda", "csra_temperature"), spatial=True),
}


def build_head(
    kind: str, *, num_features: int, num_classes: int, seed: int | None = None, **settings: Any
) -> LayeredHead | CSRAHead:
    """A head with random weights. Settings that the kind does not read are ignored.

    `seed` makes the weights depend on it alone and leaves torch's global generator untouched;
    None draws from the global one. Raises InputError for an unknown kind.
    """
    if kind not in HEADS:
        raise unknown_name("head", kind, HEADS, where="head")
    read = {key: value for key, value in settings.items() if key in HEADS[kind].parameters}
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        head = HEADS[kind].build(num_features, num_classes, **read)
    if seed is not None:
        _seed_weights(head, seed)
    return head


def _seed_weights(head: LayeredHead | CSRAHead, seed: int) -> None:
    """torch's default for linear layers, U(-1/sqrt(inputs), 1/sqrt(inputs)), from the seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in head.layers:
            assert isinstance(layer, nn.Linear)
            bound = 1 / math.sqrt(layer.in_features)
            layer.weight.uniform_(-bound, bound, generator=generator)
            layer.bias.uniform_(-bound, bound, generator=generator)
