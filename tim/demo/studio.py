"""The studio: a Gradio page that draws with any number of steps, and shows what more of them change."""

import html
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tim.cli import words_of
from tim.demo import studio_page as page
from tim.demo.studio_drawing import MAX_COUNT, MAX_SEED, ROW, Drawn, Settings, bounds, draw, restored
from tim.demo.studio_models import Models, offered, untrained

if TYPE_CHECKING:
    import gradio as gr
    from PIL import Image

logger = logging.getLogger(__name__)

TITLE, STOPPED = "TiM studio", "Stopped."
MAX_UPLOAD, MAX_WAITING = "20mb", 32  # per picture; drawings in the queue
KEEP = 3600  # seconds that pictures stay on the server
ONE = {"concurrency_limit": 1, "concurrency_id": "model"}  # both tabs' drawings wait for one another
# Puts the settings into the page's address, and returns it.
LINK = """(...values) => {
  const query = new URLSearchParams(location.search), names = NAMES;
  names.forEach((name, k) => values[k] === null || values[k] === "" ? query.delete(name) : query.set(name, values[k]));
  history.replaceState(null, "", "?" + query);
  return location.href;
}""".replace("NAMES", json.dumps(page.NAMES))


@contextmanager
def notices() -> Iterator[None]:
    """What goes wrong inside becomes a notice on the page: what a user can mend in words, faults of the program in the log."""
    import gradio as gr

    try:
        yield
    except Exception as error:
        words = None if isinstance(error, gr.Error) else words_of(error)
        if words is None:
            logger.exception("the studio failed")
        text = words or "something went wrong; the server's log says what"
        raise gr.Error(html.escape(text, quote=False), print_exception=False) from None


def start_of(models: Models, name: str) -> Settings:
    """The settings that a model begins with."""
    facts = models.facts(name)
    return Settings(name, facts.subjects[0], 0, MAX_COUNT, 4, facts.guidance, facts.side, facts.side)


def shown(models: Models, controls: page.Controls, settings: Settings) -> dict[Any, Any]:
    """What the controls become for a model and settings."""
    import gradio as gr

    facts = models.facts(settings.model)
    limits, is_small = bounds(facts), facts.side <= 128
    sides = {"minimum": facts.grid, "maximum": facts.largest, "step": facts.grid}
    return {
        controls.model: settings.model,
        controls.prompt: gr.update(value=None if facts.classes else settings.subject, visible=not facts.classes),
        controls.label: gr.update(
            choices=list(facts.classes), value=settings.subject if facts.classes else None, visible=bool(facts.classes)
        ),
        controls.examples: gr.update(samples=[[subject] for subject in facts.subjects]),
        controls.seed: settings.seed,
        controls.count: settings.count,
        controls.steps: settings.steps,
        controls.scale: max(k for k, steps in enumerate(page.SCALE) if steps <= settings.steps),
        controls.guidance: gr.update(value=settings.guidance, maximum=limits["guidance"][1]),
        controls.width: gr.update(value=settings.width, **sides),
        controls.height: gr.update(value=settings.height, **sides),
        controls.style: "<style>.picture img { image-rendering: pixelated; }</style>" if is_small else "",
    }


class Drawer:
    """Draws into the cells of a tab.

    Args:
        cache: folder from which the page may serve pictures.
    """

    def __init__(self, models: Models, tab: page.Tab, cache: str) -> None:
        self.models, self.tab, self.cache = models, tab, cache
        self.wanted: set[str] = set()  # sessions whose drawing goes on

    def jobs(self, settings: Settings) -> list[tuple[page.Cell, tuple[int, int]]]:
        """(cell, (seed, steps)) of everything there is to draw."""
        seeds = [((settings.seed + k) % (MAX_SEED + 1), settings.steps) for k in range(settings.count)]
        row = [(settings.seed, steps) for steps in ROW]
        return [*zip(self.tab.pictures, seeds, strict=False), *zip(self.tab.row, row, strict=False)]

    def run(
        self, settings: Settings, session: str, picture: "Image.Image | None", report: Callable[[tuple[int, int]], Any]
    ) -> Iterator[dict[Any, Any]]:
        """What the page shows, after every picture: all of it, so that the last is the whole.

        Args:
            session: of the page, which may stop it.
            report: called after every step with (steps done, steps of this picture).
        """
        import gradio as gr

        settings.check(self.models.facts(settings.model))
        jobs, began = self.jobs(settings), time.perf_counter()
        seen: dict[Any, Any] = {self.tab.status: "Drawing …"}
        for k, cell in enumerate([*self.tab.pictures, *self.tab.row]):
            is_wanted = k < settings.count or k >= len(self.tab.pictures)
            seen |= {cell.column: gr.update(visible=is_wanted), cell.image: None, cell.caption: "&nbsp;"}
        self.wanted.add(session)
        try:
            yield dict(seen)
            drawing = draw(
                self.models, settings, [job for _, job in jobs], lambda: session not in self.wanted, picture, report
            )  # fmt: skip
            for k, ((cell, _), drawn) in enumerate(zip(jobs, drawing, strict=False)):
                is_last = k + 1 == len(jobs)
                end = f" in {time.perf_counter() - began:.1f} s" if is_last else " …"
                seen[self.tab.status] = f"{k + 1} of {len(jobs)} pictures{end}"
                seen |= {cell.image: self._saved(drawn, settings), cell.caption: self._caption(cell, drawn)}
                yield dict(seen)
            if session not in self.wanted:
                yield {**seen, self.tab.status: STOPPED}
        finally:
            self.wanted.discard(session)

    def _caption(self, cell: page.Cell, drawn: Drawn) -> str:
        steps = f"**{drawn.steps} step{'s' if drawn.steps > 1 else ''}**"
        return f"{steps if cell in self.tab.row else f'seed {drawn.seed} · {steps}'}<br>{drawn.nfe} NFE · {drawn.ms:.0f} ms"

    def _saved(self, drawn: Drawn, settings: Settings) -> str:
        """Path of a PNG with the settings in it, named after them: what is shown is what a download gives."""
        from gradio.processing_utils import save_pil_to_cache

        subject = "".join(c if c.isalnum() else "-" for c in settings.subject)[:40]
        name = f"{subject}-seed-{drawn.seed}-steps-{drawn.steps}"
        return save_pil_to_cache(drawn.image, self.cache, name=name, format="png")


def build(models: Models, more: Sequence[str] = ()) -> "gr.Blocks":
    """The page.

    Args:
        more: commands that would train further models.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # nothing goes out to the net
    import gradio as gr

    names = list(models.sources)
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(KEEP, KEEP), fill_width=True) as demo:
        gr.Markdown(f"# {TITLE}\nOne network, any number of steps: move the slider, or look along the row.")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                controls = page.controls(names)
            with gr.Column(scale=5, min_width=300), gr.Tabs():
                with gr.Tab("From noise"):
                    noise = page.tab_of_noise()
                with gr.Tab("Image to image"):
                    pictures = page.tab_of_pictures()
        if more:
            gr.Markdown("Further models: " + ", ".join(f"`{command}`" for command in more))
        _wire_controls(demo, models, controls)
        for tab, name in ((noise, "draw"), (pictures, "redraw")):
            _wire_tab(demo, Drawer(models, tab, noise.pictures[0].image.GRADIO_CACHE), controls, name)
    return demo.queue(max_size=MAX_WAITING)


def _wire_controls(demo: "gr.Blocks", models: Models, controls: page.Controls) -> None:
    import gradio as gr

    def restore(request: gr.Request) -> dict[Any, Any]:
        with notices():
            query = dict(request.query_params)
            name = query.get("model", "")
            wrong = []
            if name and name not in models.sources:
                wrong = [f"model={name[:50]} of the link is none of the models here"]
            start = start_of(models, name if name in models.sources else next(iter(models.sources)))
            facts = models.facts(start.model)
            subject = query.get("class" if facts.classes else "prompt")
            settings, more = restored(query | ({"subject": subject} if subject else {}), start, facts)
            for words in wrong + more:
                gr.Warning(html.escape(words, quote=False))
            return shown(models, controls, settings)

    def choose(name: str) -> dict[Any, Any]:
        with notices():
            return shown(models, controls, start_of(models, name))

    def example(row: list[Any], name: str) -> dict[Any, Any]:
        return {controls.label if models.facts(name).classes else controls.prompt: row[0]}

    changed = [*controls.settings, controls.scale, controls.examples, controls.style]
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    demo.load(restore, None, changed, **quiet)
    controls.model.input(choose, controls.model, changed, **quiet)
    controls.examples.click(example, [controls.examples, controls.model], [controls.prompt, controls.label], **quiet)
    controls.dice.click(None, None, controls.seed, js=f"() => Math.floor(Math.random() * {MAX_SEED})")
    controls.scale.input(None, controls.scale, controls.steps, js=page.TO_STEPS)
    controls.steps.input(None, controls.steps, controls.scale, js=page.TO_PLACE)


def _wire_tab(demo: "gr.Blocks", drawer: Drawer, controls: page.Controls, name: str) -> None:
    import gradio as gr

    tab, models, steps_of = drawer.tab, drawer.models, gr.Progress()

    def go(request: gr.Request, progress: gr.Progress = steps_of, *values: Any) -> Iterator[dict[Any, Any]]:
        with notices():
            model, prompt, label, *numbers = values[: len(page.NAMES)]
            subject = label if models.facts(model).classes else prompt
            settings, picture = Settings(model, str(subject or ""), *numbers), None
            if tab.picture is not None:
                picture, strength = values[len(page.NAMES) :]
                settings = replace(settings, strength=strength)
                if picture is None:
                    raise ValueError("there is no picture to start from: drop one there")
            yield from drawer.run(settings, str(request.session_hash), picture, progress)

    def leave(request: gr.Request) -> None:
        drawer.wanted.discard(str(request.session_hash))

    def stop(request: gr.Request) -> str:
        leave(request)
        return STOPPED

    inputs = [*controls.settings, *(part for part in (tab.picture, tab.strength) if part is not None)]
    cells = [*tab.pictures, *tab.row]
    outputs = [tab.status, *(part for cell in cells for part in (cell.column, cell.image, cell.caption))]
    triggers = [tab.draw.click, *([] if tab.picture is not None else [controls.prompt.submit])]
    gr.on(triggers, None, controls.settings, controls.link, js=LINK)
    running = gr.on(
        triggers, go, inputs, outputs, api_name=name, show_progress="minimal", show_progress_on=tab.status, **ONE
    )  # fmt: skip
    tab.stop.click(stop, None, tab.status, queue=False, cancels=running, api_name=f"stop_{name}")
    demo.unload(leave)


def serve(
    pipeline: str | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    root: Path = Path(),
    block: bool = True,
) -> "gr.Blocks":
    """Serve the page.

    Args:
        pipeline, root: see `offered`.
        host: address to listen at; 0.0.0.0 for all. port: None takes the first free one from 7860 on.
        share: also through a public tunnel of Gradio.
        block: return only when it is interrupted.

    Raises:
        FileNotFoundError, ValueError: when there is no model, or it does not load. OSError: when the port is taken.
    """
    models = Models(offered(pipeline, root))
    models.facts(next(iter(models.sources)))  # loaded now: what is wrong with it is told here
    demo = build(models, untrained(root) if pipeline is None else ())
    import gradio as gr
    from gradio.themes.utils.fonts import LocalFont

    font = LocalFont("Source Sans Pro", weights=(400, 700))  # of the weights that come with Gradio, 600 lacks most letters
    theme = gr.themes.Default(primary_hue="teal", secondary_hue="teal", font=(font, "system-ui", "sans-serif"))
    demo.launch(
        server_name=host, server_port=port, share=share, prevent_thread_lock=True, quiet=True, max_file_size=MAX_UPLOAD,
        ssr_mode=False, theme=theme, css=page.CSS, footer_links=["api"], inbrowser=False,
    )  # fmt: skip
    print(f"{TITLE}: {demo.share_url or demo.local_url}\nCtrl-C ends it", flush=True)
    if block:
        demo.block_thread()
    return demo
