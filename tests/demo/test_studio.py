"""The studio through its server, as programs and browsers see it: pixels, settings in pictures and links, bounds, notices."""

import io
import json
import logging
import re
import runpy
import shutil
import sys
import time
import urllib.request
import weakref
from base64 import b64decode

import numpy as np
import pytest
import torch
from helpers.companions import save_tiny_text_encoder
from helpers.networks import TINY
from helpers.paths import ROOT
from helpers.runs import save_tiny_run
from packaging.requirements import Requirement
from PIL import Image

from tim.demo.studio_drawing import ROW, Settings, restored
from tim.demo.studio_models import Facts, Models, load_pipeline, offered, untrained
from tim.models.c2i.tim_model import TiM as ClassTiM
from tim.models.t2i.tim_model import TiM as TextTiM

gradio_client = pytest.importorskip("gradio_client", reason="the studio needs gradio: pip install -e .[demo]")
PICTURES = 4  # cells for seeds


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Where two quickstarts have been trained: classes of grey pixels, and captions."""
    root = tmp_path_factory.mktemp("studio")
    classes = {**TINY, "in_channels": 1, "num_classes": 3}
    save_tiny_run(root / "workdir" / "quickstart", "c2i/digits.yaml", ClassTiM, classes)
    save_tiny_text_encoder(root / "text")
    captions = {**TINY, "in_channels": 3, "cap_feat_dim": 20}
    parts = {"text_encoder_dir": str(root / "text")}
    save_tiny_run(root / "workdir" / "quickstart_t2i_shapes", "t2i/shapes.yaml", TextTiM, captions, **parts)
    return root


@pytest.fixture(scope="module")
def address(root):
    from tim.demo.studio import serve

    demo = serve(root=root, block=False)
    yield demo.local_url
    demo.close()


@pytest.fixture(scope="module")
def client(address):
    client = gradio_client.Client(address, verbose=False)
    yield client
    client.close()


@pytest.fixture(scope="module")
def pipelines(root):
    names = {"digits": "quickstart", "shapes": "quickstart_t2i_shapes"}
    return {name: load_pipeline(str(root / "workdir" / folder)) for name, folder in names.items()}


def ask(model, subject, seed=0, count=1, steps=4, guidance=1.0, width=8, height=8):
    """Arguments of a drawing, as the page sends them."""
    prompt, label = (None, subject) if model == "digits" else (subject, None)
    return model, prompt, label, seed, count, steps, guidance, width, height


def cells(result):
    """(status, [(path of the picture or None, caption)]) of what the page gets."""
    status, *rest = result
    return status, list(zip(rest[::2], rest[1::2], strict=True))


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def expected(pipe, subject, seed, steps, **arguments):
    generator = torch.Generator().manual_seed(seed)
    arguments = {"guidance_scale": 1.0, "generator": generator, **arguments}
    return np.asarray(pipe(subject, num_inference_steps=steps, **arguments).images[0])


def test_pictures_are_the_pipelines_and_appear_one_by_one(client, pipelines):
    job = client.submit(*ask("digits", "2", seed=7, count=2, steps=3), api_name="/draw")
    status, shown = cells(job.result(timeout=60))
    assert re.match(r"7 of 7 pictures in \d+\.\d s", status)
    seeds, row = shown[:2], shown[PICTURES:]
    assert [path for path, _ in shown[2:PICTURES]] == [None, None] and len(row) == len(ROW)
    wanted = [(7, 3), (8, 3), *((7, steps) for steps in ROW)]
    for (path, caption), (seed, steps) in zip([*seeds, *row], wanted, strict=True):
        with Image.open(path) as image:
            assert np.array_equal(np.asarray(image), expected(pipelines["digits"], 2, seed, steps))
            kept = json.loads(image.info["settings"])
        assert kept == {
            "model": "digits", "subject": "2", "seed": seed, "count": 1, "steps": steps, "guidance": 1.0, "width": 8,
            "height": 8, "strength": None, "nfe": steps,
        }  # fmt: skip
        assert f"{steps} NFE" in caption and re.search(r"\d+ ms$", caption)
    counts = [sum(path is not None for path, _ in cells(seen)[1]) for seen in job.outputs()]
    assert counts == list(range(8))


def test_captions_are_guided_and_of_any_size(client, pipelines):
    _, shown = cells(client.predict(*ask("shapes", "a red circle", 3, 1, 5, 2.0, 16, 12), api_name="/draw"))
    with Image.open(shown[0][0]) as image:
        want = expected(pipelines["shapes"], "a red circle", 3, 5, guidance_scale=2.0, width=16, height=12)
        assert image.size == (16, 12) and np.array_equal(np.asarray(image), want)
    assert "9 NFE" in shown[0][1]


@pytest.mark.parametrize(("model", "subject"), [("digits", "1"), ("shapes", "a blue circle")])
def test_a_picture_to_start_from(client, tmp_path, model, subject):
    Image.fromarray(np.full((30, 50, 3), 200, np.uint8)).save(tmp_path / "grey.png")
    picture = gradio_client.handle_file(str(tmp_path / "grey.png"))
    drawn = []
    for strength in (0.05, 1.0):
        _, shown = cells(client.predict(*ask(model, subject, 1, 2), picture, strength, api_name="/redraw"))
        assert [path is not None for path, _ in shown] == [True, True, False, False]
        with Image.open(shown[0][0]) as image:
            assert image.size == (8, 8) and json.loads(image.info["settings"])["strength"] == strength
            drawn.append(np.asarray(image.convert("RGB")).astype(int))
    assert np.abs(drawn[0] - 200).mean() < np.abs(drawn[1] - 200).mean()  # less noise leaves more of the picture


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (ask("shapes", "  "), "the prompt is empty"),
        (ask("shapes", "x" * 1001), "1001 characters; 1000 are the most"),
        (ask("shapes", "a", width=9), "width 9 is not a multiple of 2"),
        (ask("shapes", "a", width=34), "width 34 is out of range: 2 to 32"),
        (ask("shapes", "a", steps=129), "129"),
        (ask("shapes", "a", count=5), "5"),
        (ask("shapes", "a", seed=None), "seed must be a whole number, not None"),
        (ask("digits", "9"), "'9' is no class of digits, which has 0 to 2"),
        (ask("nothing", "a"), "nothing"),
    ],
)
def test_what_cannot_be_drawn_is_a_readable_notice(client, caplog, arguments, words):
    with caplog.at_level(logging.ERROR), pytest.raises(Exception, match=words) as notice:
        client.predict(*arguments, api_name="/draw")
    assert "Traceback" not in str(notice.value) and not caplog.records


def test_a_fault_of_the_program_is_logged_and_not_shown(client, monkeypatch, caplog):
    def broken(*arguments, **keywords):
        raise KeyError("secret")

    monkeypatch.setattr("tim.demo.studio.draw", broken)
    with caplog.at_level(logging.ERROR), pytest.raises(Exception, match="server's log says what") as notice:
        client.predict(*ask("digits", "1"), api_name="/draw")
    assert "secret" not in str(notice.value) and "KeyError: 'secret'" in caplog.text


def test_a_picture_that_is_missing_is_asked_for(client):
    with pytest.raises(Exception, match="no picture to start from"):
        client.predict(*ask("digits", "1"), None, 0.5, api_name="/redraw")


def test_stop_ends_ones_own_drawing_after_a_step(client, address, monkeypatch):
    from tim.pipelines.base import TransitionPipeline

    run, steps = TransitionPipeline._run, []

    def slowly(self, plan, first, noise, cond, uncond, generator, callback, start=None):
        def after(*arguments):
            steps.append(time.sleep(0.05))
            return callback(*arguments)

        return run(self, plan, first, noise, cond, uncond, generator, after, start)

    monkeypatch.setattr(TransitionPipeline, "_run", slowly)
    other = gradio_client.Client(address, verbose=False)
    job = client.submit(*ask("digits", "1", steps=128), api_name="/draw")
    until(lambda: len(steps) >= 2)
    other.predict(api_name="/stop_draw")
    before = len(steps)
    until(lambda: len(steps) >= before + 2)  # another's session does not end it
    assert client.predict(api_name="/stop_draw") == "Stopped."
    status, shown = cells(job.result(timeout=30))
    assert status == "Stopped." and not any(path for path, _ in shown) and len(steps) < 100
    other.close()


def test_it_is_for_this_machine_alone_and_asks_no_other(address):
    assert address.startswith("http://127.0.0.1:")
    page = urllib.request.urlopen(address).read().decode()
    config = json.loads(re.search(r"window\.gradio_config = (\{.*?\});</script>", page)[1])
    assert config["analytics_enabled"] is False and not config.get("show_error")


FACTS = Facts(("zero", "one", "two"), 8, 2, ("zero",), 1.0)
START = Settings("digits", "zero", 0, 4, 4, 1.0, 8, 8)


def test_a_link_restores_what_is_possible_and_says_what_is_not():
    query = {"subject": "two", "seed": "5", "count": "2", "steps": "32", "guidance": "1.5", "width": "16", "__theme": "dark"}
    assert restored(query, START, FACTS) == (Settings("digits", "two", 5, 2, 32, 1.5, 16, 8), [])
    query = {"subject": "nine", "seed": "-1", "count": "many", "steps": "4096", "guidance": "nan", "height": "7"}
    settings, wrong = restored(query, START, FACTS)
    assert settings == START
    assert [words.partition("=")[0] for words in wrong] == ["subject", "seed", "count", "steps", "guidance", "height"]
    assert "steps=4096 of the link is passed over: steps 4096 is out of range: 1 to 128" in wrong


def test_the_quickstarts_that_are_there_are_offered(root, tmp_path):
    assert list(offered(None, root)) == ["digits", "shapes"] and untrained(root) == ["bash scripts/quickstart_t2i.sh"]
    assert offered("some/folder", tmp_path) == {"folder": "some/folder"}
    with pytest.raises(FileNotFoundError, match=r"`bash scripts/quickstart\.sh` trains one.*--pipeline"):
        offered(None, tmp_path)


def test_one_model_is_in_memory(root):
    models = Models(offered(None, root))
    with models.use("digits") as pipe:
        first = weakref.ref(pipe.transformer)
    del pipe
    with models.use("shapes"), models.use("shapes"):
        assert first() is None
    assert models.facts("digits").classes == ("0", "1", "2") and models.facts("shapes").subjects[0] == "a red circle"
    with pytest.raises(ValueError, match="'other' is none of the models here: digits, shapes"), models.use("other"):
        pass


def test_pipelines_are_loaded_by_what_their_folder_says(pipelines, tmp_path):
    for name, pipe in pipelines.items():
        pipe.save_pretrained(tmp_path / name)
        assert type(load_pipeline(str(tmp_path / name))) is type(pipe)
    shutil.rmtree(tmp_path / "shapes" / "text_encoder")
    index = json.loads((tmp_path / "shapes" / "model_index.json").read_text())
    (tmp_path / "shapes" / "model_index.json").write_text(json.dumps({**index, "text_encoder": [None, None]}))
    with pytest.raises(ValueError, match="has no text encoder"):
        load_pipeline(str(tmp_path / "shapes"))
    for source, words in (
        (str(tmp_path), "neither a model_index.json"),
        ("no/where", "no/where is no folder, and no pipeline"),
    ):
        with pytest.raises(FileNotFoundError, match=words):
            load_pipeline(source)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--pipeline", "nowhere"], "nowhere has neither a model_index.json (a pipeline) nor checkpoints/ (a training run)"),
        (["--port", "0"], "--port must be 1 to 65535, got 0"),
        ([], "trains one in minutes"),
    ],
)
def test_the_command_says_what_is_wrong(words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo.py", *words])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "tools" / "demo.py"), run_name="__main__")
    assert stop.value.code == 2 and told in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_port_that_is_taken_is_told(address, root):
    from tim.demo.studio import serve

    with pytest.raises(OSError, match="port"):
        serve(port=int(address.rstrip("/").rpartition(":")[2]), root=root, block=False)


def test_the_space_serves_the_pipeline_beside_it(monkeypatch):
    served = []
    monkeypatch.setattr("tim.demo.studio.serve", lambda *arguments, **keywords: served.append((arguments, keywords)))
    runpy.run_path(str(ROOT / "scripts" / "space" / "app.py"), run_name="__main__")
    assert served == [(("pipeline",), {"host": "0.0.0.0", "port": 7860})]
    lines = (ROOT / "scripts" / "space" / "requirements.txt").read_text().splitlines()
    needed = re.search(r"^dependencies = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)[1]
    wanted = {str(Requirement(word)) for word in re.findall(r'"(.*?)"', needed)}
    assert {str(Requirement(line)) for line in lines if not line.startswith("#")} == wanted


def test_the_nodes_for_comfyui_draw_the_same(root, pipelines):
    """As ComfyUI calls them: by the names of their inputs, with images as floats (B, H, W, 3)."""
    folder = runpy.run_path(str(ROOT / "scripts" / "comfyui_tim" / "__init__.py"))
    load, draw = (folder["NODE_CLASS_MAPPINGS"][name] for name in ("LoadTiM", "DrawTiM"))
    (pipe,) = getattr(load(), load.FUNCTION)(source=str(root / "workdir" / "quickstart"))
    inputs = draw.INPUT_TYPES()
    how = {"subject": "2", "seed": 7, "count": 2, "steps": 3, "guidance": 1.0, "width": 0, "height": 0}
    assert set(inputs["required"]) == {"pipeline", *how} and set(inputs["optional"]) == {"image", "strength"}
    (images,) = getattr(draw(), draw.FUNCTION)(pipeline=pipe, **how)
    assert images.shape == (2, 8, 8, 3)
    wanted = [expected(pipelines["digits"], 2, seed, 3) for seed in (7, 8)]
    assert np.abs((images * 255).round().numpy() - np.stack(wanted)).max() <= 1  # one batch, which rounds otherwise
    (near,) = draw().draw(pipe, **how, image=torch.full((1, 8, 8, 3), 0.8), strength=0.05)
    assert (near - 0.8).abs().mean() < (images - 0.8).abs().mean()


# ---- in a browser ------------------------------------------------------------------------------
PIXELS = """
const [id, done] = arguments, image = document.querySelector(`#${id} img`), canvas = document.createElement("canvas");
[canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
canvas.getContext("2d").drawImage(image, 0, 0);
done(canvas.toDataURL("image/png"));
"""


@pytest.fixture(scope="module")
def browser():
    selenium = pytest.importorskip("selenium.webdriver", reason="the browser test needs selenium: pip install -e .[dev]")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no Chromium here: apt-get install chromium chromium-driver (scripts/test.sh does it as root)")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=1280,900"):
        options.add_argument(word)
    browser = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    yield browser
    browser.quit()


def shown_pixels(browser, cell):
    encoded = browser.execute_async_script(PIXELS, cell).partition(",")[2]
    return np.asarray(Image.open(io.BytesIO(b64decode(encoded))).convert("RGB"))


@pytest.mark.slow
def test_in_a_browser(browser, address, pipelines):
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def find(selector):
        return WebDriverWait(browser, 30).until(lambda b: next((e for e in b.find_elements("css selector", selector)), None))

    def value(selector):
        return find(selector).get_property("value")

    def wait(condition):
        return WebDriverWait(browser, 30, poll_frequency=0.05).until(lambda _: condition())

    browser.get(f"{address}?model=shapes&prompt=two+dogs&seed=11&count=1&steps=4096")
    wait(lambda: value("#prompt textarea") == "two dogs")  # of the link; its steps cannot be
    wait(lambda: "steps=4096 of the link is passed over" in find(".toast-body").get_property("textContent"))
    assert (value("#seed input"), value("#steps input")) == ("11", "4")
    prompt = find("#prompt textarea")
    prompt.clear()
    prompt.send_keys("a red circle")
    find("#scale input[type=range]").send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    wait(lambda: value("#steps input") == "8")
    find("#prompt textarea").send_keys(Keys.ENTER)
    wait(lambda: browser.find_elements("css selector", f"#row-{len(ROW) - 1} img"))
    for cell, steps in (("picture-0", 8), ("row-0", 1), ("row-4", 32)):
        assert np.array_equal(shown_pixels(browser, cell), expected(pipelines["shapes"], "a red circle", 11, steps))
    assert "8 NFE" in find("#picture-caption-0").text and "seed 11" in find("#picture-caption-0").text
    link = browser.current_url
    assert "prompt=a+red+circle" in link and "steps=8" in link and value("#link textarea, #link input") == link
    find("#dice").click()
    wait(lambda: value("#seed input") != "11")
    browser.get(link)
    wait(lambda: (value("#prompt textarea"), value("#steps input"), value("#seed input")) == ("a red circle", "8", "11"))
    names = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert all(name.startswith((address, "data:", "blob:")) for name in names)  # nothing is fetched from the net
