"""GenEval's detector: mmdet's weights in transformers' network, its test pipeline, its instances."""

import hashlib
import json
import math

import numpy as np
import pytest
import torch
from helpers.networks import relative_error
from helpers.paths import GOLDENS
from PIL import Image
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment

from tim.evaluation.geneval.convert_mmdet import INDEX, convert_mmdet, mmdet_layout, relative_position_index
from tim.evaluation.geneval.detection import find_instances, mask_boxes
from tim.evaluation.geneval.mask2former import (
    Mask2FormerDetector,
    build_mask2former,
    prepare_image,
    resize_bilinear,
    swin_s_config,
)

GOLDEN = GOLDENS / "mask2former_swin_s"


def golden_layout():
    return json.loads((GOLDEN / "mmdet_state_dict.json").read_text())


def tiny_config():
    from transformers import Mask2FormerConfig, SwinConfig

    stages = [f"stage{i}" for i in range(1, 5)]
    swin = SwinConfig(embed_dim=8, depths=[1, 1, 2, 1], num_heads=[1, 1, 2, 2], window_size=7, out_features=stages)
    return Mask2FormerConfig(
        backbone_config=swin, num_queries=5, num_labels=80, feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=1, decoder_layers=3, num_attention_heads=4,
    )  # fmt: skip


def random_state(config, seed=0):
    """A state dict in mmdet's layout."""
    g = torch.Generator().manual_seed(seed)
    return {
        name: relative_position_index(7) if name.endswith(INDEX) else torch.randn(entry.shape, generator=g) * 0.1
        for name, entry in mmdet_layout(config).items()
    }


def golden_state():
    """The seeded weights of the golden, by the rule of its README."""
    seed = json.loads((GOLDEN / "meta.json").read_text())["seed"]
    state = {}
    for name, (shape, _, is_parameter) in golden_layout().items():
        if not is_parameter:
            state[name] = relative_position_index(7)
            continue
        digest = hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()
        a = np.random.default_rng(int(digest[:8], 16)).standard_normal(shape, dtype=np.float32)
        a = a / np.float32(math.sqrt(math.prod(shape[1:]))) if len(shape) > 1 else np.float32(0.1) * a
        state[name] = torch.from_numpy(a + (1 if len(shape) == 1 and name.endswith("weight") else 0))
    return state


@pytest.mark.slow
def test_golden():
    tensors = load_file(GOLDEN / "tensors.safetensors")
    model = build_mask2former(golden_state(), swin_s_config(), "golden")
    detector = Mask2FormerDetector(model, prepare_image, range(80), {"name": "golden"}, torch.device("cpu"))
    seen, features = [], []
    model.register_forward_hook(lambda *args: seen.append(args[-1]))
    model.model.pixel_level_module.encoder.register_forward_hook(lambda *args: features.append(args[-1].feature_maps))
    found = detector(Image.open(GOLDEN / "image.png"))
    for stage in (0, 3):
        assert relative_error(features[0][stage][0].mean((1, 2)), tensors[f"backbone_means_{stage}"]) < 1e-5
    masks = seen[0].masks_queries_logits[0]
    assert relative_error(seen[0].class_queries_logits[0], tensors["class_logits"]) < 1e-3
    assert relative_error(masks[:, ::8, ::8], tensors["mask_logits_stride8"]) < 1e-3
    assert relative_error(masks.mean((1, 2)), tensors["mask_logits_mean"]) < 1e-3
    expected, areas = tensors["detections"].numpy(), tensors["mask_areas"].numpy()
    label, boxes, scores = expected[:, 0], expected[:, 1:5], expected[:, 5]
    assert found.masks.shape == (100, 240, 320)
    # detections have no order of their own, and many here nearly share their score: pair them one to one
    box_error = np.abs(boxes[:, None] - found.boxes).max(-1)
    score_error = np.abs(scores[:, None] - found.scores) / scores.max()
    area_error = np.abs(areas[:, None] - found.masks.sum((1, 2)))
    pairs = linear_sum_assignment(box_error + 1e3 * score_error + area_error + 1e6 * (label[:, None] != found.labels))
    assert (label[pairs[0]] == found.labels[pairs[1]]).all()
    assert box_error[pairs].max() <= 1
    assert score_error[pairs].max() < 1e-3
    assert area_error[pairs].max() <= 1


def test_layout_is_mmdets():
    golden = golden_layout()
    assert {name: list(entry.shape) for name, entry in mmdet_layout(swin_s_config()).items()} == {
        name: shape for name, (shape, _, _) in golden.items()
    }


def test_each_tensor_goes_to_one_place_of_its_own():
    config = tiny_config()
    state = random_state(config)
    model = build_mask2former(state, config, "tiny")
    given = sorted(round(t.double().sum().item(), 4) for name, t in state.items() if not name.endswith(INDEX))
    unused = ("swin.layernorm.weight", "swin.layernorm.bias")
    taken = [p for name, p in model.named_parameters() if not name.endswith(unused)]
    assert sum(t.numel() for name, t in state.items() if not name.endswith(INDEX)) == sum(p.numel() for p in taken)
    assert math.isclose(sum(given), sum(p.double().sum().item() for p in taken), abs_tol=1e-2)
    targets = [target for entry in mmdet_layout(config).values() for target in entry.targets]
    assert len(set(targets)) == len(targets)


def test_merged_patches_are_reordered():
    """mmdet unfolds 2x2 patches to (channel, row, column), transformers stacks them as (column, row, channel)."""
    config = tiny_config()
    state = random_state(config)
    name = "backbone.stages.0.downsample.norm.weight"
    state[name] = torch.arange(32.0)
    converted = convert_mmdet(state, config, "tiny")["model.pixel_level_module.encoder.encoder.layers.0.downsample.norm.weight"]
    for column, row, channel in np.ndindex(2, 2, 8):
        assert converted[column * 16 + row * 8 + channel] == channel * 4 + row * 2 + column


def test_half_precision_weights_are_widened():
    config = tiny_config()
    state = {name: t.half() if t.is_floating_point() else t for name, t in random_state(config).items()}
    assert {p.dtype for p in build_mask2former(state, config, "tiny").parameters()} == {torch.float32}


def test_every_difference_is_named_at_once():
    config = tiny_config()
    state = random_state(config)
    del state["panoptic_head.query_feat.weight"]
    state["panoptic_head.cls_embeds.weight"] = state.pop("panoptic_head.cls_embed.weight")
    state["backbone.norm0.bias"] = torch.zeros(9)
    index = f"backbone.stages.2.blocks.1.attn.w_msa.{INDEX}"
    state[index] = state[index].T
    with pytest.raises(ValueError) as error:
        build_mask2former(state, config, "weights.pth")
    for part in (
        "weights.pth",
        "2 keys missing: ",
        "panoptic_head.query_feat.weight",
        "panoptic_head.cls_embed.weight",
        "1 unknown keys: panoptic_head.cls_embeds.weight",
        "backbone.norm0.bias (9,) instead of (8,)",
        f"1 window numbered otherwise: {index}",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("size", "shown", "padded"),
    [
        ((320, 240), (800, 1067), (800, 1088)),
        ((1024, 1024), (800, 800), (800, 800)),
        ((1000, 2500), (1333, 533), (1344, 544)),
        ((640, 427), (800, 1199), (800, 1216)),
    ],
)
def test_images_are_resized_then_filled_with_grey(size, shown, padded):
    pixels, unpadded = prepare_image(Image.new("RGB", size, (255, 0, 0)))
    assert unpadded == shown and pixels.shape == (1, 3, *padded)
    red, grey = ((np.array(c) - (123.675, 116.28, 103.53)) / (58.395, 57.12, 57.375) for c in ((255, 0, 0), (128,) * 3))
    inside = pixels[0, :, : shown[0], : shown[1]]
    assert torch.allclose(inside, torch.tensor(red).float().view(3, 1, 1).expand_as(inside), atol=1e-5)
    for border in (pixels[0, :, shown[0] :], pixels[0, :, :, shown[1] :]):
        assert torch.allclose(border, torch.tensor(grey).float().view(3, 1, 1).expand_as(border), atol=1e-5)


@pytest.mark.parametrize(
    "expected",  # cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR), OpenCV 4.10 and 5.0
    [
        [
            [95, 118, 158, 199, 217, 209, 222, 162, 15],
            [125, 100, 139, 206, 217, 183, 211, 191, 91],
            [154, 75, 114, 214, 218, 153, 192, 221, 188],
            [62, 59, 118, 201, 227, 192, 153, 146, 175],
            [30, 68, 106, 138, 169, 205, 137, 90, 122],
            [58, 100, 77, 25, 42, 194, 143, 54, 28],
            [129, 94, 59, 32, 15, 111, 103, 94, 133],
            [182, 87, 48, 47, 4, 47, 71, 128, 222],
        ],
        [[110, 203, 186, 135], [36, 190, 208, 135], [114, 39, 106, 125]],
    ],
)
def test_resizing_is_opencvs(expected):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7), dtype=np.uint8)[..., None]
    assert resize_bilinear(pixels, len(expected), len(expected[0]))[..., 0].tolist() == expected


def test_boxes_of_masks():
    masks = torch.zeros(3, 6, 8, dtype=torch.bool)
    masks[0, 2:5, 1:7] = True
    masks[1, 5, 7] = True
    assert mask_boxes(masks).tolist() == [[1, 2, 7, 5], [7, 5, 8, 6], [0, 0, 0, 0]]


def instances(class_logits, mask_logits, labels=(3, 7), size=(8, 16)):
    """Instances of an 8x16 image that the network sees at 4x8, padded to 8x8, with masks for each of its pixels."""
    return find_instances(torch.tensor(class_logits), mask_logits, (8, 8), (4, 8), size, labels)


def test_instances_by_hand():
    masks = torch.full((2, 8, 8), -4.0)
    masks[0, :, :4] = 4.0  # the left half, padding included
    masks[1, 4:] = 4.0  # padding alone
    found = instances([[2.0, 1.0, 0.0], [0.0, 3.0, 0.0]], masks)
    p = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 0.0]]).softmax(-1)
    assert found.labels.tolist()[:2] == [3, 7] and found.boxes[:2].tolist() == [[0, 0, 8, 8]] * 2
    assert found.masks.shape == (4, 8, 16) and found.masks.dtype == bool and found.boxes.dtype == np.float32
    assert found.masks[0][:, :8].all() and not found.masks[0][:, 8:].any()
    # columns 0 to 6 have logit 4; column 7 lies a quarter of the way to the right half
    quality = (7 * torch.sigmoid(torch.tensor(4.0)) + torch.sigmoid(torch.tensor(2.0))) / 8
    assert np.allclose(found.scores[:2], p[0, :2] * quality, atol=1e-5)
    assert found.scores[2:].tolist() == [0, 0] and not found.masks[2:].any() and not found.boxes[2:].any()


def test_the_best_hundred_pairs_of_query_and_class_remain():
    logits = torch.randn(60, 11)
    found = find_instances(logits, torch.ones(60, 2, 2), (8, 8), (8, 8), (8, 8), [*range(4), *[None] * 2, *range(4, 8)])
    assert len(found.labels) == 100 and set(found.labels) <= set(range(8))
    wanted = logits.softmax(-1)[:, [0, 1, 2, 3, 6, 7, 8, 9]].flatten().sort(descending=True).values[:100]
    assert np.allclose(found.scores, wanted * torch.sigmoid(torch.tensor(1.0)), atol=1e-5)


def test_masks_do_not_depend_on_their_neighbours():
    """Masks are resized a few at a time; all together give the same."""
    logits, masks = torch.randn(20, 3), torch.randn(20, 8, 8)
    found = instances(logits.tolist(), masks)
    for k in (0, 13, 19):
        one = instances(logits[k : k + 1].tolist(), masks[k : k + 1])
        rows = [i for i in range(40) if (found.masks[i] == one.masks[0]).all()]
        assert sorted(found.scores[rows].tolist(), reverse=True) == pytest.approx(one.scores.tolist(), abs=1e-6)
