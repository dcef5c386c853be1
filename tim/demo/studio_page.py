"""How the studio looks: components and their places. What they do is in `studio`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tim.demo.studio_drawing import MAX_COUNT, MAX_GUIDANCE, MAX_PROMPT, MAX_SEED, MAX_STEPS, ROW

if TYPE_CHECKING:
    import gradio as gr

# Places of the slider of steps, evenly spaced: about logarithmic, and no two of them the same number.
SCALE = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
TO_STEPS = f"place => {list(SCALE)}[place]"
TO_PLACE = f"steps => {{ const all = {list(SCALE)}; return Math.max(0, all.findLastIndex(s => s <= steps)); }}"

CSS = """
.picture { padding-top: 28px; border: none !important; overflow: visible !important; }
.picture .image-container, .picture .empty { aspect-ratio: 1; height: auto; }
.picture .empty { min-height: 0; width: 100%; box-sizing: border-box; border: 1px dashed var(--border-color-primary); }
.picture .image-frame, .picture .image-container button.image-frame { height: 100%; }
.picture img { width: 100%; height: 100%; object-fit: contain; }
.picture .icon-button-wrapper { top: -28px; }
.cells { flex-wrap: wrap; justify-content: flex-start; }
.cells > * { flex: 1 1 118px !important; min-width: 118px !important; max-width: 240px; gap: 4px; }
.caption { text-align: center; font-size: 0.85rem; }
.caption, .heading { overflow: hidden !important; }
.heading h4 { margin: 0; }
.heading p { margin: 0; font-size: 0.85rem; opacity: 0.7; }
.status { min-height: 40px; overflow: hidden !important; }
#dice { min-width: 48px; max-width: 56px; align-self: end; font-size: 1.6rem; }
#how-many { gap: 2px; }
#scale { overflow: visible !important; background: var(--block-background-fill); padding: 4px 20px 12px; min-height: 34px; }
#scale .head, #scale .min_value, #scale .max_value { display: none; }
.ticks { position: relative; height: 1.4em; margin: 0 18px; font-size: 0.75rem; opacity: 0.7; }
.ticks span { position: absolute; transform: translateX(-50%); }
"""


@dataclass
class Cell:
    """A place for a picture with a line under it."""

    column: "gr.Column"
    image: "gr.Image"
    caption: "gr.Markdown"


@dataclass
class Controls:
    """What is drawn and how."""

    model: "gr.Dropdown"
    prompt: "gr.Textbox"
    label: "gr.Dropdown"
    examples: "gr.Dataset"
    steps: "gr.Number"
    scale: "gr.Slider"
    seed: "gr.Number"
    dice: "gr.Button"
    count: "gr.Slider"
    guidance: "gr.Slider"
    width: "gr.Slider"
    height: "gr.Slider"
    link: "gr.Textbox"
    style: "gr.HTML"

    @property
    def settings(self) -> list[Any]:
        """Those that make up the settings, in the order of `NAMES`."""
        return [self.model, self.prompt, self.label, self.seed, self.count, self.steps, self.guidance, self.width, self.height]


NAMES = ("model", "prompt", "class", "seed", "count", "steps", "guidance", "width", "height")


@dataclass
class Tab:
    """Buttons, and where pictures appear; `strength` and `picture` of the tab that starts from one, `row` of the other."""

    draw: "gr.Button"
    stop: "gr.Button"
    status: "gr.Markdown"
    pictures: list[Cell]
    row: list[Cell]
    picture: "gr.Image | None" = None
    strength: "gr.Slider | None" = None


def controls(names: list[str]) -> Controls:
    """Lay the controls, for any of the models of these names."""
    import gradio as gr

    model = gr.Dropdown(names, value=names[0], label="Model", visible=len(names) > 1)
    prompt = gr.Textbox(label="Prompt", placeholder="what to draw", max_length=MAX_PROMPT, max_lines=4, elem_id="prompt")
    label = gr.Dropdown([], label="Class", visible=False, allow_custom_value=True, elem_id="class")  # checked by the settings
    examples = gr.Dataset(label="Examples", components=["textbox"], samples=[["-"]], type="values", elem_id="examples")
    with gr.Column(elem_id="how-many"):
        steps = gr.Number(
            4, label="Steps", info="one is a single jump from noise", precision=0, minimum=1, maximum=MAX_STEPS, elem_id="steps"
        )
        scale = gr.Slider(0, len(SCALE) - 1, 3, step=1, show_label=False, elem_id="scale")
        gr.HTML(f'<div class="ticks">{_ticks()}</div>')
    with gr.Row():
        seed = gr.Number(0, label="Seed of the noise", precision=0, minimum=0, maximum=MAX_SEED, elem_id="seed", scale=4)
        dice = gr.Button("⚄", elem_id="dice", scale=1)
    count = gr.Slider(1, MAX_COUNT, 4, step=1, label="Pictures", info="each with the next seed", elem_id="count")
    guidance = gr.Slider(
        1, MAX_GUIDANCE, 1, step=0.1, label="Guidance", info="1 is none; the first step is never guided", elem_id="guidance"
    )
    width = gr.Slider(1, 4096, 64, step=1, label="Width", elem_id="width")
    height = gr.Slider(1, 4096, 64, step=1, label="Height", elem_id="height")
    link = gr.Textbox(label="Link to these settings", interactive=False, buttons=["copy"], elem_id="link")
    return Controls(
        model, prompt, label, examples, steps, scale, seed, dice, count, guidance, width, height, link, gr.HTML(visible=True)
    )


def _ticks() -> str:
    """Powers of two below the slider, each where its place is."""
    places = [(100 * k / (len(SCALE) - 1), steps) for k, steps in enumerate(SCALE) if steps & (steps - 1) == 0]
    return "".join(f'<span style="left: {place:.1f}%">{steps}</span>' for place, steps in places)


def _cells(number: int, name: str, shown: int) -> list[Cell]:
    """A row of cells, of which the first are visible."""
    import gradio as gr

    cells = []
    with gr.Row(elem_classes="cells"):
        for k in range(number):
            with gr.Column(visible=k < shown, min_width=118) as column:
                image = gr.Image(
                    format="png", interactive=False, show_label=False, buttons=["download", "fullscreen"],
                    elem_classes="picture", elem_id=f"{name}-{k}",
                )  # fmt: skip
                caption = gr.Markdown("&nbsp;", elem_classes="caption", elem_id=f"{name}-caption-{k}")
            cells.append(Cell(column, image, caption))
    return cells


def _buttons(text: str, name: str) -> tuple["gr.Button", "gr.Button", "gr.Markdown"]:
    import gradio as gr

    with gr.Row():
        go = gr.Button(text, variant="primary", elem_id=name, scale=3)
        stop = gr.Button("Stop", elem_id=f"stop-{name}", scale=1)
    return go, stop, gr.Markdown("&nbsp;", elem_classes="status", elem_id=f"status-{name}")


def tab_of_noise() -> Tab:
    """Lay the tab that draws from noise."""
    import gradio as gr

    go, stop, status = _buttons("Draw", "draw")
    pictures = _cells(MAX_COUNT, "picture", MAX_COUNT)
    gr.Markdown(
        f"#### The first picture's noise in {', '.join(map(str, ROW[:-1]))} and {ROW[-1]} steps\n"
        "NFE: evaluations of the network, of which a guided step costs two",
        elem_classes="heading",
    )
    return Tab(go, stop, status, pictures, _cells(len(ROW), "row", len(ROW)))


def tab_of_pictures() -> Tab:
    """Lay the tab that starts from a picture."""
    import gradio as gr

    with gr.Row():
        picture = gr.Image(
            label="Start from", type="pil", sources=["upload", "clipboard"], height=220, format="png", elem_id="start"
        )
        strength = gr.Slider(
            0.05, 1, 0.6, step=0.05, label="Strength", info="how much noise is put on it; 1 leaves nothing of it",
            elem_id="strength",
        )  # fmt: skip
    go, stop, status = _buttons("Redraw", "redraw")
    return Tab(go, stop, status, _cells(MAX_COUNT, "redrawn", MAX_COUNT), [], picture, strength)
