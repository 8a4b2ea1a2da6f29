import math

import cv2
import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import ssd_object_detection as ssd

ANCHORS = ssd.make_anchors()


def random_case(images=3, anchors=60, num_classes=4, positives=(5, 0, 2), seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(images, anchors, num_classes + 1, generator=generator)
    labels = torch.zeros(images, anchors, dtype=torch.int64)
    for row, count in enumerate(positives):
        places = torch.randperm(anchors, generator=generator)[:count]
        labels[row, places] = torch.randint(1, num_classes + 1, (count,), generator=generator)
    return logits, labels


# -- Focal loss


def test_focal_loss_with_gamma_zero_is_the_cross_entropy():
    logits, labels = random_case()
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    torch.testing.assert_close(ssd.focal_loss(logits, labels, gamma=0.0), expected)


def test_focal_loss_has_the_hand_computed_value():
    # Softmax of (log 1, log 3, log 4) is (1/8, 3/8, 1/2).
    logits = torch.tensor([1.0, 3.0, 4.0]).log().expand(3, 3)
    loss = ssd.focal_loss(logits, torch.tensor([0, 1, 2]), gamma=2.0)
    expected = [-((1 - p) ** 2) * math.log(p) for p in (1 / 8, 3 / 8, 1 / 2)]
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)
    assert loss[2].item() == pytest.approx(0.25 * math.log(2), rel=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
def test_gradient_of_focal_loss_is_finite_where_probability_is_one_or_zero(gamma):
    logits = torch.tensor([[100.0, -100.0], [-100.0, 100.0], [0.0, 0.0]], requires_grad=True)
    loss = ssd.focal_loss(logits, torch.tensor([0, 0, 1]), gamma=gamma)  # p_t is 1, 0 and 1/2
    assert torch.isfinite(loss).all()
    loss.sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[1].abs().max() > 0.1
    assert logits.grad[2, 1] < 0  # more of the true class is less loss


def test_focal_loss_of_half_precision_is_computed_in_float32():
    logits, labels = random_case()
    loss = ssd.focal_loss(logits.bfloat16(), labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, ssd.focal_loss(logits.bfloat16().float(), labels))


# -- Hard negative mining


def mined_mask(logits, labels):
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    rows = zip(loss.tolist(), labels.tolist(), strict=True)
    return loss, torch.tensor([reference.mined(a, b) for a, b in rows])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=4), st.integers(0, 10**6))
def test_mining_agrees_with_the_reference(positives, seed):
    # 30 of 40 positives leave fewer negatives than three a positive.
    logits, labels = random_case(len(positives), 40, 3, positives, seed)
    loss, mask = mined_mask(logits, labels)
    torch.testing.assert_close(ssd.mined_cross_entropy(logits, labels), loss * mask)


def test_mining_keeps_exactly_three_negatives_a_positive_in_each_image():
    logits, labels = random_case(positives=(5, 0, 2))
    kept = ssd.mined_cross_entropy(logits, labels) > 0
    assert (kept & (labels > 0)).sum(dim=1).tolist() == [5, 0, 2]
    assert (kept & (labels == 0)).sum(dim=1).tolist() == [15, 3, 6]  # an image without objects keeps three


def test_mining_keeps_exactly_that_many_among_equal_losses():
    labels = torch.zeros(2, 50, dtype=torch.int64)
    labels[0, [3, 30]] = 1
    kept = ssd.mined_cross_entropy(torch.zeros(2, 50, 3), labels) > 0
    assert kept.sum(dim=1).tolist() == [8, 3]
    assert kept[0, [3, 30]].all()


def test_mining_takes_the_hardest():
    logits = torch.zeros(1, 10, 2)
    logits[0, :, 1] = torch.arange(10.0)  # the later, the surer of an object
    labels = torch.zeros(1, 10, dtype=torch.int64)
    labels[0, 9] = 1
    kept = ssd.mined_cross_entropy(logits, labels).nonzero()[:, 1].tolist()
    assert kept == [6, 7, 8, 9]


def test_ratio_of_mining_can_be_set():
    logits, labels = random_case(positives=(5, 1, 2))
    kept = ssd.mined_cross_entropy(logits, labels, negatives_per_positive=1) > 0
    assert (kept & (labels == 0)).sum(dim=1).tolist() == [5, 1, 2]


# -- The whole loss


def test_box_loss_has_the_hand_computed_value():
    labels = torch.tensor([[1, 0, 2]])
    box_deltas = torch.tensor([[[0.5, 0.0, 0.0, 0.0], [9.0, 9.0, 9.0, 9.0], [0.0, 3.0, 0.0, -2.0]]])
    box_targets = torch.zeros(1, 3, 4)
    losses = ssd.detection_loss((torch.zeros(1, 3, 3), box_deltas), (labels, box_targets))
    # Smooth L1: .5 * .5^2 = .125; 3 - .5 = 2.5; 2 - .5 = 1.5; over two positives; background does not count.
    assert losses["loss_box"].item() == pytest.approx((0.125 + 2.5 + 1.5) / 2)


@pytest.mark.parametrize("loss", ["focal", "multibox"])
def test_class_loss_is_the_sum_over_the_positives_of_the_batch(loss):
    logits, labels = random_case(positives=(5, 0, 2))
    deltas = torch.zeros(3, 60, 4)
    losses = ssd.detection_loss((logits, deltas), (labels, deltas), loss=loss)
    per_anchor = (ssd.focal_loss if loss == "focal" else ssd.mined_cross_entropy)(logits, labels)
    torch.testing.assert_close(losses["loss_cls"], per_anchor.sum() / 7)
    assert losses["loss_box"] == 0


def test_gamma_is_passed_on_and_the_loss_is_the_sum_of_its_parts():
    logits, labels = random_case()
    deltas = torch.randn(3, 60, 4, generator=torch.Generator().manual_seed(0))
    losses = ssd.detection_loss((logits, deltas), (labels, torch.zeros(3, 60, 4)), gamma=2.0)
    expected = ssd.focal_loss(logits, labels, gamma=2.0).sum() / 7
    torch.testing.assert_close(losses["loss_cls"], expected)
    assert losses["loss_box"] > 0
    torch.testing.assert_close(losses["loss"], losses["loss_cls"] + losses["loss_box"])


@pytest.mark.parametrize("loss", ["focal", "multibox"])
def test_batch_without_objects_has_a_finite_loss_that_still_teaches_background(loss):
    logits = torch.zeros(2, 9966, 4, requires_grad=True)
    deltas = torch.randn(2, 9966, 4, requires_grad=True)
    targets = torch.zeros(2, 9966, dtype=torch.int64), torch.zeros(2, 9966, 4)
    losses = ssd.detection_loss((logits, deltas), targets, loss=loss)
    assert torch.isfinite(losses["loss"])
    assert losses["loss_box"] == 0
    losses["loss"].backward()
    assert (logits.grad[..., 0] <= 0).all()  # more background is less loss
    for image in logits.grad:
        assert image.abs().sum() > 0
    assert not deltas.grad.any()


@pytest.mark.parametrize("loss", ["focal", "multibox"])
def test_one_empty_image_of_several_teaches_background(loss):
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.6], [0.4, 0.4, 0.9, 0.8]])
    labels, box_targets = reference.targets([boxes, torch.zeros(0, 4)], [[1, 2], []])
    logits = torch.zeros(2, 9966, 3, requires_grad=True)
    deltas = torch.zeros(2, 9966, 4, requires_grad=True)
    losses = ssd.detection_loss((logits, deltas), (labels, box_targets), loss=loss)
    losses["loss"].backward()
    assert torch.isfinite(losses["loss"])
    assert logits.grad[1].abs().sum() > 0
    assert deltas.grad[0].any()
    assert not deltas.grad[1].any()


def test_divisor_is_never_below_the_number_of_images():
    logits, labels = random_case(positives=(1, 0, 0))
    deltas = torch.zeros(3, 60, 4)
    expected = ssd.focal_loss(logits, labels).sum() / 3
    losses = ssd.detection_loss((logits, deltas), (labels, deltas))
    torch.testing.assert_close(losses["loss_cls"], expected)
    losses = ssd.detection_loss((logits, deltas), (labels, deltas), num_positive=torch.tensor(2.5))
    torch.testing.assert_close(losses["loss_cls"], expected)


def test_a_given_number_of_positives_takes_the_place_of_the_batch_s_own():
    logits, labels = random_case(positives=(5, 0, 2))
    deltas = torch.ones(3, 60, 4)
    outputs, targets = (logits, deltas), (labels, torch.zeros(3, 60, 4))
    own = ssd.detection_loss(outputs, targets)
    given = ssd.detection_loss(outputs, targets, num_positive=torch.tensor(10.5))
    for name, value in own.items():
        torch.testing.assert_close(given[name], value * 7 / 10.5)


@pytest.mark.parametrize("loss", ["focal", "multibox"])
def test_the_mean_over_processes_is_the_gradient_of_the_whole_batch(loss):
    logits, labels = random_case(images=4, positives=(9, 0, 3, 1))
    deltas = torch.randn(4, 60, 4, generator=torch.Generator().manual_seed(0))
    box_targets = torch.zeros(4, 60, 4)

    def gradients(rows, **options):
        leaves = logits.clone().requires_grad_(), deltas.clone().requires_grad_()
        outputs = tuple(leaf[rows] for leaf in leaves)
        targets = labels[rows], box_targets[rows]
        ssd.detection_loss(outputs, targets, loss=loss, **options)["loss"].backward()
        return [leaf.grad for leaf in leaves]

    whole = gradients([0, 1, 2, 3])
    mean = torch.tensor(13 / 2)  # of the two processes' positives
    parts = [gradients(rows, num_positive=mean) for rows in ([0, 2], [1, 3])]
    for expected, *shares in zip(whole, *parts, strict=True):
        torch.testing.assert_close(sum(shares) / 2, expected)


# -- Learning


def drawn_records(folder):
    """Return records of three images with a filled circle, a bright square, or both."""
    rng, records = np.random.default_rng(5), []
    scenes = [
        [(1, (40, 60, 140, 160))],
        [(2, (150, 90, 270, 210))],
        [(2, (20, 20, 110, 110)), (1, (150, 150, 280, 280))],
    ]
    for number, objects in enumerate(scenes):
        image = rng.integers(60, 100, (300, 300, 3)).astype(np.uint8)
        for label, (x1, y1, x2, y2) in objects:
            if label == 1:
                cv2.circle(image, ((x1 + x2) // 2, (y1 + y2) // 2), (x2 - x1) // 2, (220, 40, 40), -1)
            else:
                cv2.rectangle(image, (x1, y1), (x2 - 1, y2 - 1), (40, 60, 230), -1)
        path = folder / f"{number}.png"
        cv2.imwrite(str(path), image)
        labels = np.array([label for label, _ in objects])
        boxes_px = np.array([box for _, box in objects], np.float32)
        difficult = np.zeros(len(labels), bool)
        records.append(ssd.Record(str(number), str(path), 300, 300, boxes_px, labels, difficult))
    return records


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["focal", "multibox"])
def test_a_narrow_network_learns_a_few_images_by_heart(tmp_path, loss):
    dataset = ssd.VocDataset(drawn_records(tmp_path), ssd.build_transform(train=False), ANCHORS)
    loader = ssd.make_loader(dataset, batch_size=3)
    torch.manual_seed(0)
    model = ssd.SSD300(2, width=0.125, batch_norm="all", prior_prob=0.01 if loss == "focal" else None)
    assert ssd.measure(model, loader)["map_area"] < 0.5  # else learning would prove nothing
    batch = next(iter(loader))
    targets = ssd.build_targets(batch, ANCHORS)
    steps = 40
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        losses = ssd.detection_loss(model(batch["images"]), targets, loss=loss)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        schedule.step()
    result = ssd.measure(model, loader)
    assert result["map_area"] > 0.95
    assert result["map11"] > 0.95
