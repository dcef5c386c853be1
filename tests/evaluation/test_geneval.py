"""GenEval's rules, colours, options and summary: the published evaluation's answers, and each rule by hand."""

import json

import numpy as np
import pytest
import torch
from helpers.geneval_models import save_tiny_clip
from helpers.paths import GOLDENS
from PIL import Image

from tim.evaluation.clip import load_clip
from tim.evaluation.geneval.detection import COCO_CLASSES, Detections
from tim.evaluation.geneval.rules import (
    COLORS,
    Instance,
    Options,
    check_metadata,
    details,
    judge,
    keep_objects,
    parse_options,
    relations,
)
from tim.evaluation.geneval.run import ColorClassifier, cut_out
from tim.evaluation.geneval.summary import read_results, result_line, summarize, summary_text, write_results

CASES = json.loads((GOLDENS / "geneval_cases.json").read_text())["cases"]
CPU = torch.device("cpu")


def detections(found: dict[str, list]) -> Detections:
    """Detections without masks from rows [x1, y1, x2, y2, score] by class."""
    labels = [COCO_CLASSES.index(name) for name, rows in found.items() for _ in rows]
    rows = np.array([row for rows in found.values() for row in rows], dtype=np.float32).reshape(-1, 5)
    return Detections(np.array(labels, dtype=int), rows[:, :4], rows[:, 4], None)


def run_case(case: dict) -> tuple[bool, str, dict]:
    """(correct, reason, details) with the colours answered in the recorded order."""
    answers = {name: iter(calls) for name, calls in case["colors"].items()}
    objects = keep_objects(detections(case["detections"]), Options(), case["metadata"]["tag"])
    reasons = judge(case["metadata"], objects, lambda name, group: next(answers[name]))
    return not reasons, "\n".join(reasons), details(objects)


def test_every_golden_case_is_judged_alike():
    for case in CASES:
        check_metadata(case["metadata"], "golden")
        correct, reason, kept = run_case(case)
        assert (correct, reason) == (case["correct"], case["reason"])
        assert list(kept.items()) == list(case["details"].items())  # the order of classes counts too


def test_results_and_summary_are_the_golden_files_byte_for_byte(tmp_path):
    golden = GOLDENS / "geneval_cases.results.jsonl"
    filenames = [json.loads(line)["filename"] for line in golden.read_text().splitlines()]
    records = []
    for case, filename in zip(CASES, filenames, strict=True):
        correct, reason, kept = run_case(case)
        metadata = case["metadata"]
        records.append(
            {"filename": filename, "tag": metadata["tag"], "prompt": metadata["prompt"], "correct": correct,
             "reason": reason, "metadata": metadata, "details": kept, "seconds": 1.0}
        )  # fmt: skip
    write_results(tmp_path / "out" / "results.jsonl", records)
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == golden.read_bytes()
    text = (GOLDENS / "geneval_cases.summary.txt").read_text()
    assert summary_text(summarize(read_results(golden))) + "\n" == text


def test_a_prompt_is_correct_when_one_of_its_images_is():
    case = {"tag": "colors", "metadata": {"prompt": "a"}}
    other = {"tag": "position", "metadata": {"prompt": "b"}}
    scores = summarize([case | {"correct": True}, case | {"correct": False}, other | {"correct": False}])
    assert scores["correct_images"] == pytest.approx(1 / 3) and scores["correct_prompts"] == 0.5
    assert scores["tasks"]["colors"]["accuracy"] == 0.5 and scores["overall"] == 0.25


def test_result_lines_escape_what_is_not_ascii_and_slashes():
    record = {"filename": "a/b.png", "tag": "t", "prompt": "café 狐", "correct": True, "reason": "x\ny"}
    line = result_line(record | {"metadata": {"prompt": "café"}, "details": {}})
    assert line.isascii() and '"a\\/b.png"' in line and '"caf\\u00e9 \\u72d0"' in line and '"x\\ny"' in line
    assert json.loads(json.loads(line)["metadata"]) == {"prompt": "café"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no result"),
        ('{"tag": "a"}\n', "line 1 .*filename|line 1 .*metadata"),
        ("\n\n{oops\n", "line 3"),
        ('{"tag": "a", "correct": "yes", "metadata": "{}", "details": "{}"}', "line 1 .*`correct` must be true or false"),
        ("[" * 99999, "line 1 is no result of GenEval"),
    ],
)
def test_files_that_are_no_results_are_refused(tmp_path, text, message):
    path = tmp_path / "r.jsonl"
    with pytest.raises(FileNotFoundError, match="no result file"):
        read_results(path)
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_results(path)


A, B = [0, 0, 20, 10], [100, 0, 120, 10]  # two boxes of 20 x 10


@pytest.mark.parametrize(
    ("box", "target", "threshold", "expected"),
    [
        (A, B, 0.1, ["left of"]),
        (B, A, 0.1, ["right of"]),
        ([0, 100, 20, 110], A, 0.1, ["below"]),
        (A, [100, 100, 120, 110], 0.1, ["left of", "above"]),
        (A, A, 0.1, []),
        ([4, 0, 24, 10], A, 0.1, []),  # centres 4 apart: 0.1 x (20 + 20)
        ([9, 0, 29, 10], A, 0.1, ["right of"]),  # 9 apart, of which 5 count: more than half
        ([7, 0, 27, 10], A, 0.1, []),  # 7 apart, of which 3 count: less than half
        ([7, 0, 27, 10], A, 0.0, ["right of"]),
        (B, A, 3.0, []),
        ([100, 40, 120, 50], A, 0.1, ["right of"]),  # mostly to the right
    ],
)
def test_relations(box, target, threshold, expected):
    assert relations(np.array(box), np.array(target), threshold) == expected


def reasons(metadata, found, options=None, colors=None):
    options = options or Options()
    objects = keep_objects(detections(found), options, metadata.get("tag", "any"))
    return judge(metadata, objects, lambda name, group: colors[: len(group)], options.position_threshold)


def test_a_count_above_is_wrong_only_where_the_prompt_excludes_it():
    three = {"clock": [[*A, 0.95], [*B, 0.95], [0, 50, 20, 60, 0.95]]}
    include = [{"class": "clock", "count": 2}]
    assert reasons({"include": include}, three) == []
    assert reasons({"include": include, "exclude": [{"class": "clock", "count": 3}]}, three) == ["expected clock<3, found 3"]
    assert reasons({"include": [{"class": "clock", "count": 4}]}, three) == ["expected clock>=4, found 3"]
    assert reasons({"include": include}, {}) == ["expected clock>=2, found 0"]


def test_counting_has_a_threshold_of_its_own_and_scores_must_be_above_it():
    found = {"clock": [[*A, 0.9], [*B, 0.91]]}
    clause = {"include": [{"class": "clock", "count": 2}]}
    assert reasons(clause | {"tag": "two_object"}, found) == []
    assert reasons(clause | {"tag": "counting"}, found) == ["expected clock>=2, found 1"]
    assert reasons(clause | {"tag": "counting"}, found, Options(counting_threshold=0.8)) == []
    assert reasons(clause | {"tag": "two_object"}, found, Options(threshold=0.905)) == ["expected clock>=2, found 1"]


def test_a_class_keeps_its_best_objects_alone():
    rows = [[k, 0, k + 5, 5, 0.5 + k / 100] for k in range(20)]
    objects = keep_objects(detections({"bench": rows, "cow": rows[:2]}), Options(), "colors")
    assert [o.box[0] for o in objects["bench"]] == list(range(19, 3, -1)) and len(objects["cow"]) == 2
    assert len(keep_objects(detections({"bench": rows}), Options(max_objects=3), "colors")["bench"]) == 3


def test_overlapping_objects_of_a_class_are_dropped_below_max_overlap_one():
    half = [10, 0, 30, 10]  # shares a third of the union with A
    found = detections({"bench": [[*A, 0.8], [*half, 0.9], [*B, 0.5]], "cow": [[*A, 0.7]]})
    everything = keep_objects(found, Options(), "colors")
    assert len(everything["bench"]) == 3
    kept = keep_objects(found, Options(max_overlap=0.3), "colors")
    assert [o.score for o in kept["bench"]] == pytest.approx([0.9, 0.5]) and len(kept["cow"]) == 1
    assert len(keep_objects(found, Options(max_overlap=0.4), "colors")["bench"]) == 3


def test_overlap_is_of_whole_pixels_and_reaching_it_is_enough():
    """Boxes of sides 19 + 1 and 9 + 1: 100 of 300 pixels are shared, as (x2 - x1 + 1)(y2 - y1 + 1) counts them."""
    found = detections({"bench": [[0, 0, 19, 9, 0.9], [10, 0, 29, 9, 0.8]]})
    for overlap, left in ((1 / 3, 1), (0.3334, 2), (0.0, 1), (1.0, 2)):
        assert len(keep_objects(found, Options(max_overlap=overlap), "colors")["bench"]) == left, overlap
    apart = detections({"bench": [[0, 0, 19, 9, 0.9], [100, 0, 119, 9, 0.8]]})
    assert len(keep_objects(apart, Options(max_overlap=0.0), "colors")["bench"]) == 1, "none reaches at least 0, as originally"


def test_position_holds_for_the_best_objects_to_the_best_targets():
    metadata = {"include": [{"class": "cow", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]}
    assert reasons(metadata, {"cow": [[*B, 0.9]], "dog": [[*A, 0.9], [200, 0, 220, 10, 0.8]]}) == []
    wrong = reasons(metadata, {"cow": [[*B, 0.9]], "dog": [[*A, 0.8], [200, 0, 220, 10, 0.9]]})
    assert wrong == ["expected dog left of target, found right of target"]
    alone = reasons(metadata, {"dog": [[*A, 0.9]]})
    assert alone == ["expected cow>=1, found 0", "no target for dog to be left of"]


def test_colors_are_counted_among_the_best_objects():
    metadata = {"include": [{"class": "cow", "count": 2, "color": "red"}]}
    found = {"cow": [[*A, 0.9], [*B, 0.8], [0, 50, 20, 60, 0.7]]}
    assert reasons(metadata, found, colors=["red", "red"]) == []
    assert reasons(metadata, found, colors=["blue", "red"]) == ["expected red cow>=2, found 1 red; and 1 red, 1 blue"]
    assert reasons(metadata, found, colors=["white", "pink"]) == ["expected red cow>=2, found 0 red; and 1 pink, 1 white"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class": "clok"}, r"include\[0\] has the unknown class 'clok'; did you mean 'clock'"),
        ({"count": 0}, "count 0"),
        ({"color": "redd"}, "did you mean 'red'"),
        ({"position": ["left", 0]}, "unknown relation 'left'; did you mean 'left of'"),
        ({"position": ["left of", 0]}, "relative to clause 0; only 0 clauses"),
        ({"position": "left of"}, "number of an earlier clause"),
    ],
)
def test_prompts_that_cannot_be_judged_are_refused(change, message):
    clause = {"class": "clock", "count": 1}
    check_metadata({"tag": "a", "prompt": "b", "include": [clause]}, "here")
    with pytest.raises(ValueError, match=f"here: .*{message}"):
        check_metadata({"tag": "a", "prompt": "b", "include": [clause | change]}, "here")


def test_options_are_parsed():
    assert parse_options([]) == Options()
    words = ["threshold=0.5", "max_objects=4", "crop=0", "bgcolor=original", "clip_model=some/folder=x"]
    expected = Options(threshold=0.5, max_objects=4, crop=0, bgcolor="original", clip_model="some/folder=x")
    assert parse_options(words) == expected


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("treshold=0.5", "no 'treshold'; did you mean 'threshold'"),
        ("threshold", "write key=value"),
        ("threshold=high", "a number is expected"),
        ("threshold=1.5", "nearest valid value is 1$"),
        ("max_objects=2.5", "a whole number"),
        ("max_objects=0", "nearest valid value is 1$"),
        ("max_overlap=nan", "out of range"),
        ("crop=2", "nearest valid value is 1$"),
        ("bgcolor=origin", "did you mean 'original'"),
        ("bgcolor=##", "give #rgb"),
        ("clip_model=", "is empty"),
    ],
)
def test_unknown_options_name_the_nearest_valid_one(word, message):
    with pytest.raises(ValueError, match=message):
        parse_options([word])


def test_objects_are_cut_out_of_their_background():
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    image, mask = Image.fromarray(pixels), np.zeros((30, 40), dtype=bool)
    mask[10:15, 5:25] = True
    box = np.array([4.6, 8, 25.4, 20], dtype=np.float32)
    view = np.asarray(cut_out(image, Instance(box, 1.0, mask)))
    expected = np.where(mask[..., None], pixels, 0x99)
    assert (view == expected[8:20, 5:25]).all()
    assert (np.asarray(cut_out(image, Instance(box, 1.0, mask), crop=False)) == expected).all()
    assert (np.asarray(cut_out(image, Instance(box, 1.0, mask), bgcolor="original")) == pixels[8:20, 5:25]).all()
    without = Instance(box, 1.0)
    assert (np.asarray(cut_out(image, without)) == pixels[8:20, 5:25]).all()
    assert (np.asarray(cut_out(image, without, crop=False))[:8] == 0x99).all()
    assert cut_out(image, Instance(np.array([39.8, 31, 39.9, 50.0]), 1.0)).size == (1, 1)


RGB = dict(red="#f00", orange="#fa0", yellow="#ff0", green="#080", blue="#00f", purple="#808", pink="#fac", brown="#841",
           black="#000", white="#fff")  # fmt: skip


class Painter:
    """A CLIP whose space has one direction a colour; an image lies where the mean of what is not background is nearest."""

    def __init__(self):
        self.palette = torch.tensor([Image.new("RGB", (1, 1), RGB[c]).getpixel((0, 0)) for c in COLORS]).float()
        self.asked = []

    def crop(self, image):
        pixels = np.asarray(image).reshape(-1, 3)
        return torch.from_numpy(pixels[(pixels != 0x99).any(axis=1)].mean(axis=0)).float()

    def encode_images(self, means):
        return torch.eye(len(COLORS))[torch.cdist(means, self.palette).argmin(dim=1)]

    def encode_texts(self, texts):
        self.asked += texts
        return torch.eye(len(COLORS))[[k for text in texts for k, c in enumerate(COLORS) if f"a {c}" in text]]


def test_the_color_of_the_masked_object_is_read_once_a_class():
    classifier = ColorClassifier(Painter())
    image = Image.new("RGB", (40, 20), RGB["blue"])
    image.paste(RGB["brown"], (5, 5, 15, 15))
    image.paste(RGB["white"], (25, 5, 35, 15))
    masks = np.zeros((2, 20, 40), dtype=bool)
    masks[0, 5:15, 5:15] = masks[1, 5:15, 25:35] = True
    instances = [Instance(np.array([0, 0, 20, 20]), 1.0, masks[0]), Instance(np.array([20, 0, 40, 20]), 1.0, masks[1])]
    assert classifier(image, "hot dog", instances) == ["brown", "white"]
    assert classifier(image, "hot dog", instances[1:]) == ["white"]
    asked = classifier.clip.asked
    assert len(asked) == 30
    assert asked[:3] == ["a photo of a red hot dog", "a photo of a red-colored hot dog", "a photo of a red object"]


def photograph() -> tuple[Image.Image, list[Instance]]:
    from sklearn.datasets import load_sample_images

    image = Image.fromarray(load_sample_images().images[1])
    boxes = [[100, 50, 300, 200], [10, 10, 600, 400], [400, 100, 440, 400]]
    return image, [Instance(np.array(box, dtype=np.float32), 1.0) for box in boxes]


def test_transformers_clip_classifies_as_computed_by_hand(tmp_path):
    from torchvision.transforms import functional as T
    from transformers import AutoTokenizer
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    model = save_tiny_clip(tmp_path)
    clip = load_clip(str(tmp_path), CPU)
    image, instances = photograph()
    found = ColorClassifier(clip)(image, "fire hydrant", instances)
    assert list(clip.identity["weights_sha256"]) == ["model.safetensors"]

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)

    def direction(text):
        hidden = model.text_model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1]  # alone: no padding
        vector = model.text_projection(hidden)
        return vector / vector.norm()

    forms = ("a photo of a {} fire hydrant", "a photo of a {}-colored fire hydrant", "a photo of a {} object")
    weights = torch.stack([torch.stack([direction(f.format(c)) for f in forms]).mean(dim=0) for c in COLORS])
    weights = weights / weights.norm(dim=1, keepdim=True)
    assert torch.allclose(ColorClassifier(clip).weights("fire hydrant"), weights, atol=1e-5)
    expected = []
    for instance in instances:
        crop = image.crop(tuple(map(int, instance.box)))
        scale = 32 / min(crop.size)
        crop = crop.resize((int(crop.width * scale), int(crop.height * scale)), Image.Resampling.BICUBIC)
        pixels = T.normalize(T.to_tensor(T.center_crop(crop, [32, 32])), OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        vector = model.visual_projection(model.vision_model(pixels[None]).pooler_output)[0]
        expected.append(COLORS[(weights @ vector).argmax()])
    assert found == expected and len(set(found)) > 1


def test_open_clip_models_read_colors_too(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    tower = dict(layers=1, width=64)
    config = {
        "embed_dim": 12,
        "vision_cfg": {**tower, "image_size": 32, "patch_size": 8},
        "text_cfg": {**tower, "context_length": 20, "vocab_size": 49408, "heads": 2},
    }
    (tmp_path / "tiny-color.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-color.json")
    torch.manual_seed(0)
    torch.save(open_clip.create_model("tiny-color").state_dict(), tmp_path / "w.pt")
    clip = load_clip(f"open_clip:tiny-color:{tmp_path / 'w.pt'}", CPU)
    image, instances = photograph()
    found = ColorClassifier(clip)(image, "bench", instances)
    assert len(found) == 3 and set(found) <= set(COLORS) and len(clip.identity["weights_sha256"]) == 64
    with pytest.raises(ValueError, match="did you mean 'tiny-color'"):
        load_clip("open_clip:tiny-colour:openai", CPU)
    with pytest.raises(ValueError, match=r"'opnai' is no file and no weights .* did you mean 'openai'"):
        load_clip("open_clip:ViT-L-14:opnai", CPU)


def test_what_is_no_complete_clip_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no folder or hub id of a transformers CLIP .*open_clip:ViT-L-14:openai"):
        load_clip("ViT-L-14", CPU)
    save_tiny_clip(tmp_path)
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights, first: text_projection\.weight"):
        load_clip(str(tmp_path), CPU)
