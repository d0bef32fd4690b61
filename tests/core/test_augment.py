"""Augmentation: torchvision's own transforms as oracle, and each picture by its own seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as kernels

from core.images.augment import Augmentation, crop_boxes, enlarge_boxes, mix, picture_seeds
from core.images.randaugment import OPERATIONS, choose, randaugment

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 40
NAMES = list(OPERATIONS)
EVERYTHING = Augmentation(
    horizontal_flip=True, min_crop_scale=0.3, randaugment_magnitude=9, randaugment_ops=3
)


def pictures(count: int, *, size: int = SIZE, channels_last: bool = True) -> Tensor:
    """Smooth colours with noise, so that geometry and contrast both show."""
    random = torch.Generator().manual_seed(count)
    rough = torch.rand(count, 3, 5, 5, generator=random)
    smooth = torch.nn.functional.interpolate(rough, size=(size, size), mode="bilinear")
    noise = 0.1 * torch.rand(smooth.shape, generator=random)
    images = ((0.2 + 0.5 * smooth + noise) * 255).to(torch.uint8)
    return images.contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


def seeds(count: int, *, first: int = 0) -> np.ndarray:
    return picture_seeds(3, 1, np.arange(first, first + count))


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_picture_looks_the_same_whatever_batch_it_is_in(channels_last: bool) -> None:
    images, its_seeds = pictures(24, channels_last=channels_last), seeds(24)
    before = images.clone()
    together = EVERYTHING(images, its_seeds)
    assert torch.equal(images, before)
    assert together.dtype == torch.uint8
    order = np.random.default_rng(0).permutation(24)
    shuffled = EVERYTHING(images[torch.from_numpy(order)], its_seeds[order])
    assert torch.equal(shuffled, together[torch.from_numpy(order)])
    alone = [EVERYTHING(images[i : i + 1], its_seeds[i : i + 1]) for i in range(24)]
    assert torch.equal(torch.cat(alone), together)


def test_another_epoch_seed_or_row_looks_different() -> None:
    images = pictures(1).expand(8, -1, -1, -1)
    rows = np.arange(8)
    looks = [EVERYTHING(images, picture_seeds(*key, rows)) for key in ((0, 1), (0, 2), (1, 1))]
    distinct = {look.numpy().tobytes() for batch in looks for look in batch}
    assert len(distinct) >= 22  # of 24: some operations may change nothing
    many = np.concatenate([picture_seeds(s, e, np.arange(500)) for s in (0, 1) for e in (1, 2)])
    assert len(set(many.tolist())) == 2000


def test_nothing_is_done_unless_asked_for() -> None:
    images = pictures(4)
    assert torch.equal(Augmentation()(images, seeds(4)), images)


def test_flips_are_fair_and_exact() -> None:
    images = pictures(400, size=8)
    flipped = Augmentation(horizontal_flip=True)(images, seeds(400))
    is_flipped = torch.tensor([not torch.equal(a, b) for a, b in zip(flipped, images, strict=True)])
    assert torch.equal(flipped[is_flipped], kernels.horizontal_flip(images[is_flipped]))
    assert 160 < int(is_flipped.sum()) < 240  # four standard deviations


def test_crops_are_torchvisions_crops() -> None:
    """The same boxes, cut and enlarged one by one by torchvision with its default antialiasing."""
    images = pictures(32)
    draws = np.random.default_rng(0).random((32, 22))
    boxes = crop_boxes(draws, SIZE, 0.2)
    expected = torch.stack(
        [
            kernels.resized_crop(image, *box, size=[SIZE, SIZE], antialias=True)
            for image, box in zip(images, boxes.tolist(), strict=True)
        ]
    )
    batched = enlarge_boxes(images, boxes)
    assert (batched.int() - expected.int()).abs().max() <= 1  # rounding
    assert (batched.int() - expected.int()).abs().float().mean() < 0.3
    # The whole way, with the boxes of the pictures' own seeds: a crop is one of the picture.
    cropped = Augmentation(min_crop_scale=0.2)(images, seeds(32))
    assert cropped.shape == images.shape
    assert not torch.equal(cropped, images)


def test_the_way_for_a_cpu_and_that_for_a_gpu_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(32)
    augment = Augmentation(min_crop_scale=0.1)
    by_one = augment(images, seeds(32))
    monkeypatch.setattr("core.images.augment._crop", enlarge_boxes)
    at_once = augment(images, seeds(32))
    assert not torch.equal(by_one, images)
    assert (by_one.int() - at_once.int()).abs().max() <= 1


@pytest.mark.parametrize("min_scale", [0.08, 0.6])
def test_boxes_are_distributed_as_torchvisions(min_scale: float) -> None:
    torch.manual_seed(0)
    transform = v2.RandomResizedCrop(64, scale=(min_scale, 1.0))
    image = torch.zeros(3, 64, 64)
    theirs = [transform.make_params([image]) for _ in range(3000)]
    boxes = crop_boxes(np.random.default_rng(0).random((3000, 22)), 64, min_scale)
    for column, key in enumerate(("top", "left", "height", "width")):
        test = stats.ks_2samp(boxes[:, column], [params[key] for params in theirs])
        assert test.pvalue > 0.001, key
    area = boxes[:, 2] * boxes[:, 3] / 64**2
    areas = [params["height"] * params["width"] / 64**2 for params in theirs]
    assert stats.ks_2samp(area, areas).pvalue > 0.001
    assert (boxes >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= 64).all()


def test_the_whole_picture_where_no_box_fits() -> None:
    draws = np.zeros((1, 22))
    draws[:, 0:20:2] = 1.0  # the whole area in a ratio of 3/4: too high
    assert crop_boxes(draws, 64, 0.5).tolist() == [[0, 0, 64, 64]]


def _torchvisions(image: Tensor, name: str, step: int, *, negative: bool) -> Tensor:
    transform = v2.RandAugment(num_ops=1, magnitude=step)
    magnitudes, signed = transform._AUGMENTATION_SPACE[name]
    size = image.shape[-1]
    values = magnitudes(31, size, size)
    magnitude = 0.0 if values is None else float(values[step])
    if negative:
        assert signed
        magnitude = -magnitude
    result: Tensor = transform._apply_image_or_video_transform(
        image, name, magnitude, interpolation=InterpolationMode.NEAREST, fill=transform._fill
    )
    return result


def test_the_operations_are_torchvisions() -> None:
    theirs = v2.RandAugment()._AUGMENTATION_SPACE
    assert {n: o.signed for n, o in OPERATIONS.items()} == {n: s for n, (_, s) in theirs.items()}


@pytest.mark.parametrize("step", [1, 9, 17, 30])
@pytest.mark.parametrize("channels_last", [True, False])
def test_each_picture_gets_torchvisions_result(step: int, channels_last: bool) -> None:
    """Two operations a picture, grouped, against one picture at a time."""
    images = pictures(64, channels_last=channels_last)
    draws = np.random.default_rng(step).random((64, 4))
    results = randaugment(images, draws, step)
    seen = set()
    for image, draw, result in zip(images, draws, results, strict=True):
        expected = image
        for column in (0, 2):
            operation, negative = choose(draw[None, column : column + 2])
            name = NAMES[int(operation[0])]
            seen.add((name, int(negative[0])))
            expected = _torchvisions(expected, name, step, negative=bool(negative[0]))
        # Kernels over channels last sum in another order, and Equalize may widen the difference.
        assert ((result.int() - expected.int()).abs() > 1).float().mean() < 0.002
    assert len(seen) >= 20  # of 14 operations, 9 of them with two signs


def test_operations_and_signs_are_chosen_evenly() -> None:
    operations, negative = choose(np.random.default_rng(0).random((14_000, 2)))
    counts = np.bincount(operations, minlength=14)
    assert stats.chisquare(counts).pvalue > 0.001
    signed = np.array([OPERATIONS[n].signed for n in NAMES])[operations]
    assert not negative[~signed].any()
    assert abs(negative[signed].mean() - 0.5) < 0.02


def test_mixup_adds_the_two_pictures_by_their_shares() -> None:
    images = pictures(6).float() / 255
    mixed = mix(images, mixup_alpha=0.4, cutmix_alpha=0.0, seed=2)
    share = float(mixed.share_B[0])
    assert 0 < share < 1
    assert mixed.share_B.tolist() == [share] * 6
    assert sorted(mixed.partners_B.tolist()) == list(range(6))
    expected = share * images + (1 - share) * images[mixed.partners_B]
    torch.testing.assert_close(mixed.images_BChw, expected)


def test_cutmix_takes_one_rectangle_and_counts_its_area() -> None:
    zeros_and_ones = torch.zeros(7, 3, 20, 30)
    for seed in range(40):
        images = zeros_and_ones + torch.arange(7).view(7, 1, 1, 1)
        mixed = mix(images, mixup_alpha=0.0, cutmix_alpha=1.0, seed=seed)
        hole = None
        for own, (image, partner) in enumerate(
            zip(mixed.images_BChw, mixed.partners_B.tolist(), strict=True)
        ):
            if partner == own:
                continue
            assert set(image.unique().tolist()) <= {own, partner}
            cut = image == partner
            assert float(1 - cut.float().mean()) == pytest.approx(float(mixed.share_B[own]))
            rows, columns = cut[0].any(1), cut[0].any(0)
            assert torch.equal(cut, (rows[:, None] & columns).expand(3, -1, -1))
            assert hole is None or torch.equal(hole, cut)
            hole = cut
        assert hole is not None


def test_cutmix_holes_are_distributed_as_torchvisions() -> None:
    torch.manual_seed(0)
    transform = v2.CutMix(alpha=0.7, num_classes=2)
    images = torch.zeros(1, 3, 24, 24)
    theirs = [transform.make_params([images])["lam_adjusted"] for _ in range(2000)]
    ours = [
        float(mix(images, mixup_alpha=0.0, cutmix_alpha=0.7, seed=[5, i]).share_B[0])
        for i in range(2000)
    ]
    # Rounded, as ours are float32 and ties must stay ties.
    assert stats.ks_2samp(np.round(ours, 5), np.round(theirs, 5)).pvalue > 0.001


def test_mixup_shares_come_from_beta() -> None:
    images = torch.zeros(2, 3, 2, 2)
    shares = [
        float(mix(images, mixup_alpha=0.3, cutmix_alpha=0.0, seed=i).share_B[0])
        for i in range(1000)
    ]
    assert stats.kstest(shares, stats.beta(0.3, 0.3).cdf).pvalue > 0.001


def test_two_terms_are_the_loss_of_mixed_targets() -> None:
    """For cross-entropy with soft targets, which is linear in them, the two are one."""
    images = pictures(5).float()
    mixed = mix(images, mixup_alpha=1.0, cutmix_alpha=1.0, seed=4)
    logits = torch.randn(5, 3)
    targets = torch.eye(3)[torch.tensor([0, 1, 2, 0, 1])]
    share = mixed.share_B[:, None]
    soft = share * targets + (1 - share) * targets[mixed.partners_B]

    def loss(target: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits, target, reduction="none")

    two = mixed.share_B * loss(targets) + (1 - mixed.share_B) * loss(targets[mixed.partners_B])
    torch.testing.assert_close(two, loss(soft))


def test_with_both_alphas_a_batch_takes_either() -> None:
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(-1, 3, 16, 16)
    num_cut = 0
    for seed in range(200):
        mixed = mix(images, mixup_alpha=1.0, cutmix_alpha=1.0, seed=seed)
        again = mix(images, mixup_alpha=1.0, cutmix_alpha=1.0, seed=seed)
        assert torch.equal(mixed.images_BChw, again.images_BChw)
        num_cut += bool((mixed.images_BChw == mixed.images_BChw.round()).all())
    assert 60 < num_cut < 150  # half of them, and those whose pictures met themselves


def test_without_alphas_nothing_is_mixed() -> None:
    images = pictures(3).float()
    mixed = mix(images, mixup_alpha=0.0, cutmix_alpha=0.0, seed=0)
    assert torch.equal(mixed.images_BChw, images)
    assert mixed.share_B.tolist() == [1.0] * 3
    assert mixed.partners_B.tolist() == [0, 1, 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_what_the_cpu_gives() -> None:
    images = pictures(64)
    ours = EVERYTHING(images.cuda(), seeds(64)).cpu()
    theirs = EVERYTHING(images, seeds(64))
    # A crop rounds otherwise by one, which a contrast may widen.
    assert ((ours.int() - theirs.int()).abs() > 3).float().mean() < 0.03
