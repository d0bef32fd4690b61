"""Builds the network of a backbone, cut off before its classifier.

One mechanism for every torchvision classifier: trace its top level with torch.fx, find the head
(torchvision calls it `classifier`, `fc`, `head` or `heads`), step back over pooling, flattening and
dropout, and keep the graph up to there. What remains is the last feature map (VGG: 512 maps, not
the 4096 units of its dense layers; vision transformers: the class token). Only the top level is
traced: blocks stay modules that obey train() and eval() one by one.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

HEADS = ("classifier", "fc", "head", "heads")
SIDE_BRANCHES = ("AuxLogits", "aux1", "aux2")

# Arguments of torchvision's builders that a bare call would get wrong: the auxiliary classifiers
# are no part of an encoder, and leaving the initialisation open warns.
BUILD_OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}

_REDUCING_MODULES = (nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.Flatten, nn.Dropout, nn.Identity)
_REDUCING_CALLS = (torch.flatten, F.adaptive_avg_pool2d, F.dropout, "mean", "flatten")


def build_torchvision(name: str, input_size: int) -> nn.Module:
    """A torchvision classifier with random weights, head included."""
    from torchvision import models

    options = dict(BUILD_OPTIONS.get(name, {}))
    if name.startswith("vit_"):
        options["image_size"] = input_size
    elif name.startswith("maxvit"):
        options["input_size"] = (input_size, input_size)
    model: nn.Module = models.get_model(name, weights=None, **options)
    return model


class _TopLevelTracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def cut_head(model: nn.Module) -> fx.GraphModule:
    """The part of a torchvision classifier before its head, sharing the classifier's modules.

    Its output is `[N, D, h, w]`, or `[N, D]` where the head reads a token.
    """
    graph = _TopLevelTracer().trace(model)
    head = next(
        node
        for node in graph.nodes
        if node.op == "call_module" and str(node.target).split(".")[0] in HEADS
    )
    features = head.args[0]
    assert isinstance(features, fx.Node)
    while _only_reduces(model, features):
        previous = features.args[0]
        assert isinstance(previous, fx.Node)
        features = previous
    for node in reversed(list(graph.nodes)):
        if node is features:
            break
        graph.erase_node(node)
    graph.output(features)
    return fx.GraphModule(model, graph)


def _only_reduces(model: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(model.get_submodule(str(node.target)), _REDUCING_MODULES)
    return node.op in ("call_function", "call_method") and node.target in _REDUCING_CALLS


class TimmNetwork(nn.Module):
    """A timm model without classifier: its feature map, or its pooled tokens where it has none."""

    def __init__(self, name: str, input_size: int) -> None:
        """`name` without `timm/`. Models with a fixed input size are built for `input_size`."""
        import timm

        super().__init__()
        create: Any = timm.create_model
        config = timm.get_pretrained_cfg(name)
        options = {"img_size": input_size} if config and config.fixed_input_size else {}
        self.model: Any = create(name, pretrained=False, num_classes=0, **options)
        self._dropped = self._drop_unused(input_size)

    def _drop_unused(self, input_size: int) -> tuple[str, ...]:
        """Take off layers that only lead from the feature map to the classifier.

        Their parameters would be stored, and wait in vain for a gradient.
        """
        ran: set[str] = set()
        handles = [
            module.register_forward_hook(partial(_note, ran, name))
            for name, child in self.model.named_children()
            for module in child.modules()
        ]
        with torch.no_grad():
            self.eval()(torch.zeros(1, 3, input_size, input_size))
        for handle in handles:
            handle.remove()
        self.train()  # some models keep what they computed in evaluation mode until then
        unused = [
            name
            for name, child in self.model.named_children()
            if name not in ran and child.state_dict()
        ]
        for name in unused:
            setattr(self.model, name, nn.Identity())
        return tuple(unused)

    def forward(self, images_N3hw: Tensor) -> Tensor:
        """`[N, D, h, w]` or `[N, D]`."""
        features = self.model.forward_features(images_N3hw)
        if not isinstance(features, Tensor) or features.ndim != 4:
            pooled: Tensor = self.model.forward_head(features, pre_logits=True)
            return pooled
        width = self.model.num_features
        if features.shape[1] != width and features.shape[3] == width:
            return features.permute(0, 3, 1, 2)
        return features

    def translate(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A published state dict in this model's names and sizes, without its classifier.

        timm keeps one such translation a file of models, by convention under one name.
        """
        module = sys.modules[type(self.model).__module__]
        translation = getattr(module, "checkpoint_filter_fn", None)
        translated: Mapping[str, Tensor] = translation(state, self.model) if translation else state
        classifier = (self.model.pretrained_cfg or {}).get("classifier") or ()
        layers = (classifier,) if isinstance(classifier, str) else tuple(classifier)
        heads = {layer.split(".")[0] for layer in (*layers, *self._dropped)}
        own = self.model.state_dict().keys()
        return {k: v for k, v in translated.items() if k in own or k.split(".")[0] not in heads}


def _note(ran: set[str], name: str, *_: object) -> None:
    ran.add(name)
