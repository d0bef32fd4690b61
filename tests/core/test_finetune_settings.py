"""What each setting of fine-tuning does, with a plain loop of torch as the oracle."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from core.encoding.backbones import Backbone
from core.encoding.encoders import Encoder, build_encoder
from core.errors import InputError
from core.finetuning.out_of_memory import is_out_of_memory
from core.head_settings import head_settings
from core.heads import build_head
from core.images.augment import Augmentation, mix, picture_seeds
from core.metrics import topk_recall
from core.precision import BFLOAT16
from core.report import Status

pytestmark = pytest.mark.usefixtures("one_thread")

BCE = nn.functional.binary_cross_entropy_with_logits


class Plain(nn.Module):
    """The tiny encoder and a linear head, put together by hand."""

    def __init__(self, tiny: ModuleType, trial: Any) -> None:
        super().__init__()
        self.encoder = tiny.encoder()
        self.head = build_head(num_features=8, num_classes=tiny.C, **head_settings(trial))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images).mean((2, 3)))


def _close(state: dict[str, Tensor], model: nn.Module) -> None:
    for name, value in model.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6)


def test_a_plain_loop_comes_to_the_same(tiny: ModuleType) -> None:
    """Accumulation, clipping, averages, layer-wise rates, unfreezing and training batch norms."""
    trial = tiny.config(
        unfrozen_stages=None,
        unfreeze_epochs=1,
        layer_lr_decay=0.5,
        head_lr_multiplier=3.0,
        batch_size=6,
        accumulation_steps=2,
        clip_norm=0.3,
        ema_decay=0.6,
        batch_norm="train",
        optimizer="sgd",
        lr=0.02,
        momentum=0.9,
        weight_decay=0.05,
        feature_norm="none",
        schedule="cosine",
        epochs=3,
    )
    outcome = tiny.train(trial)
    pictures, targets_NC = tiny.data()
    model = Plain(tiny, trial)
    stages = model.encoder.stages()
    rates = [(stage, 0.02 * 0.5 ** (3 - place)) for place, stage in enumerate(stages)]
    groups = [
        {"params": [p], "lr": rate, "weight_decay": 0.05 if p.ndim > 1 else 0.0}
        for part, rate in [*rates, (model.head, 0.06)]
        for p in part.parameters()
    ]
    optimizer = torch.optim.SGD(groups, lr=0.02, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=9)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.6), use_buffers=True)
    for epoch, metrics in enumerate(outcome.curve, 1):
        model.eval().requires_grad_(False)
        model.head.requires_grad_(True)
        for stage in stages[4 - epoch :]:
            stage.train().requires_grad_(True)
        order = np.random.default_rng([0, epoch]).permutation(tiny.TRAIN)
        total = 0.0
        for step in np.split(order, [12, 24]):
            optimizer.zero_grad()
            for rows in np.split(step, [6]):
                loss = BCE(model(tiny.images(pictures[rows])), targets_NC[rows])
                (loss * len(rows) / len(step)).backward()
                total += loss.item() * len(rows)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            optimizer.step()
            scheduler.step()
            average.update_parameters(model)
        assert metrics["train_loss"] == pytest.approx(total / 32, rel=1e-4)
        validated = average.module.eval()
        with torch.no_grad():
            logits_NC = validated(tiny.images(pictures[tiny.VALIDATION]))
        targets = targets_NC[tiny.VALIDATION]
        assert metrics["validation_loss"] == pytest.approx(float(BCE(logits_NC, targets)), rel=1e-4)
        recall = float(topk_recall(logits_NC, targets))
        assert metrics["validation_top3_accuracy"] == pytest.approx(recall)
        if epoch == outcome.best_epoch:
            assert outcome.state is not None
            state = {k: v for k, v in outcome.state.items() if "batches" not in k}
            for name, value in validated.state_dict().items():
                if name in state:
                    torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "alphas", [{"mixup_alpha": 0.7}, {"cutmix_alpha": 1.0}, {"mixup_alpha": 1, "cutmix_alpha": 1}]
)
def test_mixed_and_augmented_pictures_by_hand(tiny: ModuleType, alphas: dict[str, float]) -> None:
    trial = tiny.config(
        **alphas,
        horizontal_flip=True,
        min_crop_scale=0.5,
        randaugment_magnitude=9,
        optimizer="sgd",
        feature_norm="none",
        unfrozen_stages=1,
        epochs=2,
        seed=5,
    )
    outcome = tiny.train(trial)
    pictures, targets_NC = tiny.data()
    model = Plain(tiny, trial)
    trained = [*model.encoder.stages()[-1].parameters(), *model.head.parameters()]
    optimizer = torch.optim.SGD(trained, lr=0.01)
    augment = Augmentation(horizontal_flip=True, min_crop_scale=0.5, randaugment_magnitude=9)
    both = {"mixup_alpha": 0.0, "cutmix_alpha": 0.0, **alphas}
    for epoch, metrics in enumerate(outcome.curve, 1):
        order = np.random.default_rng([0, epoch]).permutation(tiny.TRAIN)
        total = 0.0
        for batch, rows in enumerate(np.split(order, [12, 24])):
            seen = torch.from_numpy(pictures[rows]).permute(0, 3, 1, 2)
            seen = augment(seen, picture_seeds(5, epoch, rows)) / 255
            mixed = mix(seen, **both, seed=[5, epoch, batch, 0])
            logits = model(mixed.images_BChw)
            share, partner = float(mixed.share_B[0]), mixed.partners_B
            loss = share * BCE(logits, targets_NC[rows])
            loss = loss + (1 - share) * BCE(logits, targets_NC[rows][partner])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        assert metrics["train_loss"] == pytest.approx(total / 32, rel=1e-4)
        if epoch == outcome.best_epoch:
            assert outcome.state is not None
            _close(outcome.state, model)


@pytest.mark.parametrize(
    "change",
    [
        {"accumulation_steps": 2},
        {"clip_norm": 0.01},
        {"ema_decay": 0.9},
        {"layer_lr_decay": 0.3},
        {"unfreeze_epochs": 1},
        {"unfrozen_stages": None},
        {"batch_norm": "train"},
        {"mixup_alpha": 1.0},
        {"cutmix_alpha": 1.0},
        {"min_crop_scale": 0.3},
        {"randaugment_magnitude": 15},
    ],
    ids=str,
)
def test_no_setting_is_without_effect(tiny: ModuleType, change: dict[str, Any]) -> None:
    base = {"optimizer": "sgd", "lr": 0.05}
    first = tiny.train(tiny.config(**base, **change))
    assert first.status is Status.COMPLETE
    assert first.curve != tiny.train(tiny.config(**base)).curve
    assert first.curve == tiny.train(tiny.config(**base, **change)).curve


def test_batch_norms_train_in_unfrozen_stages_only(tiny: ModuleType) -> None:
    """Batches of 31 and of one picture, which is no batch to normalise by."""
    trial = tiny.config(batch_norm="train", unfrozen_stages=1, batch_size=31)
    outcome = tiny.train(trial)
    before = dict(tiny.encoder().named_buffers())
    moved = {
        name
        for name, value in before.items()
        if "running" in name and not torch.equal(outcome.state[f"encoder.{name}"], value)
    }
    assert moved == {"network.3.1.running_mean", "network.3.1.running_var"}
    assert int(outcome.state["encoder.network.3.1.num_batches_tracked"]) == outcome.best_epoch


def test_drop_path_acts_in_trained_stages_and_needs_blocks(tiny: ModuleType) -> None:
    with pytest.raises(InputError, match=r"tiny has no blocks that can be skipped(.|\n)*0"):
        tiny.train(tiny.config(drop_path=0.2))
    pictures, targets_NC = tiny.data()

    def run(**changes: Any) -> Any:
        from core.finetuning.finetune import finetune

        encoder = build_encoder("efficientnet_b0", weights="none", input_size=32)
        trial = tiny.config(backbone="efficientnet_b0", epochs=1, unfrozen_stages=3, **changes)
        rows = tiny.TRAIN[:8], tiny.VALIDATION[:4]
        small = np.pad(pictures, ((0, 0), (0, 8), (0, 8), (0, 0)))
        return finetune(encoder, small, targets_NC, *rows, trial, report=tiny.keep_going)

    assert run(drop_path=0.5).curve == run(drop_path=0.5).curve
    assert run(drop_path=0.5).curve != run().curve


def test_the_head_starts_where_a_probe_ended(tiny: ModuleType) -> None:
    """With a rate of almost nothing, the first epoch is the probe's."""
    trial = tiny.config(lr=1e-12, epochs=1, unfrozen_stages=0)
    state = {
        "layers.0.weight": torch.randn(tiny.C, 8),
        "layers.0.bias": torch.randn(tiny.C),
        "mean_D": torch.randn(8),
        "deviation_D": torch.rand(8) + 0.5,
    }
    outcome = tiny.train(trial, head_state=state)
    pictures, targets_NC = tiny.data()
    with torch.no_grad():
        features = tiny.encoder()(tiny.images(pictures[tiny.VALIDATION])).mean((2, 3))
        scaled = (features - state["mean_D"]) / state["deviation_D"]
        logits = scaled @ state["layers.0.weight"].T + state["layers.0.bias"]
    loss = float(BCE(logits, targets_NC[tiny.VALIDATION]))
    assert outcome.curve[0]["validation_loss"] == pytest.approx(loss, rel=1e-5)
    # Without its scaling, that of the training pictures stands in front of it.
    weights = {k: v for k, v in state.items() if k.startswith("layers")}
    unscaled = tiny.train(trial, head_state=weights)
    assert torch.equal(unscaled.state["mean_D"], tiny.train(trial).state["mean_D"])
    with pytest.raises(InputError, match="of another head"):
        tiny.train(trial, head_state={"layers.0.weight": torch.zeros(tiny.C, 9)})


def test_bfloat16_is_near_float32(tiny: ModuleType) -> None:
    exact = tiny.train(tiny.config(ema_decay=0.5))
    rough = tiny.train(tiny.config(ema_decay=0.5), precision=BFLOAT16)
    assert rough.curve != exact.curve
    for found, expected in zip(rough.curve, exact.curve, strict=True):
        assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=0.05)
    assert all(not v.is_floating_point() or v.dtype == torch.float32 for v in rough.state.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own
def test_a_compiled_model_learns_the_same(tiny: ModuleType) -> None:
    trial = tiny.config(epochs=2, unfreeze_epochs=1)
    compiled, plain = tiny.train(trial, compile=True), tiny.train(trial)
    for found, expected in zip(compiled.curve, plain.curve, strict=True):
        assert found == pytest.approx(expected, rel=1e-3)
    assert compiled.state.keys() == plain.state.keys()


def test_a_model_that_cannot_be_compiled_says_so(
    tiny: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(inductor, "fx_graph_cache", False)
    with pytest.raises(InputError, match="the model cannot be compiled") as caught:
        tiny.train(tiny.config(), compile=True)
    assert caught.value.where == "compile"
    torch._dynamo.reset()


class _Greedy(nn.Module):
    """Asks torch for more memory than there can be, once it has been called so often."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.left = calls
        self.convolution = nn.Conv2d(3, 4, 3, stride=8)

    def forward(self, images: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            torch.empty(1 << 50)
        return self.convolution(images)


@pytest.mark.parametrize("calls", [1, 3, 5], ids=["scaling", "training", "validation"])
def test_a_run_without_memory_is_infeasible(tiny: ModuleType, calls: int) -> None:
    from core.finetuning.finetune import finetune

    pictures, targets_NC = tiny.data()
    encoder = Encoder(Backbone(name="tiny", input_size=tiny.SIZE), _Greedy(calls))
    trial = tiny.config(unfrozen_stages=1)
    rows = tiny.TRAIN, tiny.VALIDATION
    outcome = finetune(encoder, pictures, targets_NC, *rows, trial, report=tiny.keep_going)
    assert outcome.status is Status.INFEASIBLE
    assert outcome.reason.startswith("out of memory with batches of 12: ")
    assert "\n" not in outcome.reason
    assert outcome.curve == ()


def test_other_errors_are_not_taken_for_want_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))
