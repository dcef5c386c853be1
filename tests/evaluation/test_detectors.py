"""Which detector a path names, mmdet's files, and detectors in transformers' format."""

import json
import shlex
import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch
from PIL import Image
from test_mask2former import random_state, tiny_config

from tim.evaluation.geneval import detectors
from tim.evaluation.geneval.detection import COCO_CLASSES, MAX_DETECTIONS
from tim.evaluation.geneval.detectors import load_detector
from tim.evaluation.geneval.mask2former import NAME
from tim.files import sha256

CPU = torch.device("cpu")
COCO_91 = {1: "person", 74: "mouse", 75: "remote", 76: "keyboard", 12: "N/A"}  # as DETR names some of its 91 classes


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))


@pytest.fixture
def strip():
    """Few pixels even when its longer side becomes 1333."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 120, 3), dtype=np.uint8))


@pytest.fixture
def tiny_network(monkeypatch):
    """mmdet's checkpoint, but of a small network."""
    monkeypatch.setattr(detectors, "swin_s_config", tiny_config)
    return random_state(tiny_config())


def save_mmdet(state, path, **meta):
    """As mmdet publishes checkpoints: the older file format, notes beside the weights."""
    meta = {"mmdet_version": "2.25.0", "CLASSES": ("person",), "PALETTE": [(220, 20, 60)], "epoch": 50, **meta}
    checkpoint = {"meta": meta, "state_dict": OrderedDict(state)}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=False)
    return path


def check(found, image, masks):
    """What every detector promises."""
    n = len(found.labels)
    assert 0 < n <= MAX_DETECTIONS and found.boxes.shape == (n, 4) and found.scores.shape == (n,)
    assert found.boxes.dtype == found.scores.dtype == np.float32
    assert ((found.labels >= 0) & (found.labels < 80)).all() and (np.diff(found.scores) <= 0).all()
    assert (found.boxes >= 0).all() and (found.boxes <= [image.width, image.height] * 2).all()
    if masks:
        assert found.masks.shape == (n, image.height, image.width) and found.masks.dtype == bool
    else:
        assert found.masks is None


def test_mmdets_checkpoint_from_its_folder_or_itself(tmp_path, tiny_network, strip):
    path = save_mmdet(tiny_network, tmp_path / f"{NAME}_20220504_001756-743b7d99.pth")
    found = []
    for model_path in (tmp_path, path):
        detector = load_detector(str(model_path), CPU)
        assert detector.name == detector.identity["name"] == f"{NAME} (mmdet weights)"
        assert detector.identity["weights_sha256"] == {path.name: sha256(path)}
        found.append(detector(strip))
        check(found[-1], strip, masks=True)
    assert np.array_equal(found[0].scores, found[1].scores)
    check(detector(strip.convert("L")), strip, masks=True)


def test_a_folder_that_leaves_a_choice_or_none(tmp_path, tiny_network):
    with pytest.raises(FileNotFoundError, match=rf"no {NAME}\.pth and no config\.json"):
        load_detector(str(tmp_path), CPU)
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        load_detector(str(tmp_path / "absent"), CPU)
    for date in ("a", "b"):
        save_mmdet(tiny_network, tmp_path / f"{NAME}_{date}.pth")
    with pytest.raises(ValueError, match=f"{NAME}_a.pth, {NAME}_b.pth"):
        load_detector(str(tmp_path), CPU)
    save_mmdet(tiny_network, tmp_path / f"{NAME}.pth")
    assert list(load_detector(str(tmp_path), CPU).identity["weights_sha256"]) == [f"{NAME}.pth"]


def test_another_networks_checkpoint_is_refused(tmp_path, tiny_network):
    tiny_network["bbox_head.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"1 unknown keys: bbox_head\.weight"):
        load_detector(str(save_mmdet(tiny_network, tmp_path / "other.pth")), CPU)


class Notes:
    """An object that nobody should have to unpickle."""


def test_notes_that_are_no_plain_data_are_refused_with_a_way_out(tmp_path, tiny_network, strip):
    path = save_mmdet(tiny_network, tmp_path / f"{NAME}.pth", hook=np.float64(0.5))
    with pytest.raises(ValueError, match=r"holds more than tensors.*if you trust the file") as error:
        load_detector(str(path), CPU)
    hint = shlex.split(str(error.value).partition("keep its tensors alone: ")[2])
    assert hint[:2] == ["python", "-c"]
    exec(hint[2])
    check(load_detector(str(tmp_path / f"{NAME}_tensors.pth"), CPU)(strip), strip, masks=True)


def test_a_hub_id_that_does_not_load_is_named():
    with pytest.raises(ValueError, match="--model-path nobody/detector is no detector"):
        load_detector("nobody/detector", CPU)


def test_mask2former_of_transformers(tmp_path, image):
    from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor

    config = tiny_config()
    config.id2label = {**dict(enumerate(COCO_CLASSES)), 0: "wall", 64: "mouse", 57: "sofa"}
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.bias[:-1] += torch.arange(80) == 64
        model.class_predictor.bias[0] += 5.0  # most of all it sees walls
    model.save_pretrained(tmp_path)
    Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 100}).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="does not know 1 of COCO's classes: person"):
        detector = load_detector(str(tmp_path), CPU)
    assert detector.name == tmp_path.name and "model.safetensors" in detector.identity["weights_sha256"]
    found = detector(image)
    check(found, image, masks=True)
    assert COCO_CLASSES[found.labels[0]] == "computer mouse" and "person" not in {COCO_CLASSES[k] for k in found.labels}


def save_detr(folder, id2label):
    from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessor, ResNetConfig

    config = DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        backbone_config=ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], out_features=["stage4"]),
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=120, id2label=id2label,
    )  # fmt: skip
    model = DetrForObjectDetection(config).eval()
    model.save_pretrained(folder)
    DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 100}).save_pretrained(folder)
    return model


def test_detr(tmp_path, image):
    names = {k: COCO_91.get(k, f"thing {k}") for k in range(91)}
    model = save_detr(tmp_path, names)
    with torch.no_grad():
        model.class_labels_classifier.bias[75] += 5
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="does not know 76 of COCO's classes: bicycle, "):
        detector = load_detector(str(tmp_path), CPU)
    found = detector(image)
    check(found, image, masks=False)
    assert len(found.labels) == 100 and {COCO_CLASSES[k] for k in found.labels} == {"tv remote"}


def test_a_detector_of_other_things_is_refused(tmp_path):
    save_detr(tmp_path, {0: "table", 1: "table rotated"})
    with pytest.raises(ValueError, match=r"none of COCO's classes; its own are table, table rotated"):
        load_detector(str(tmp_path), CPU)


def test_missing_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    save_detr(tmp_path, dict(enumerate(COCO_CLASSES)))
    state = load_file(tmp_path / "model.safetensors")
    del state["class_labels_classifier.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights, first: class_labels_classifier\.weight"):
        load_detector(str(tmp_path), CPU)


def test_a_model_that_detects_nothing_is_refused(tmp_path):
    from transformers import BertConfig

    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a bert is no Mask2Former, object detector"):
        load_detector(str(tmp_path), CPU)


def save_clip_tokenizer(folder):
    """A token a word of the queries; the end has the highest number, where OWL reads a query's feature."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizerFast

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=2000, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator(["a photo of a", *COCO_CLASSES], trainer)
    words = tokenizer.get_vocab()
    words |= {word: len(words) + k for k, word in enumerate(("<|startoftext|>", "<|endoftext|>"))}
    tokenizer.model.save(str(folder))
    (folder / "vocab.json").write_text(json.dumps(words))
    return CLIPTokenizerFast.from_pretrained(folder, model_max_length=16)


@pytest.mark.parametrize("kind", ["OwlViT", "Owlv2"])
def test_owl(tmp_path, image, kind):
    import transformers as hf

    tokenizer = save_clip_tokenizer(tmp_path)
    end = tokenizer.eos_token_id
    narrow = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = getattr(hf, f"{kind}Config")(
        text_config=dict(
            narrow,
            vocab_size=len(tokenizer),
            max_position_embeddings=16,
            bos_token_id=end - 1,
            eos_token_id=end,
            pad_token_id=end,
        ),
        vision_config=dict(narrow, image_size=64, patch_size=16),
        projection_dim=32,
    )
    model = getattr(hf, f"{kind}ForObjectDetection")(config).eval()
    model.save_pretrained(tmp_path)
    images = getattr(hf, f"{kind}ImageProcessor")(size={"height": 64, "width": 64})
    processor = getattr(hf, f"{kind}Processor")(images, tokenizer)
    processor.save_pretrained(tmp_path)
    detector = load_detector(str(tmp_path), CPU)
    found = detector(image)
    check(found, image, masks=False)
    queries = [f"a photo of a {name}" for name in COCO_CLASSES]
    with torch.no_grad():
        logits = model(**processor(text=[queries], images=image, return_tensors="pt")).logits[0]
    scores, labels = logits.sigmoid().max(-1)
    order = scores.argsort(descending=True)[: (scores > 0).sum()]  # a random network's scores may underflow
    assert np.allclose(found.scores, scores[order], atol=1e-5) and found.labels[0] == labels[order[0]]


def save_bert_tokenizer(folder, dot=1012):
    """Words of COCO's names, and the numbers that Grounding DINO expects of its special tokens."""
    from transformers import BertTokenizerFast

    vocabulary = [f"[unused{k}]" for k in range(1400)]
    for k, word in ((0, "[PAD]"), (100, "[UNK]"), (101, "[CLS]"), (102, "[SEP]"), (103, "[MASK]"), (dot, "."), (1029, "?")):
        vocabulary[k] = word
    words = sorted({word for name in COCO_CLASSES for word in name.split()})
    vocabulary[1100 : 1100 + len(words)] = words
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    return BertTokenizerFast.from_pretrained(folder)


def test_grounding_dino(tmp_path, image):
    import transformers as hf

    tokenizer = save_bert_tokenizer(tmp_path)
    text = hf.BertConfig(
        vocab_size=1400, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )  # fmt: skip
    swin = hf.SwinConfig(embed_dim=8, depths=[1, 1, 1], num_heads=[1, 1, 1], window_size=4, out_features=["stage2", "stage3"])
    config = hf.GroundingDinoConfig(
        backbone_config=swin, text_config=text, backbone=None, use_timm_backbone=False, use_pretrained_backbone=False,
        num_queries=20, encoder_layers=1, decoder_layers=2, d_model=32, encoder_ffn_dim=16, decoder_ffn_dim=16,
        encoder_attention_heads=2, decoder_attention_heads=2, num_feature_levels=2,
    )  # fmt: skip
    model = hf.GroundingDinoForObjectDetection(config).eval()
    model.save_pretrained(tmp_path)
    images = hf.GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 100})
    processor = hf.GroundingDinoProcessor(images, tokenizer)
    processor.save_pretrained(tmp_path)
    found = load_detector(str(tmp_path), CPU)(image)
    check(found, image, masks=False)
    inputs = processor(images=image, text=". ".join(COCO_CLASSES) + ".", return_tensors="pt")
    with torch.no_grad():
        out = model(**inputs)
    tokens = out.logits[0].sigmoid()
    ends = (inputs.input_ids[0] == 1012).nonzero().flatten().tolist()
    starts = [1, *(k + 1 for k in ends[:-1])]
    classes = torch.stack([tokens[:, a:b].mean(1) for a, b in zip(starts, ends, strict=True)], dim=1)
    scores, labels = classes.max(-1)
    order = scores.argsort(descending=True)
    assert np.allclose(found.scores, scores[order], atol=1e-5) and found.labels[0] == labels[order[0]]
    x, y, w, h = out.pred_boxes[0, order[0]].tolist()
    corners = [120 * (x - w / 2), 90 * (y - h / 2), 120 * (x + w / 2), 90 * (y + h / 2)]
    assert np.allclose(found.boxes[0], np.clip(corners, 0, [120, 90, 120, 90]), atol=1e-2)


def test_importing_loads_no_transformers():
    code = "import sys; from tim.evaluation.geneval import detectors; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
