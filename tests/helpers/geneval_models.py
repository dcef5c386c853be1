"""Small random models of GenEval's evaluation: CLIP and the detector, and images for them to look at."""

import json

import torch
from PIL import Image

from tim.evaluation.geneval.detection import COCO_CLASSES


def save_tiny_clip(folder):
    """A random CLIPModel with tokenizer (the end has the highest id) and image processor, in the transformers format."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: k for k, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.add_special_tokens(["<start>", "<end>"])
    start, end = len(letters), len(letters) + 1
    tokenizer.post_processor = processors.TemplateProcessing("<start> $A <end>", None, [("<start>", start), ("<end>", end)])
    special = dict(bos_token="<start>", eos_token="<end>", pad_token="<end>", model_max_length=77)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    text, vision = dict(**shape, vocab_size=end + 1, eos_token_id=2), dict(**shape, image_size=32, patch_size=8)
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()
    model.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return model


def save_tiny_detector(folder):
    """A random Mask2Former (Swin) that takes about everything for a bench, in the transformers format."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor, SwinConfig

    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=32, num_queries=6,
        id2label=dict(enumerate(COCO_CLASSES)),
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():
        model.class_predictor.bias[COCO_CLASSES.index("bench")] += 9
    model.save_pretrained(folder)
    Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}, size_divisor=32).save_pretrained(folder)


CLAUSES = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}]},
    {"tag": "color_attr", "include": [{"class": "bench", "count": 1, "color": "red"}, {"class": "cow", "count": 1}]},
    {"tag": "counting", "include": [{"class": "bench", "count": 2}], "exclude": [{"class": "bench", "count": 3}]},
]


def save_samples(folder, clauses=CLAUSES, images=2):
    """Crops of a photograph in the layout of sample_t2i_geneval_ddp.py."""
    from sklearn.datasets import load_sample_images

    picture = Image.fromarray(load_sample_images().images[0])
    for i, clause in enumerate(clauses):
        (folder / f"{i:05d}" / "samples").mkdir(parents=True)
        (folder / f"{i:05d}" / "metadata.jsonl").write_text(json.dumps({**clause, "prompt": f"prompt {i}"}) + "\n")
        picture.resize((8, 8)).save(folder / f"{i:05d}" / "grid.png")
        for j in range(images):
            left, top = 150 * i, 100 * j
            crop = picture.crop((left, top, left + 320, top + 240)).resize((64, 48))
            crop.save(folder / f"{i:05d}" / "samples" / f"{j:05d}.png")
