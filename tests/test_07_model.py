import math

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import VGG16_BN_Weights, VGG16_Weights
from torchvision.models.detection import SSD300_VGG16_Weights

import ssd_object_detection as ssd

FEATURES = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)  # convolutions of VGG16


def narrow(num_classes=3, **kwargs):
    torch.manual_seed(0)
    return ssd.SSD300(num_classes, **{"width": 0.125, **kwargs})


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (2, 3, 300, 300), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def full():
    return ssd.SSD300(20)


def test_feature_maps_have_the_documented_sizes(images):
    with torch.no_grad():
        maps = narrow().feature_maps(images[:1].float())
    assert [tuple(m.shape[2:]) for m in maps] == [(n, n) for n in (37, 18, 18, 9, 5, 2)]
    # An eighth of 512, 512, 1024, 512, 256, 256.
    assert [m.shape[1] for m in maps] == [64, 64, 128, 64, 32, 32]


@pytest.mark.parametrize("batch_norm", ["none", "new", "all"])
@pytest.mark.parametrize("width", [0.125, 0.25])
def test_outputs_have_one_row_an_anchor_and_one_column_a_class(images, width, batch_norm):
    model = narrow(num_classes=4, width=width, batch_norm=batch_norm).eval()
    with torch.no_grad():
        cls_logits, box_deltas = model(images)
    assert cls_logits.shape == (2, 9966, 5)
    assert box_deltas.shape == (2, 9966, 4)
    assert cls_logits.dtype == box_deltas.dtype == torch.float32
    assert torch.isfinite(cls_logits).all()
    assert cls_logits.std() > 0
    has_norm = any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert has_norm == (batch_norm != "none")


def test_width_scales_channels_to_multiples_of_eight():
    for width, counts in (
        (0.25, (16, 32, 64, 128, 128)),
        (0.01, (8, 8, 8, 8, 8)),
        (0.3, (16, 40, 80, 152, 152)),
    ):  # 19.2, 38.4, 76.8, 153.6
        blocks = ssd.SSD300(1, width=width).blocks
        assert tuple(block[0].out_channels for block in blocks) == counts


def test_uint8_and_float_images_give_the_same(images):
    model = narrow().eval()
    with torch.no_grad():
        for a, b in zip(model(images), model(images.float()), strict=True):
            assert torch.equal(a, b)


def normalised(model, color):
    """What the first layer is given for an image of one colour, 0 to 255: three numbers."""
    seen = []
    handle = model.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(torch.tensor(color).view(1, 3, 1, 1).expand(1, 3, 300, 300))
    handle.remove()
    return seen[0][0, :, 7, 7].tolist()


def test_model_normalises_by_the_imagenet_statistics():
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.5 - 0.406) / 0.225]
    assert normalised(narrow(), [255.0, 0.0, 127.5]) == pytest.approx(expected, abs=1e-5)


def test_order_of_outputs_is_the_order_of_anchors(images):
    # A head that writes its own place into its output shows where each row comes from.
    model = narrow(num_classes=1)
    with torch.no_grad():
        for number, head in enumerate(model.box_heads):
            head.weight.zero_()
            head.bias.copy_(torch.arange(len(head.bias)) + 1000 * number)
        _, deltas = model(images[:1])
    first, second = deltas[0, :5476].view(37, 37, 4, 4), deltas[0, 5476:7420].view(18, 18, 6, 4)
    assert torch.equal(first[20, 3], torch.arange(16.0).view(4, 4))
    assert torch.equal(second[0, 17], 1000 + torch.arange(24.0).view(6, 4))
    assert deltas[0, -1].tolist() == [5012, 5013, 5014, 5015]


def test_an_exported_graph_takes_any_number_of_images(images):
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(narrow(width=0.01).eval(), (images,), dynamic_shapes=({0: batch},))
    cls_logits, box_deltas = exported.module()(torch.cat((images, images[:1])))
    assert len(cls_logits) == len(box_deltas) == 3


def test_a_spot_in_the_image_changes_only_the_cells_that_see_it():
    model = narrow().eval()
    plain = torch.full((1, 3, 300, 300), 120.0)
    spot = plain.clone()
    spot[:, :, 20:30, 250:260] = 255  # top right: row 3, column 31 of 37
    with torch.no_grad():
        change = (model(spot)[0] - model(plain)[0])[0, :5476].abs().sum(dim=1)
    rows, columns = change.view(37, 37, 4).sum(dim=2).nonzero(as_tuple=True)
    assert (3, 31) in zip(rows.tolist(), columns.tolist(), strict=True)
    # conv4_3 sees 92 pixels and the head's kernel two cells of 8 more: 54 to each side, and 5 of the spot.
    assert rows.max() <= 3 + 8
    assert columns.min() >= 31 - 8


def parameters_by_formula(num_classes):
    def conv(c_in, c_out, kernel):
        return c_in * c_out * kernel * kernel + c_out

    count, c_in = 512, 3  # 512: the scales of the L2 norm
    for c_out in FEATURES:
        count, c_in = count + conv(c_in, c_out, 3), c_out
    count += conv(512, 1024, 3) + conv(1024, 1024, 1)
    count += conv(1024, 256, 1) + conv(256, 512, 3)
    count += conv(512, 128, 1) + conv(128, 256, 3)
    count += conv(256, 128, 1) + conv(128, 256, 3)
    for c_in, anchors in zip((512, 512, 1024, 512, 256, 256), (4, 6, 6, 6, 4, 4), strict=True):
        count += conv(c_in, anchors * (num_classes + 1), 3) + conv(c_in, anchors * 4, 3)
    return count


def test_full_width_has_the_parameters_of_the_formula(full):
    assert sum(p.numel() for p in full.parameters()) == parameters_by_formula(20)


@pytest.mark.parametrize(("batch_norm", "left_out"), [("all", 0), ("new", 13), ("none", 21)])
def test_batch_norm_follows_every_convolution_but_the_heads_or_all_after_vgg_s(batch_norm, left_out):
    model = narrow(batch_norm=batch_norm)
    heads = {*model.cls_heads, *model.box_heads}
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m not in heads][left_out:]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(convs) == 13 + 2 + 6 - left_out
    assert [n.num_features for n in norms] == [c.out_channels for c in convs]


@pytest.mark.parametrize("num_classes", [1, 3, 20])
@pytest.mark.parametrize("prior_prob", [0.01, 0.2])
def test_prior_sets_the_first_foreground_probability(images, num_classes, prior_prob):
    model = narrow(num_classes=num_classes, prior_prob=prior_prob).eval()
    with torch.no_grad():
        for head in model.cls_heads:  # the weights only add noise around what the biases say
            head.weight.mul_(0.05)
        probability = model(images)[0].softmax(dim=-1)[..., 1:]
    assert probability.sum(dim=-1).mean().item() == pytest.approx(prior_prob, rel=0.15)
    # and spreads it evenly over the classes
    share = prior_prob / num_classes
    assert probability.mean(dim=(0, 1)).tolist() == pytest.approx([share] * num_classes, rel=0.3)


def test_without_prior_biases_are_zero():
    assert all((h.bias == 0).all() for h in narrow(prior_prob=None).cls_heads)


def test_given_anchor_sizes_shape_anchors_and_heads():
    sizes = ([(0.05, 0.09)], *ssd.ANCHOR_SIZES[1:])
    model = narrow(anchor_sizes=sizes)
    assert torch.equal(model.anchors, ssd.make_anchors(sizes))
    cls_logits, box_deltas = model(torch.zeros(2, 3, 300, 300, dtype=torch.uint8))
    assert cls_logits.shape[:2] == box_deltas.shape[:2] == (2, 9966 - 3 * 37 * 37)


def test_anchors_are_those_of_make_anchors():
    assert torch.equal(narrow().anchors, ssd.make_anchors())


def test_frozen_blocks_stay_and_the_rest_learns(images):
    model = narrow(batch_norm="all").freeze_blocks(2).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    cls_logits, box_deltas = model(images)
    (cls_logits.square().mean() + box_deltas.square().mean()).backward()
    assert all(p.grad is None for p in model.blocks[:2].parameters())
    optimizer.step()
    after = model.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert not any(k.startswith(("blocks.0.", "blocks.1.")) for k in changed)
    for part in (
        "blocks.2.0.weight",
        "blocks.2.1.running_mean",
        "blocks.4.1.running_var",
        "fc.0.weight",
        "extras.2.0.weight",
        "cls_heads.5.bias",
        "box_heads.0.weight",
        "l2_norm.weight",
    ):
        assert part in changed


def test_frozen_blocks_stay_in_evaluation_mode_when_training_goes_on():
    model = narrow(batch_norm="all").freeze_blocks(3)
    model.eval()
    model.train()
    modes = [m.training for b in model.blocks for m in b.modules() if isinstance(m, nn.BatchNorm2d)]
    assert modes == [False] * 7 + [True] * 6
    assert model.fc.training


@pytest.mark.parametrize(
    "shape", [(1, 3, 299, 300), (1, 3, 512, 512), (1, 1, 300, 300), (3, 300, 300), (1, 300, 300, 3)]
)
def test_images_of_another_shape_are_a_value_error(shape):
    with pytest.raises(ValueError, match="300"):
        narrow()(torch.zeros(shape))


def test_l2_norm_divides_by_the_length_and_scales_by_channel():
    norm = ssd.L2Norm(2)
    x = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1).expand(1, 2, 2, 3)  # length 5
    torch.testing.assert_close(norm(x), torch.tensor([12.0, 16.0]).view(1, 2, 1, 1).expand(1, 2, 2, 3))
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 10.0]))
    torch.testing.assert_close(norm(x)[0, :, 1, 2], torch.tensor([0.6, 8.0]))
    assert torch.isfinite(norm(torch.zeros(1, 2, 1, 1))).all()


def test_l2_norm_survives_half_precision():
    # The sum of squares, 200 ** 2 * 512, is far beyond the largest float16.
    out = ssd.L2Norm(512)(torch.full((1, 512, 1, 1), 200.0, dtype=torch.float16))
    assert out.dtype == torch.float16
    expected = torch.full((1, 512, 1, 1), 20 / math.sqrt(512))
    torch.testing.assert_close(out.float(), expected, rtol=2e-3, atol=0)


# -- ImageNet weights

CLASSIFIER = ("classifier.0.weight", "classifier.0.bias", "classifier.3.weight", "classifier.3.bias")


def vgg16_features(model, *, batch_norm=False):
    """Random weights of the shapes of a network's blocks, named as torchvision's vgg16 names its own."""
    make = torchvision.models.vgg16_bn if batch_norm else torchvision.models.vgg16
    with torch.device("meta"):
        names = make().features.state_dict(prefix="features.")
    state = {}
    for name, own in zip(names, model.blocks.state_dict().values(), strict=True):
        values = torch.rand(own.shape[:1]).view(-1, *[1] * (own.ndim - 1)) if own.ndim else torch.tensor(9)
        state[name] = values.expand(own.shape)  # takes no memory
    return state


@pytest.fixture(scope="session")
def vgg16_file(tmp_path_factory):
    """A file of complete float16 weights as torchvision's vgg16 has them.

    Of fc6 the element (o, i) is (7 o + i) % 2048, of fc7 (3 o + i) % 2048: overlapping strides, no memory.
    """

    def rolled(step, rows, columns):
        return (torch.arange(step * rows + columns) % 2048).half().as_strided((rows, columns), (step, 1))

    state = {name: value.half() for name, value in vgg16_features(ssd.SSD300(1)).items()}
    biases = torch.arange(4096.0).half() / 4096
    layers = (rolled(7, 4096, 25088), biases, rolled(3, 4096, 4096), -biases)
    state |= dict(zip(CLASSIFIER, layers, strict=True))
    state["classifier.6.weight"] = torch.zeros(1, 1).expand(1000, 4096)
    state["classifier.6.bias"] = torch.zeros(1000)
    with torch.device("meta"):
        theirs = torchvision.models.vgg16().state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in theirs.items()}
    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    torch.save(state, path)
    return path


def test_load_backbone_copies_convolutions_and_decimates_the_rest(full, vgg16_file):
    state = ssd.fetch_backbone(vgg16_file)
    heads = [head.weight.clone() for head in full.cls_heads]
    ssd.load_backbone(full, state)
    given = [v.float() for k, v in state.items() if k.startswith("features.")]
    own = list(full.blocks.state_dict().values())
    assert len(given) == len(own) == 26
    assert all(torch.equal(a, b) for a, b in zip(own, given, strict=True))

    fc6, fc7 = (m for m in full.fc if isinstance(m, nn.Conv2d))
    assert fc6.weight.shape == (1024, 512, 3, 3)
    places = ((0, 0, 0, 0), (1, 0, 0, 0), (1023, 511, 2, 2), (5, 17, 1, 2), (6, 100, 2, 0))
    for out, channel, row, column in places:
        place = channel * 49 + 3 * row * 7 + 3 * column  # rows and columns 0, 3, 6 of 7
        assert fc6.weight[out, channel, row, column].item() == (7 * 4 * out + place) % 2048
    assert torch.equal(fc6.bias, state["classifier.0.bias"][::4].float())
    assert fc7.weight.shape == (1024, 1024, 1, 1)
    for out, channel in ((0, 0), (1, 0), (0, 1), (1023, 1023), (9, 500)):
        assert fc7.weight[out, channel, 0, 0].item() == (3 * 4 * out + 4 * channel) % 2048
    assert torch.equal(fc7.bias, state["classifier.3.bias"][::4].float())
    assert all(torch.equal(h.weight, before) for h, before in zip(full.cls_heads, heads, strict=True))
    assert {p.dtype for p in full.parameters()} == {torch.float32}
    # torchvision's own training saw images normalised as the network does by itself.
    transforms = VGG16_Weights.IMAGENET1K_V1.transforms()
    assert full.mean.flatten().tolist() == pytest.approx([255 * v for v in transforms.mean])
    assert full.std.flatten().tolist() == pytest.approx([255 * v for v in transforms.std])


def weights_in(state):
    """A state dict without the counters of batch norm."""
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


SHAPES = ((4096, 25088), (4096,), (4096, 4096), (4096,))
NAN_CLASSIFIER = {
    name: torch.tensor(math.nan).expand(shape) for name, shape in zip(CLASSIFIER, SHAPES, strict=True)
}


def test_weights_with_batch_norm_but_no_classifier_keep_the_normalisation():
    model = narrow(batch_norm="all")
    before = model.mean.clone()
    ssd.load_backbone(model, vgg16_features(model, batch_norm=True))
    assert torch.equal(model.mean, before)


@pytest.mark.parametrize("classifier", [{}, NAN_CLASSIFIER])
def test_weights_without_a_classifier_leave_the_rest_and_switch_the_normalisation(classifier):
    model = narrow()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = vgg16_features(model)
    ssd.load_backbone(model, state | classifier)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
    given = weights_in(state)
    own = weights_in(model.blocks.state_dict())
    assert len(own) == 26
    assert changed == {f"blocks.{name}" for name in own} | {"mean", "std"}
    for a, b in zip(own.values(), given.values(), strict=True):
        assert torch.equal(a, b / ssd.CAFFE_SCALE if b.ndim == 1 else b)
    # The authors' network saw 0 to 255 with their training set's mean colour subtracted.
    expected = [(255 - 123.68) / 6, (0 - 116.779) / 6, (127.5 - 103.939) / 6]
    assert normalised(model, [255.0, 0.0, 127.5]) == pytest.approx(expected, abs=1e-3)
    transforms = VGG16_Weights.IMAGENET1K_FEATURES.transforms()  # its mean is rounded to whole steps of 255
    assert model.mean.flatten().tolist() == pytest.approx([255 * v for v in transforms.mean], abs=0.7)
    assert model.std.flatten().tolist() == pytest.approx([6 * 255 * v for v in transforms.std])


def test_the_features_of_weights_without_a_classifier_are_those_of_their_network_scaled():
    model, plain = narrow(), narrow()
    for name, value in plain.blocks.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(value, std=10.0)
    own = plain.blocks.state_dict().values()
    ssd.load_backbone(model, dict(zip(vgg16_features(model), own, strict=True)))
    images = 255 * torch.rand(2, 3, 300, 300)
    mean = torch.tensor([123.68, 116.779, 103.939]).view(3, 1, 1)
    with torch.no_grad():
        theirs = plain.feature_maps(images - mean)[1]
        ours = model.feature_maps((images - model.mean) / model.std)[1]
    assert float(theirs.std()) > 1
    assert torch.allclose(6 * ours, theirs, atol=1e-4 * float(theirs.max()))


def test_a_checkpoint_keeps_the_normalisation(tmp_path):
    model = narrow()
    ssd.load_backbone(model, vgg16_features(model))
    config = {"num_classes": 3, "width": 0.125, "batch_norm": "none", "anchor_sizes": ssd.ANCHOR_SIZES}
    content = {"model": model.state_dict(), "config": config, "classes": ["a", "b", "c"]}
    ssd.save_checkpoint(tmp_path / "a.pth", content)
    loaded = ssd.model_from_checkpoint(ssd.load_checkpoint(tmp_path / "a.pth"))
    assert loaded.mean.flatten().tolist() == pytest.approx([123.68, 116.779, 103.939])
    assert loaded.std.flatten().tolist() == pytest.approx([6, 6, 6])


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"features.0.weight": torch.zeros(8, 3, 5, 5)},
            "features.0.weight has the shape (8, 3, 5, 5), not (8, 3, 3, 3)",
        ),
        ({"features.30.weight": torch.zeros(8)}, "VGG16 has no features.30.weight"),
        ({"features.28.weight": None}, "features.28.weight (64, 64, 3, 3) is missing"),
        ({"features.2.bias": "no tensor"}, "features.2.bias (8,) is missing"),
    ],
)
def test_weights_of_another_network_are_refused_by_name_and_change_nothing(changes, problem):
    model = narrow()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ssd.InputError) as error:
        ssd.load_backbone(model, vgg16_features(model) | changes)
    assert str(error.value) == f"the backbone weights do not fit: {problem} (see --backbone-weights)"
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "content", [{}, {"model": torch.zeros(1)}, {1: torch.zeros(1)}, torch.zeros(3), [1, 2], "text"]
)
def test_a_backbone_file_of_something_else_is_an_input_error(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ssd.InputError) as error:
        ssd.load_backbone(narrow(), ssd.fetch_backbone(tmp_path / "a.pth"))
    assert "\n" not in str(error.value)


def test_a_classifier_of_another_shape_is_an_input_error():
    model = narrow()
    classifier = dict(zip(CLASSIFIER, [torch.zeros(8, 8), torch.zeros(8)] * 2, strict=True))
    with pytest.raises(ssd.InputError) as error:
        ssd.load_backbone(model, vgg16_features(model) | classifier)
    assert "\n" not in str(error.value)


def test_weights_with_batch_norm_and_those_of_full_width_fit_only_their_own_network(vgg16_file):
    model = narrow()
    for wrong in (vgg16_features(narrow(batch_norm="all"), batch_norm=True), ssd.fetch_backbone(vgg16_file)):
        with pytest.raises(ssd.InputError, match="do not fit"):
            ssd.load_backbone(model, wrong)


def convolutions(model):
    return [module for module in model.blocks.modules() if isinstance(module, nn.Conv2d)]


@pytest.fixture(scope="module")
def random_filters(full):
    """Weights as the Caffe network's, of random filters whose sizes differ."""
    generator = torch.Generator().manual_seed(5)
    state = vgg16_features(full)
    for name, value in state.items():
        if value.ndim == 4:
            sizes = 1 + torch.rand(len(value), 1, 1, 1, generator=generator)
            state[name] = 0.01 * torch.randn(value.shape, generator=generator) * sizes
    return state


@pytest.mark.parametrize("batch_norm", ["none", "new", "all"])
def test_a_narrow_network_starts_from_the_largest_filters(random_filters, batch_norm):
    model, before = narrow(batch_norm=batch_norm), narrow(batch_norm=batch_norm)
    ssd.load_narrow_backbone(model, random_filters)
    given = [value.numpy() for value in random_filters.values() if value.ndim == 4]
    kept = [0, 1, 2]
    for own, old, filters in zip(convolutions(model), convolutions(before), given, strict=True):
        order = sorted(range(len(filters)), key=lambda row: -float(np.square(filters[row]).sum()))
        channels, kept = kept, sorted(order[: own.out_channels])
        expected = np.stack([filters[row][channels] for row in kept])
        found = own.weight.detach().numpy()
        factor = found.std() / expected.std()
        np.testing.assert_allclose(found, expected * factor, rtol=1e-4, atol=1e-6)
        assert found.std(ddof=1) == pytest.approx(old.weight.std().item(), rel=1e-4)  # He's
        assert not own.bias.any()
    changed = {
        name
        for name, value in model.state_dict().items()
        if not torch.equal(before.state_dict()[name], value)
    }
    assert changed == {
        name
        for name, _ in model.named_parameters()
        if name.startswith("blocks.") and model.state_dict()[name].ndim == 4
    } | {"mean", "std"}
    expected = [(255 - 123.68) / 6, (0 - 116.779) / 6, (127.5 - 103.939) / 6]
    assert normalised(model.eval(), [255.0, 0.0, 127.5]) == pytest.approx(expected, abs=1e-3)


def test_a_narrow_network_starts_from_weights_with_a_classifier_too(vgg16_file):
    model = narrow()
    before = model.mean.clone()
    ssd.load_narrow_backbone(model, ssd.fetch_backbone(vgg16_file))
    assert torch.equal(model.mean, before)


def test_a_narrow_network_does_not_start_from_weights_of_another_network():
    model = narrow()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for wrong in (
        {},
        vgg16_features(model),
        vgg16_features(ssd.SSD300(1, batch_norm="all"), batch_norm=True),
    ):
        with pytest.raises(ssd.InputError, match="do not fit"):
            ssd.load_narrow_backbone(model, wrong)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("source", "batch_norm", "weights"),
    [
        ("caffe", False, VGG16_Weights.IMAGENET1K_FEATURES),
        ("imagenet", False, VGG16_Weights.IMAGENET1K_V1),
        ("caffe", True, VGG16_BN_Weights.IMAGENET1K_V1),
        ("imagenet", True, VGG16_BN_Weights.IMAGENET1K_V1),
        ("coco", False, SSD300_VGG16_Weights.COCO_V1),
    ],
)
def test_a_kind_of_backbone_weights_is_fetched_through_torchvision(monkeypatch, source, batch_norm, weights):
    def fetch(self, **options):
        assert options["check_hash"]
        return {"url": self.url}

    monkeypatch.setattr(VGG16_Weights, "get_state_dict", fetch)
    monkeypatch.setattr(VGG16_BN_Weights, "get_state_dict", fetch)
    monkeypatch.setattr(SSD300_VGG16_Weights, "get_state_dict", fetch)
    assert ssd.fetch_backbone(source, batch_norm=batch_norm) == {"url": weights.url}


# -- COCO weights


@pytest.fixture(scope="module")
def torchvision_ssd():
    """torchvision's SSD300 with random weights, biases and L2 scales."""
    torch.manual_seed(3)
    model = torchvision.models.detection.ssd300_vgg16(weights=None, weights_backbone=None).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(".bias"):
                value.normal_(std=0.5)
            elif name.endswith("scale_weight"):
                value.uniform_(5, 20)
            elif name.startswith("backbone"):
                nn.init.kaiming_normal_(value, nonlinearity="relu")
    return model


@torch.no_grad()
def test_a_coco_start_has_the_features_of_torchvision_s_network_scaled(torchvision_ssd):
    model = ssd.SSD300(3).eval()
    ssd.load_backbone(model, torchvision_ssd.state_dict())
    # 320 pixels, where rounding pooled sizes up or down is the same; and fc6 as it is there.
    images = 255 * torch.rand(1, 3, 320, 320)
    x = torchvision_ssd.transform.normalize(images[0] / 255)[None]
    theirs = list(torchvision_ssd.backbone(x).values())
    conv5_3 = torchvision_ssd.backbone.extra[0][:-1](torchvision_ssd.backbone.features(x))
    model.fc[0].dilation = model.fc[0].padding = (6, 6)
    model.fc.register_forward_pre_hook(lambda module, inputs: nn.functional.max_pool2d(inputs[0], 3, 1, 1))
    l2, own_conv5_3, fc7, *extras = model.feature_maps((images - model.mean) / model.std)

    def assert_scaled(own, other):
        assert float(other.std()) > 1
        torch.testing.assert_close(6 * own, other, rtol=1e-3, atol=1e-4 * float(other.max()))

    torch.testing.assert_close(l2, theirs[0], rtol=1e-3, atol=1e-4)  # whatever the scale before it
    assert_scaled(own_conv5_3, conv5_3)
    assert_scaled(fc7, theirs[1])
    assert_scaled(extras[0], theirs[2])
    assert_scaled(extras[1], theirs[3])
    assert_scaled(extras[2], theirs[4][:, :, ::2, ::2])  # it has stride 1 there


def test_a_coco_start_leaves_the_heads_and_fits_one_network_alone(torchvision_ssd, tmp_path):
    state = {name: value.half() for name, value in torchvision_ssd.state_dict().items()}
    torch.save(state, tmp_path / "coco.pth")
    model = ssd.SSD300(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for content, problem in (
        (state | {"backbone.extra.0.7.3.bias": torch.zeros(9)}, r"extra\.0\.7\.3\.bias has the shape \(9,\)"),
        ({name: value for name, value in state.items() if ".extra.2" not in name}, r"extra\.2\.0.* missing"),
    ):
        with pytest.raises(ssd.InputError, match=problem):
            ssd.load_backbone(model, content)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    ssd.load_backbone(model, ssd.fetch_backbone(tmp_path / "coco.pth"))
    same = {name for name, value in model.state_dict().items() if torch.equal(before[name], value)}
    heads = {name for name in before if "_heads." in name}
    assert same == heads | {"anchors"}
    with pytest.raises(ssd.InputError, match="need --width 1"):
        ssd.load_narrow_backbone(narrow(), state)
    for batch_norm in ("new", "all"):
        with pytest.raises(ssd.InputError, match="need --batch-norm none"):
            ssd.load_backbone(narrow(batch_norm=batch_norm), state)


def test_coco_s_weights_have_the_names_and_normalisation_that_are_expected(torchvision_ssd):
    assert ssd.COCO_KEY in torchvision_ssd.state_dict()
    assert tuple(torchvision_ssd.transform.image_mean) == ssd.COCO_MEAN
    assert torchvision_ssd.transform.image_std == pytest.approx([1 / 255] * 3)


def test_a_backbone_file_that_cannot_be_read_is_an_input_error(tmp_path):
    (tmp_path / "text.pth").write_text("no tensors here")
    (tmp_path / "empty.pth").touch()
    for name in ("text.pth", "empty.pth", "absent.pth"):
        with pytest.raises(ssd.InputError) as error:
            ssd.fetch_backbone(tmp_path / name)
        assert name in str(error.value)
        assert "\n" not in str(error.value)
