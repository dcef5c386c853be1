"""DPG-Bench's parts: questions, scores, grids and judges."""

import hashlib
import json
import sys
import types

import pytest
import torch
from helpers.dpg_models import QUESTIONS, picture, save_blip, save_llava, save_vilt
from helpers.paths import GOLDENS

from tim.evaluation.dpg.judges import load_judge, normalise
from tim.evaluation.dpg.run import Grid, check_grids, cut_grid, grid_of
from tim.evaluation.dpg.scoring import Question, read_answers, read_questions, score_answers, score_crop

HEAD = "item_id,proposition_id,dependency,tuple,question_natural_language\nskipped,1,0,a - b (x),really?\n"
CPU = torch.device("cpu")


def questions_of(text, tmp_path):
    path = tmp_path / "q.csv"
    path.write_text(HEAD + text, encoding="utf-8")
    return read_questions(path)


def asked(number, *parents, category="entity - whole"):
    return Question(number, f"question {number}?", parents, category)


def test_a_question_carries_what_scoring_needs(tmp_path):
    found = questions_of('a,1,0,global (style),Is it old?\nb,2,"1, 1","attribute - color (cat, red)",Is\xa0it "red"?\n'
                         'b,1,0,relation - non-spatial (x),Well?\n', tmp_path)  # fmt: skip
    assert found == {
        "a": [Question(1, "Is it old?", (), "global")],
        "b": [Question(2, 'Is\xa0it "red"?', (1, 1), "attribute - color"), Question(1, "Well?", (), "relation - non-spatial")],
    }
    assert [q.broad_category for own in found.values() for q in own] == ["global", "attribute", "relation"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,one,0,a (x),Is it?\n", "q.csv line 3: proposition_id 'one'"),
        ("a,1,0,a (x),Is it?\na,2,1;2,a (x),Is it?\n", "q.csv line 4: .* dependency '1;2'"),
        ("a,1,,a (x),Is it?\n", "dependency ''"),
        ("a,1,0,a (x),\n", "line 3: .*question_natural_language must not be empty"),
        ("a,1,0\n", "line 3: .*must not be empty"),
        ("", "no questions after its first row"),
    ],
)
def test_a_damaged_questions_file_is_refused(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        questions_of(text, tmp_path)


def test_bytes_that_are_no_text_and_endless_fields_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"q\.csv is no CSV after line \d: field larger"):
        questions_of(f"a,1,0,a (x),{'x' * 200_000}\n", tmp_path)
    (tmp_path / "q.csv").write_bytes(HEAD.encode() + b"a,1,0,a (x),Is it \xff?\n")
    with pytest.raises(ValueError, match=r"q\.csv line 3 is not UTF-8 text"):
        read_questions(tmp_path / "q.csv")


def test_a_file_of_other_columns_or_none_says_where_the_questions_are(tmp_path):
    (tmp_path / "other.csv").write_text("item_id,question\na,b\n")
    with pytest.raises(ValueError, match=r"no column proposition_id, .*download_benchmarks.sh"):
        read_questions(tmp_path / "other.csv")
    with pytest.raises(FileNotFoundError, match=r"nowhere.csv; bash tools/download_benchmarks.sh"):
        read_questions(tmp_path / "nowhere.csv")


def test_odd_propositions_are_named(tmp_path):
    with pytest.warns(UserWarning, match=r"1 propositions with a parent that is not asked.*: a 2"):
        questions_of("a,2,1,a (x),Is it?\n", tmp_path)
    with pytest.warns(UserWarning, match=r"1 propositions twice; the last one counts: a 1"):
        assert questions_of("a,1,0,a (x),Is it?\na,1,0,a (x),Was it?\n", tmp_path)["a"][0].text == "Was it?"


def test_of_several_blocks_of_a_prompt_the_last_counts(tmp_path):
    """The official scorer starts a prompt's questions afresh whenever the id changes."""
    with pytest.warns(UserWarning, match=r"1 prompts are in several blocks of rows; the last one counts: a"):
        found = questions_of("a,1,0,a (x),Is it?\na,2,1,a (x),Was it?\nb,1,0,a (x),Is it?\na,3,0,a (x),Will it?\n", tmp_path)
    assert {item: [q.proposition for q in own] for item, own in found.items()} == {"a": [3], "b": [1]}


def test_a_question_fails_with_its_parent():
    chain = [asked(1), asked(2, 1), asked(3, 2), asked(4)]
    assert score_crop(chain, {1: False, 2: True, 3: True, 4: True}) == 1 / 4
    assert score_crop(chain, {1: True, 2: True, 3: True, 4: False}) == 3 / 4


def test_failures_are_handed_on_in_the_order_of_the_questions():
    """When question 1 is scored, its parent 2 has not failed with 3 yet."""
    assert score_crop([asked(1, 2), asked(2, 3), asked(3)], {1: True, 2: True, 3: False}) == 1 / 3


def test_only_yes_counts_and_a_parent_that_is_not_asked_bars_nothing():
    answers = {("a.png", 0, n): text for n, text in enumerate(("yes", "Yes", "yes ", "yes, it is", "y"), start=1)}
    scores = score_answers({"a": [asked(1, 9), *map(asked, (2, 3, 4, 5))]}, answers, ["a.png"], 1)
    assert scores.images == {"a.png": [1 / 5]} and scores.score == 20


def test_categories_are_the_raw_answers_about_the_last_crop():
    questions = {"a": [asked(1, category="entity - whole"), asked(2, 1, category="entity - part")]}
    last = {1: "no", 2: "yes"}
    answers = {("a.png", 0, 1): "yes", ("a.png", 0, 2): "no", **{("a.png", 1, n): text for n, text in last.items()}}
    scores = score_answers(questions, answers, ["a.png"], 2)
    assert scores.images == {"a.png": [0.5, 0.0]} and scores.score == 25
    assert scores.broad == {"entity": 50} and scores.detailed == {"entity - part": 100, "entity - whole": 0}


def test_the_official_scores_are_met_to_the_last_digit():
    folder = GOLDENS / "dpg"
    images = sorted(path.name for path in (folder / "images").iterdir())
    scores = score_answers(read_questions(folder / "questions.csv"), read_answers(folder / "answers.json"), images, 4)
    expected = (folder / "results.txt").read_text().splitlines()
    assert f"DPG-Bench score: {scores.score}" == expected[-1]
    per_image = dict(line.removeprefix("images/").split(", ", 1) for line in expected if line.startswith("images/"))
    assert {name: [float(x) for x in text.split(", ")][:4] for name, text in per_image.items()} == scores.images
    categories = dict(line.strip().split(": ") for line in expected if line.startswith("\t"))
    assert {**scores.broad, **scores.detailed} == {name: float(value) for name, value in categories.items()}


def test_an_answer_that_is_missing_is_named():
    with pytest.raises(ValueError, match=r"image a.png, crop 1, proposition 2"):
        score_answers({"a": [asked(1), asked(2)]}, {("a.png", 0, 1): "yes", ("a.png", 0, 2): "no", ("a.png", 1, 1): "no"},
                      ["a.png"], 2)  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("[{]", "is no JSON"),
        ('{"image": "a.png"}', "no list of answers"),
        ('[{"image": "a.png", "crop": 0, "proposition_id": 1}]', "entry 0 has no image, crop, proposition_id and answer"),
        ('[{"image": "a.png", "crop": "0", "proposition_id": 1, "answer": "yes"}]', "entry 0"),
        ('["yes"]', "entry 0"),
    ],
)
def test_a_damaged_file_of_answers_is_refused(rows, message, tmp_path):
    (tmp_path / "a.json").write_text(rows)
    with pytest.raises(ValueError, match=message):
        read_answers(tmp_path / "a.json")


def test_contradicting_answers_are_refused(tmp_path):
    row = {"image": "a.png", "crop": 1, "proposition_id": 2, "answer": "yes"}
    (tmp_path / "a.json").write_text(json.dumps([row, row, {**row, "answer": "no"}]))
    with pytest.raises(ValueError, match=r"image a.png, crop 1, proposition 2 has two different answers"):
        read_answers(tmp_path / "a.json")


def test_a_grid_is_cut_row_by_row():
    image = picture(0, 6, 9)
    crops = cut_grid(image, Grid(3, 3))
    assert [crop.size for crop in crops] == [(2, 3)] * 9
    assert [crop.getpixel((0, 0)) for crop in crops] == [image.getpixel((x, y)) for y in (0, 3, 6) for x in (0, 2, 4)]
    assert cut_grid(image, Grid(1, 1))[0].tobytes() == image.tobytes()


def test_up_to_four_crops_are_of_the_official_grid_and_more_of_a_square():
    assert [grid_of(n) for n in (1, 2, 3, 4, 9)] == [(2, 2)] * 4 + [(3, 3)]
    assert [grid_of(1, sampled) for sampled in (1, 2, 3, 9)] == [(1, 1), (2, 1), (2, 2), (3, 3)]
    for number in (0, -4, 5, 8):
        with pytest.raises(ValueError, match=f"--pic-num must be 1 to 4, .* or a square .* got {number}"):
            grid_of(number)
    with pytest.raises(ValueError, match=r"--pic-num must lie between 1 and 1, .* got 4"):
        grid_of(4, sampled=1)


def test_images_that_are_no_grid_are_named(tmp_path):
    for name, size in (("a", (64, 64)), ("b", (64, 48)), ("c", (63, 64))):
        picture(0, *size).save(tmp_path / f"{name}.png")
    files = [tmp_path / f"{name}.png" for name in "abc"]
    square = Grid(2, 2)
    check_grids(files[:2], square)
    check_grids(files[:1], square, 32)
    with pytest.raises(ValueError, match=r"not 2x2 equal images \(--pic-num, --resolution\): \S+c.png \(63x64\)$"):
        check_grids(files, square)
    with pytest.raises(ValueError, match=r"not 2x2 equal images of 32x32 .*b.png \(64x48\), \S+c.png"):
        check_grids(files, square, 32)
    (tmp_path / "c.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"c.png cannot be read as an image"):
        check_grids(files, square)


def test_an_answer_is_cut_to_its_first_word():
    texts = {"Yes, there is.": "yes", " **No** red cat": "no", "yes": "yes", "": "", " ... ": "", "NOT yes": "not"}
    assert {text: normalise(text) for text in texts} == texts


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_vilt(root / "vilt")
    save_blip(root / "blip")
    save_llava(root / "llava")
    save_llava(root / "untaught", template=None)
    return root


def expected_vilt(folder, image, question):
    from transformers import ViltForQuestionAnswering, ViltProcessor

    model, processor = ViltForQuestionAnswering.from_pretrained(folder).eval(), ViltProcessor.from_pretrained(folder)
    with torch.no_grad():
        return model.config.id2label[int(model(**processor(image, question, return_tensors="pt")).logits.argmax())]


def expected_blip(folder, image, question):
    from transformers import BlipForQuestionAnswering, BlipProcessor

    model, processor = BlipForQuestionAnswering.from_pretrained(folder).eval(), BlipProcessor.from_pretrained(folder)
    ids = model.generate(**processor(image, question, return_tensors="pt"), max_new_tokens=10)
    return processor.decode(ids[0], skip_special_tokens=True)


def expected_llava(folder, image, question):
    """Greedy choice of one token after the other, from a prompt written by hand."""
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    model, processor = LlavaForConditionalGeneration.from_pretrained(folder).eval(), LlavaProcessor.from_pretrained(folder)
    prompt = f"user <image>{question} Answer with yes or no. assistant"  # the tokenizer puts <s> in front
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    ids, new = inputs.pop("input_ids"), []
    for _ in range(10):
        inputs["attention_mask"] = torch.ones_like(ids)
        with torch.no_grad():
            new.append(int(model(input_ids=ids, **inputs).logits[0, -1].argmax()))
        if new[-1] == 3:
            break
        ids = torch.cat([ids, torch.tensor([new[-1:]])], dim=1)
    return processor.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["vilt", "blip", "llava"])
def test_answers_are_those_of_the_model_asked_one_question(kind, models):
    """Padding beside longer questions, batches and a missing padding token change nothing."""
    judge = load_judge(str(models / kind), CPU, batch_size=3)
    assert judge.name == kind and not judge.is_official
    assert list(judge.identity["weights_sha256"]) == ["model.safetensors"]
    images = [picture(seed) for seed in range(2)]
    expected = {"vilt": expected_vilt, "blip": expected_blip, "llava": expected_llava}[kind]
    answers = [judge(image, QUESTIONS) for image in images]
    assert answers == [[normalise(expected(models / kind, image, text)) for text in QUESTIONS] for image in images]
    assert len({answer for own in answers for answer in own}) > 1, "the model answers everything alike"


def test_a_chat_begins_once(models, monkeypatch):
    """The template writes `<s>`, and so would the tokenizer."""
    judge = load_judge(str(models / "llava"), CPU)
    prompts, generate = [], judge.model.generate
    monkeypatch.setattr(judge.model, "generate", lambda **inputs: prompts.append(inputs["input_ids"]) or generate(**inputs))
    judge(picture(0), QUESTIONS[:1])
    assert (prompts[0] == 2).sum() == 1 and prompts[0][0, 0] == 2


def test_a_judge_runs_in_bfloat16(models):
    judge = load_judge(str(models / "llava"), CPU, "bfloat16")
    assert judge.model.dtype == torch.bfloat16 and judge.identity["dtype"] == "bfloat16"
    assert len(judge(picture(0), QUESTIONS)) == len(QUESTIONS)


def test_models_that_cannot_judge_are_refused(models, tmp_path):
    from transformers import BertConfig, BertModel

    with pytest.raises(ValueError, match=r"untaught is neither mplug nor .* no chat template"):
        load_judge(str(models / "untaught"), CPU)
    config = BertConfig(hidden_size=8, intermediate_size=8, num_attention_heads=1, num_hidden_layers=1)
    BertModel(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="a bert model answers no questions about images"):
        load_judge(str(tmp_path / "bert"), CPU)
    with pytest.raises(ValueError, match="--vqa-model nobody/nothing is neither mplug nor a judge of transformers"):
        load_judge("nobody/nothing", CPU)


def test_a_model_without_its_head_is_refused(models, tmp_path):
    from safetensors.torch import load_file, save_file

    save_vilt(tmp_path / "vilt")
    weights = load_file(tmp_path / "vilt/model.safetensors")
    kept = {k: v for k, v in weights.items() if not k.startswith("classifier.")}
    save_file(kept, tmp_path / "vilt/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"it lacks 6 weights, first: classifier.0.bias"):
        load_judge(str(tmp_path / "vilt"), CPU)


@pytest.fixture
def modelscope(monkeypatch, tmp_path):
    """A stand-in for modelscope, whose pipeline records its calls and answers by the image's colour."""
    (tmp_path / "mplug").mkdir()
    (tmp_path / "mplug/pytorch_model.bin").write_bytes(b"weights")
    calls = []

    def pipeline(task, model, device):
        calls.append((task, model, device))

        def answer(inputs):
            return [
                {"text": "yes" if i["image"].getpixel((0, 0))[0] > 127 and "red" in i["question"] else "No"} for i in inputs
            ]

        answer.model = types.SimpleNamespace(model_dir=str(tmp_path / "mplug"))
        return answer

    names = ("modelscope", "modelscope.pipelines", "modelscope.utils", "modelscope.utils.constant")
    modules = {name: types.ModuleType(name) for name in names}
    modules["modelscope.pipelines"].pipeline = pipeline
    modules["modelscope.utils.constant"].Tasks = types.SimpleNamespace(visual_question_answering="vqa")
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return types.SimpleNamespace(calls=calls, pipelines=modules["modelscope.pipelines"])


def test_mplug_is_asked_through_modelscope(modelscope):
    from PIL import Image

    judge = load_judge("mplug", CPU)
    assert modelscope.calls == [("vqa", "damo/mplug_visual-question-answering_coco_large_en", "cpu")]
    assert judge.is_official and judge.identity["name"] == judge.name == modelscope.calls[0][1]
    digest = hashlib.sha256(b"weights").hexdigest()
    assert judge.identity["weights_sha256"] == {"pytorch_model.bin": digest}
    assert judge(Image.new("RGB", (4, 4), "red"), ["Is it red?", "Is it blue?"]) == ["yes", "No"], "answers stay as they are"
    load_judge("mplug:checkpoints/mplug", CPU)
    assert modelscope.calls[1][1] == "checkpoints/mplug"


def test_mplug_that_does_not_load_says_how_to_install_it(modelscope, monkeypatch):
    how = r"pip install -r projects/evaluate/dpg_bench/requirements_mplug.txt"

    def broken(*args, **kwargs):
        raise RuntimeError("Failed to import ofa:\nNo module named 'decord'")

    monkeypatch.setattr(modelscope.pipelines, "pipeline", broken)
    with pytest.raises(ValueError, match=f"cannot load .* No module named 'decord'; .*{how}"):
        load_judge("mplug", CPU)
    monkeypatch.setitem(sys.modules, "modelscope", None)
    monkeypatch.setitem(sys.modules, "modelscope.pipelines", None)
    with pytest.raises(ValueError, match=f"the judge mplug needs modelscope .*{how}"):
        load_judge("mplug", CPU)
