"""DPG-Bench's evaluation as users run it: ready answers, real models, several processes, interruptions, bad input."""

import json
import shutil
import warnings
from collections import Counter

import pytest
import torch
from helpers.commands import command
from helpers.dpg_models import QUESTIONS, picture, save_benchmark, save_vilt
from helpers.paths import GOLDENS
from PIL import Image

from tim.evaluation.commands import start
from tim.evaluation.dpg import run
from tim.evaluation.dpg.judges import load_judge
from tim.evaluation.dpg.run import Grid, Settings, cut_grid, evaluate_folder
from tim.files import run_record

COMPUTE = "projects/evaluate/dpg_bench/compute_dpg_bench.py"
GOLDEN = GOLDENS / "dpg"


def words(root, out, *more) -> list:
    """Arguments for `save_benchmark`'s folder."""
    return [COMPUTE, "--image-root-path", root / "images", "--csv", root / "questions.csv", "--res-path", out, *more]


def test_ready_answers_give_the_official_result_file(tmp_path):
    inputs = ["--csv", GOLDEN / "questions.csv", "--answers", GOLDEN / "answers.json", "--pic-num", 4]
    folder, out = GOLDEN / "images", tmp_path / "new/results.txt"
    done = command(COMPUTE, "--image-root-path", folder, "--res-path", out, *inputs)
    official = (GOLDEN / "results.txt").read_text().replace("images/", f"{folder}/").replace("results.txt", str(out))
    official = official.replace("Image path: images", f"Image path: {folder}")
    assert sorted(out.read_text().splitlines()) == sorted(official.splitlines())
    assert out.read_text().splitlines()[-1] == official.splitlines()[-1] and out.read_text() in done.stdout
    answers = json.loads((GOLDEN / "answers.json").read_text())
    assert sorted(map(str, json.loads((tmp_path / "new/results.detail.json").read_text()))) == sorted(map(str, answers))
    record = json.loads((tmp_path / "new/results.json").read_text())
    assert record["protocol"] == "dpg" and record["score"] == 46.48809523809524 and record["n"] == record["prompts"] == 25
    kinds = Counter(row["answer"] for row in answers)
    assert record["answers"] == {"yes": kinds["yes"], "no": kinds["no"], "other": kinds["red"]}
    assert record["questions"] == 101 and sum(kinds.values()) == 404
    assert record["categories_level_1"]["other"] == 66.66666666666666
    assert record["judge"]["answers"] == str(GOLDEN / "answers.json") and len(record["judge"]["sha256"]) == 64


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder of questions, images and a ViLT; output) of the command on one process, results in a/r.*."""
    root = save_benchmark(tmp_path_factory.mktemp("dpg") / "b")
    save_vilt(root / "vilt")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of several processes has: sums in another order differ in the last bit
    done = command(*words(root, root / "a/r.txt", "--vqa-model", root / "vilt", "--batch-size", 3))
    torch.set_num_threads(threads)
    return root, done.stdout


def test_a_model_of_transformers_judges_under_its_own_name(finished):
    root, printed = finished
    text = (root / "a/r.txt").read_text()
    assert text in printed and "VQA model: vilt\n" in text
    record = json.loads((root / "a/r.json").read_text())
    assert record["judge"]["name"] == "vilt" and record["judge"]["questions_a_batch"] == 3
    assert record["n"] == 5 and record["prompts_without_image"] == [] and record["images_per_second_and_process"] > 0
    assert text.endswith(f"DPG-Bench score: {record['score']}\n")
    judge = load_judge(str(root / "vilt"), torch.device("cpu"))
    crops = cut_grid(Image.open(root / "images/p3.png"), Grid(2, 2))
    expected = [answer for crop in crops for answer in judge(crop, QUESTIONS)]
    rows = [row for row in json.loads((root / "a/r.detail.json").read_text()) if row["image"] == "p3.png"]
    assert [row["answer"] for row in rows] == expected and [row["crop"] for row in rows] == sorted([0, 1, 2, 3] * 4)
    assert [row["question"] for row in rows] == list(QUESTIONS) * 4 and 0 < record["score"] < 100


def test_scoring_the_details_again_gives_the_same(finished):
    root, _ = finished
    details = root / "a/r.detail.json"
    command(*words(root, root / "again/r.txt", "--answers", details))
    again = [line for line in (root / "a/r.txt").read_text().splitlines() if not line.startswith("VQA model")]
    assert (root / "again/r.txt").read_text().splitlines() == [line.replace("/a/r.txt", "/again/r.txt") for line in again]
    assert (root / "again/r.detail.json").read_bytes() == details.read_bytes()
    with pytest.raises(AssertionError, match=r"r.txt would overwrite the results that .*r.detail.json belongs to"):
        command(*words(root, root / "a/r.txt", "--answers", details))


@pytest.mark.dist
def test_two_processes_give_the_same_files(finished):
    root, _ = finished
    (root / "c").mkdir()
    done = command(*words(root, root / "c/r.txt", "--vqa-model", root / "vilt", "--batch-size", 3), processes=2)
    assert len(list((root / "c/r.parts").glob("*.jsonl"))) == 2, "both processes judged"
    assert (root / "c/r.txt").read_text() == (root / "a/r.txt").read_text().replace("/a/r.txt", "/c/r.txt")
    assert (root / "c/r.detail.json").read_bytes() == (root / "a/r.detail.json").read_bytes()
    one, two = (json.loads((root / name / "r.json").read_text()) for name in "ac")
    assert {**one, "images_per_second_and_process": 0} == {**two, "images_per_second_and_process": 0}
    assert done.stdout.count("DPG-Bench score") == 1


class RedJudge:
    """Says yes to red images, and keeps the sizes of what it is asked about."""

    name, identity, is_official = "red", {"name": "red"}, True

    def __init__(self):
        self.sizes = []

    @property
    def crops(self):
        return len(self.sizes)

    def __call__(self, image, questions):
        self.sizes.append(image.size)
        return ["yes" if image.getpixel((0, 0))[0] > 127 else "no"] * len(questions)


@pytest.fixture
def judge(monkeypatch):
    red = RedJudge()
    monkeypatch.setattr(run, "load_judge", lambda *args: red)
    return red


@pytest.fixture
def evaluate(tmp_path):
    """evaluate_folder on a copy of `save_benchmark`'s folder at tmp_path/b."""
    save_benchmark(tmp_path / "b")

    def call(**options):
        settings = Settings(tmp_path / "b/images", tmp_path / "r.txt", tmp_path / "b/questions.csv", **options)
        return evaluate_folder(settings, start())

    return call


def test_crops_count_alike(tmp_path, judge, evaluate):
    for k in range(5):
        image = Image.new("RGB", (6, 6))
        for n in range(k):
            image.paste((255, 0, 0), (2 * (n % 3), 2 * (n // 3), 2 * (n % 3) + 2, 2 * (n // 3) + 2))
        image.save(tmp_path / f"b/images/p{k}.png")
    text = evaluate(pic_num=9)
    assert f"DPG-Bench score: {100 * (0 + 1 + 2 + 3 + 4) / 45:.6f}"[:-1] in text and judge.crops == 45
    assert f"{tmp_path / 'b/images/p2.png'}, 1.0, 1.0, 0.0, 0.0, " in text


def quarters(root, size=8):
    """Every prompt's file shows red in its upper left quarter, green in the next, blue below and white last."""
    colours = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255))
    for k in range(5):
        image = Image.new("RGB", (2 * size, 2 * size))
        for n, colour in enumerate(colours):
            image.paste(colour, (size * (n % 2), size * (n // 2), size * (n % 2) + size, size * (n // 2) + size))
        image.save(root / f"b/images/p{k}.png")


@pytest.mark.parametrize(("pic_num", "score"), [(1, 100), (2, 50), (3, 100 / 3), (4, 50), (None, 50)])
def test_the_first_crops_are_taken_in_row_order(pic_num, score, tmp_path, judge, evaluate):
    """Red says yes to red and to white: one is the upper left, as officially."""
    quarters(tmp_path)
    if pic_num == 1:
        with pytest.warns(UserWarning, match="--pic-num 1 takes the upper left image of a 2x2 grid"):
            evaluate(pic_num=1)
    else:
        evaluate(pic_num=pic_num)
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["score"] == pytest.approx(score) and record["crops"] == (pic_num or 4) and judge.crops == 5 * (pic_num or 4)


def test_files_with_a_single_image_are_taken_whole(tmp_path, judge, evaluate):
    quarters(tmp_path)
    evaluate(pic_num=1, resolution=16)
    with pytest.raises(ValueError, match=r"r\.parts holds records of another run \(grid: None there, \[2, 2\] now\)"):
        evaluate(pic_num=1, resolution=8)
    shutil.rmtree(tmp_path / "r.parts")
    for result in tmp_path.glob("r.*"):
        result.unlink()
    settings = {"num_fid_samples": 5, "images_per_prompt": 1}
    run_record(tmp_path / "b/images").write_text(json.dumps({"complete": True, "settings": settings}))
    evaluate()
    assert judge.sizes == [(16, 16)] * 10
    with pytest.raises(ValueError, match="--pic-num must lie between 1 and 1, the images of a prompt that were drawn; got 4"):
        evaluate(pic_num=4)


def test_a_part_of_the_prompts_counts_when_its_run_is_finished(tmp_path, judge, evaluate):
    (tmp_path / "b/images/p3.png").unlink()
    record, settings = run_record(tmp_path / "b/images"), {"num_fid_samples": 16, "images_per_prompt": 4}
    record.write_text(json.dumps({"complete": True, "settings": settings}))
    with pytest.warns(UserWarning, match=r"1 \(p3\) of 5 prompts without an image; the score is over what is there"):
        evaluate()
    record.write_text(json.dumps({"complete": True, "settings": settings | {"num_fid_samples": 20}}))
    with pytest.raises(ValueError, match="images holds 4 of the 5 images that sampling has drawn"):
        evaluate()


def test_other_results_are_not_written_over(finished, tmp_path):
    root, _ = finished
    details = root / "a/r.detail.json"
    again = words(root, tmp_path / "r.txt", "--answers", details)
    command(*again)
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    command(*again)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole, "the same results may be written again"
    others = command(*again, "--pic-num", 2, check=False)
    assert others.returncode == 2 and "r.txt, which is of other results; choose another" in others.stderr
    (tmp_path / "r.txt").unlink()
    judged = command(*words(root, tmp_path / "r.txt", "--vqa-model", root / "vilt"), check=False)
    assert judged.returncode == 2 and "r.json is there already, from a run that this one cannot continue" in judged.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {k: v for k, v in whole.items() if k != "r.txt"}


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, judge, evaluate):
    whole = (tmp_path / "b/images/p2.png").read_bytes()
    (tmp_path / "b/images/p2.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"p2.png cannot be read as an image"):
        evaluate()
    assert judge.crops == 8 and not (tmp_path / "r.txt").exists()
    (tmp_path / "b/images/p2.png").write_bytes(whole)
    text = evaluate()
    assert judge.crops == 20, "what was judged is not judged again"
    assert evaluate() == text == (tmp_path / "r.txt").read_text() and judge.crops == 20


def test_results_are_not_mixed(tmp_path, judge, evaluate):
    evaluate()
    picture(9).save(tmp_path / "b/images/p1.png")
    with pytest.raises(ValueError, match=r"1 \(p1.png\) images have changed since they were judged; delete .*r.parts"):
        evaluate()
    judge.identity = {"name": "blue"}
    with pytest.raises(ValueError, match=r"r.parts holds records of another run \(judge"):
        evaluate()
    shutil.rmtree(tmp_path / "r.parts")
    with pytest.raises(ValueError, match=r"r.txt is there already"):
        evaluate()


def test_images_and_prompts_without_counterpart_are_named(tmp_path, judge, evaluate):
    (tmp_path / "b/images/p3.png").rename(tmp_path / "b/images/grid.png")
    (tmp_path / "b/images/p4.png").unlink()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "b/images/p4.jpg")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"1 \(p3\) of 5 prompts without .* --allow-partial"):
        evaluate()
    with pytest.warns(UserWarning) as caught:
        evaluate(allow_partial=True)
    messages = [str(warning.message) for warning in caught]
    assert any("1 (grid.png) of 5 images without questions do not count" in message for message in messages)
    assert any("1 (p3) of 5 prompts without an image; the score is over what is there" in message for message in messages)
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["n"] == 4 and record["prompts"] == 5 and record["prompts_without_image"] == ["p3"]
    assert record["samples"]["image_format"] == ["jpg", "png"]


def drop_an_answer(root):
    rows = [
        {"image": f"p{k}.png", "crop": c, "proposition_id": n, "answer": "yes"}
        for k in range(5) for c in range(4) for n in range(1, 5) if (k, c, n) != (3, 2, 1)
    ]  # fmt: skip
    (root / "answers.json").write_text(json.dumps(rows))


BAD = {
    "pic num": (lambda root: None, ["--pic-num", 5], "--pic-num must be 1 to 4, the first images of a 2x2 grid, or a square"),
    "batch": (lambda root: None, ["--batch-size", 0], "--batch-size must be >= 1, got 0"),
    "resolution": (lambda root: None, ["--resolution", 512], "not 2x2 equal images of 512x512"),
    "no folder": (lambda root: shutil.rmtree(root / "images"), [], "no folder"),
    "empty": (lambda root: [p.unlink() for p in (root / "images").iterdir()], [], "holds no image"),
    "no questions": (lambda root: (root / "questions.csv").unlink(), [], "tools/download_benchmarks.sh"),
    "others": (lambda root: [p.rename(p.with_name("x" + p.name)) for p in (root / "images").iterdir()], [],
               "holds no image of a prompt; files must be named by prompt, such as p0, p1"),
    "twins": (lambda root: picture(0).save(root / "images/p2.jpg"), [], "p2.png belong to the same prompt"),
    "corrupt": (lambda root: (root / "images/p3.png").write_bytes(b"?"), [], "p3.png cannot be read as an image"),
    "no answers": (lambda root: None, ["--answers", "nowhere.json"], "no file of answers nowhere.json"),
    "an answer": (drop_an_answer, ["--answers", "{root}/answers.json"],
                  "answers.json: no answer for image p3.png, crop 2, proposition 1"),
    "no model": (lambda root: None, ["--vqa-model", "nobody/nothing"], "--vqa-model nobody/nothing is neither mplug"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_an_error_that_names_it(case, tmp_path):
    spoil, flags, message = BAD[case]
    root = save_benchmark(tmp_path / "b")
    spoil(root)
    flags = [flag.format(root=root) if isinstance(flag, str) else flag for flag in flags]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = command(*words(root, tmp_path / "r.txt", *flags), check=False)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: ") and message in done.stderr
    assert not (tmp_path / "r.txt").exists()
