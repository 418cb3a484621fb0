"""Procedural clips with captions: what the tiny models learn from and are tested on.

Owns the vocabulary of the synthetic world (shapes, colours, motions, backgrounds), how a scene is
drawn as a random value, rendered to frames and described in English. Pure numpy; knows nothing
about models, training or how a video is judged.

Legend: F frames, H height, W width, P side of the patch that holds one object.
Lengths and positions of a Scene are fractions of the frame, so any size can be rendered.
"""

import math
import re
from dataclasses import dataclass
from itertools import product

import numpy as np

NUM_FRAMES = 17
SIZE = 128

SHAPES = ("circle", "square", "triangle", "star")
# Saturated and of similar chroma, at least 25 degrees apart in the (Cb, Cr) plane.
COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 135, 20),
    "yellow": (240, 225, 40),
    "green": (40, 180, 60),
    "cyan": (40, 215, 225),
    "blue": (40, 80, 230),
    "purple": (140, 50, 210),
    "pink": (245, 90, 190),
}
MOTIONS = ("still", "left", "right", "up", "down", "rotate", "grow", "shrink")
BACKGROUNDS = ("dark", "light", "gradient", "stripes", "checker")
PANS = ("left", "right")
CORNERS = {
    "top left": (0.1, 0.1),
    "top right": (0.9, 0.1),
    "bottom left": (0.1, 0.9),
    "bottom right": (0.9, 0.9),
}

# What a motion does between the first and the last frame. 90 degrees is 5.6 a frame and 22.5 a
# latent frame: below half the symmetry angle of the star (36), so the turn is never ambiguous.
TRAVEL = 0.32
TURN_DEGREES = 90.0
GROWTH = 1.8
PAN_TRAVEL = 0.2

# The two ends of every background's grey ramp; nearly neutral, so that an object's hue decides.
_BACKGROUND_RAMPS = {
    "dark": ((24, 26, 36), (24, 26, 36)),
    "light": ((224, 222, 214), (224, 222, 214)),
    "gradient": ((34, 38, 52), (200, 202, 208)),
    "stripes": ((70, 72, 80), (138, 140, 146)),
    "checker": ((66, 66, 62), (134, 132, 126)),
}
_CELL = 0.125  # a stripe's width, a checker's side

# Every object has the area of a circle of its radius; this is how far its tips then reach.
_STAR_INNER = 0.5
_REACH = {
    "circle": 1.0,
    "square": math.sqrt(math.pi / 2),
    "triangle": math.sqrt(4 * math.pi / (3 * math.sqrt(3))),
    "star": math.sqrt(math.pi / (5 * _STAR_INNER * math.sin(math.pi / 5))),
}
_EDGE = 0.016  # gap between an object and the frame's edge


@dataclass(frozen=True, kw_only=True)
class SecondObject:
    """A small still object in a corner; never touched by the main object."""

    shape: str
    colour: str
    corner: str
    radius: float


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One clip as a value. `x`, `y` and `radius` are those of the first frame.

    The motion is the motion on the screen: with a pan the camera follows the object and only the
    background slides. `shade` is added to every background level (of 255).
    """

    shape: str
    colour: str
    motion: str
    background: str
    x: float
    y: float
    radius: float
    shade: float = 0.0
    pan: str | None = None
    second: SecondObject | None = None


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A scene, one way to say it, and its frames uint8 [F,H,W,3]."""

    scene: Scene
    caption: str
    frames: np.ndarray


def held_out(shape: str, colour: str, motion: str) -> bool:
    """Whether this combination is kept from training.

    One in seven, by a fixed rule that leaves every pair of attribute values in training with
    several values of the third.
    """
    indices = SHAPES.index(shape), list(COLOURS).index(colour), MOTIONS.index(motion)
    return sum(weight * index for weight, index in zip((2, 3, 1), indices, strict=True)) % 7 == 0


def combinations(split: str) -> list[tuple[str, str, str]]:
    """All (shape, colour, motion) of "train" or "held_out"; a turning circle cannot be seen."""
    if split not in ("train", "held_out"):
        raise ValueError(f'split must be "train" or "held_out", not {split!r}')
    return [
        names
        for names in product(SHAPES, COLOURS, MOTIONS)
        if names[::2] != ("circle", "rotate") and held_out(*names) == (split == "held_out")
    ]


_COMBINATIONS = {split: combinations(split) for split in ("train", "held_out")}


# ---------------------------------------------------------------------------------- sampling


def clip_rng(seed: int, index: int) -> np.random.Generator:
    """The generator of clip `index`: the same in every process, independent of its neighbours."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, index])))


def sample_clip(
    seed: int,
    index: int,
    *,
    split: str = "train",
    num_frames: int = NUM_FRAMES,
    height: int = SIZE,
    width: int = SIZE,
) -> Clip:
    """Clip `index` of the endless data set `seed`."""
    rng = clip_rng(seed, index)
    scene = sample_scene(rng, split=split)
    text = caption(scene, rng)
    frames = render(scene, num_frames=num_frames, height=height, width=width)
    return Clip(scene=scene, caption=text, frames=frames)


def sample_scene(rng: np.random.Generator, split: str = "train") -> Scene:
    """A random scene whose (shape, colour, motion) belongs to `split`."""
    shape, colour, motion = _pick(rng, _COMBINATIONS[split])
    background = _pick(rng, BACKGROUNDS)
    radius, largest = _sample_radius(rng, motion)
    x, y = _sample_start(rng, motion, _REACH[shape] * largest)
    # A pan shows only on a pattern; a quarter of two backgrounds in five is one scene in ten.
    pan = None
    if background in ("stripes", "checker") and rng.random() < 0.25:
        pan = _pick(rng, PANS)
    second = None
    if pan is None and rng.random() < 1 / 6:
        second = _sample_second(rng, colour, _path(motion, x, y), _REACH[shape] * largest)
    return Scene(
        shape=shape,
        colour=colour,
        motion=motion,
        background=background,
        x=x,
        y=y,
        radius=radius,
        shade=_between(rng, -8, 8),
        pan=pan,
        second=second,
    )


def _pick(rng, choices):
    # Only random() is drawn on: its stream is one raw word a number in every numpy version.
    return choices[int(rng.random() * len(choices))]


def _between(rng, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def _sample_radius(rng, motion: str) -> tuple[float, float]:
    """(radius in the first frame, largest radius of the clip)."""
    if motion not in ("grow", "shrink"):
        radius = _between(rng, 0.11, 0.15)
        return radius, radius
    small = _between(rng, 0.088, 0.095)
    large = GROWTH * small
    return (small if motion == "grow" else large), large


def _travel(motion: str) -> tuple[float, float]:
    directions = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
    dx, dy = directions.get(motion, (0, 0))
    return TRAVEL * dx, TRAVEL * dy


def _sample_start(rng, motion: str, reach: float) -> tuple[float, float]:
    """A first position from which the whole path stays inside the frame."""
    margin = reach + _EDGE
    low_high = [(margin - min(d, 0), 1 - margin - max(d, 0)) for d in _travel(motion)]
    return tuple(_between(rng, low, high) for low, high in low_high)


def _path(motion: str, x: float, y: float) -> list[tuple[float, float]]:
    dx, dy = _travel(motion)
    return [(x + dx * part, y + dy * part) for part in (0, 0.25, 0.5, 0.75, 1)]


def _sample_second(rng, colour: str, path, reach: float) -> SecondObject | None:
    """An object of another colour in a corner that the main object keeps clear of, if any."""
    shape = _pick(rng, SHAPES)
    other = _pick(rng, [name for name in COLOURS if name != colour])
    radius = _between(rng, 0.05, 0.055)
    clearance = reach + _REACH[shape] * radius + 0.04
    free = [
        name for name, at in CORNERS.items() if min(math.dist(at, p) for p in path) >= clearance
    ]
    if not free:
        return None
    return SecondObject(shape=shape, colour=other, corner=_pick(rng, free), radius=radius)


# --------------------------------------------------------------------------------- rendering


def render(
    scene: Scene, *, num_frames: int = NUM_FRAMES, height: int = SIZE, width: int = SIZE
) -> np.ndarray:
    """The scene's frames, uint8 [F,H,W,3], antialiased by the distance to the outline.

    Only sums, products and square roots are taken of arrays, so the bytes do not depend on the
    processor.
    """
    frames = _render_background(scene, num_frames, height, width)
    short = min(height, width)
    progress_F = np.linspace(0, 1, num_frames) if num_frames > 1 else np.zeros(1)
    ratio = {"grow": GROWTH, "shrink": 1 / GROWTH}.get(scene.motion, 1.0)
    turn = math.radians(TURN_DEGREES) if scene.motion == "rotate" else 0.0
    dx, dy = _travel(scene.motion)
    if scene.second is not None:
        at = CORNERS[scene.second.corner]
        fixed_F = np.zeros(num_frames)
        _draw(
            frames,
            scene.second,
            x_F=fixed_F + at[0] * width,
            y_F=fixed_F + at[1] * height,
            radius_F=fixed_F + scene.second.radius * short,
            angle_F=fixed_F,
        )
    _draw(
        frames,
        scene,
        x_F=(scene.x + dx * progress_F) * width,
        y_F=(scene.y + dy * progress_F) * height,
        radius_F=scene.radius * short * (1 + (ratio - 1) * progress_F),
        angle_F=turn * progress_F,
    )
    return frames


def _render_background(scene: Scene, num_frames: int, height: int, width: int) -> np.ndarray:
    """The background of every frame, uint8 [F,H,W,3]; a camera going left moves it right."""
    start, end = np.array(_BACKGROUND_RAMPS[scene.background], np.float32) + scene.shade
    y_H1 = (np.arange(height, dtype=np.float32)[:, None] + 0.5) / height
    x_W = (np.arange(width, dtype=np.float32) + 0.5) / width
    num_distinct = num_frames if scene.pan else 1
    shift_F = np.zeros(num_distinct)
    if scene.pan:
        shift_F = np.linspace(0, PAN_TRAVEL if scene.pan == "right" else -PAN_TRAVEL, num_frames)
    x_F1W = (x_W + shift_F[:, None]).astype(np.float32)[:, None]
    level = np.zeros((num_distinct, height, width), np.float32)  # 0 at start, 1 at end
    if scene.background == "gradient":
        level += y_H1
    elif scene.background == "stripes":
        level += (1 + _square_wave(x_F1W, width)) / 2
    elif scene.background == "checker":
        level += (1 + _square_wave(x_F1W, width) * _square_wave(y_H1, height)) / 2
    rgb = (start + 0.5 + level[..., None] * (end - start)).clip(0, 255).astype(np.uint8)
    return rgb if scene.pan else np.repeat(rgb, num_frames, axis=0)


def _square_wave(position, num_pixels: int):
    """-1 / 1 in cells of _CELL, with edges one pixel wide."""
    cells = position / _CELL
    from_edge = 0.5 - abs(cells % 1 - 0.5)
    sign = 1 - 2 * (np.floor(cells) % 2)
    return sign * (2 * from_edge * _CELL * num_pixels).clip(0, 1)


def _draw(frames, item: Scene | SecondObject, *, x_F, y_F, radius_F, angle_F) -> None:
    """Paint one object into frames [F,H,W,3] in place; positions and radii in pixels."""
    height, width = frames.shape[1:3]
    half = math.ceil(_REACH[item.shape] * radius_F.max()) + 1
    side = np.arange(2 * half)
    left_F = np.floor(x_F).astype(int) - half
    top_F = np.floor(y_F).astype(int) - half
    dx_F1P = (side + (left_F + 0.5 - x_F)[:, None]).astype(np.float32)[:, None, :]
    dy_FP1 = (side + (top_F + 0.5 - y_F)[:, None]).astype(np.float32)[:, :, None]
    coverage_FPP = _coverage(item.shape, dx_F1P, dy_FP1, radius_F, angle_F)
    colour = np.array(COLOURS[item.colour], np.float32)
    for frame, coverage, left, top in zip(frames, coverage_FPP, left_F, top_F, strict=True):
        rows = slice(*np.clip((top, top + 2 * half), 0, height))
        columns = slice(*np.clip((left, left + 2 * half), 0, width))
        inside = coverage[
            rows.start - top : rows.stop - top, columns.start - left : columns.stop - left, None
        ]
        below = frame[rows, columns].astype(np.float32)
        frame[rows, columns] = below + inside * (colour - below) + 0.5


def _coverage(shape: str, dx_F1P, dy_FP1, radius_F, angle_F) -> np.ndarray:
    """Share of each pixel that the shape covers, [F,P,P], from its signed distance in pixels."""
    u, v = dx_F1P, dy_FP1
    if angle_F.any():
        cos = np.array([math.cos(a) for a in angle_F], np.float32)[:, None, None]
        sin = np.array([math.sin(a) for a in angle_F], np.float32)[:, None, None]
        u, v = cos * dx_F1P + sin * dy_FP1, cos * dy_FP1 - sin * dx_F1P  # clockwise, y is down
    reach = (_REACH[shape] * radius_F).astype(np.float32)[:, None, None]
    if shape == "circle":
        distance = np.sqrt(u * u + v * v) - reach
    elif shape == "square":
        distance = np.maximum(abs(u), abs(v)) - reach * np.float32(math.sqrt(0.5))
    elif shape == "triangle":
        side = np.float32(math.sqrt(0.75)) * abs(u) - np.float32(0.5) * v
        distance = np.maximum(v, side) - reach / 2
    else:
        distance = _star_distance(u, v, reach)
    return (np.float32(0.5) - distance).clip(0, 1)


def _star_distance(u, v, reach):
    """Distance to a five-pointed star: fold the plane onto the half sector of its upper tip."""
    cos, sin = (np.float32(f(math.pi / 5)) for f in (math.cos, math.sin))
    a, w = abs(u), -v
    for _ in range(2):
        beyond = np.maximum(a * cos - w * sin, 0) * 2
        a, w = abs(a - beyond * cos), w + beyond * sin
    inner = np.float32(_STAR_INNER)
    normal_a, normal_w = 1 - inner * cos, inner * sin  # of the edge from the tip to the notch
    length = np.sqrt(normal_a * normal_a + normal_w * normal_w)
    return (normal_a * a + normal_w * (w - reach)) / length


# ---------------------------------------------------------------------------------- captions

SHAPE_WORDS = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
}
COLOUR_WORDS = {name: (name,) for name in COLOURS} | {
    "cyan": ("cyan", "turquoise"),
    "purple": ("purple", "violet"),
}
# (as in "it moves", as in "it is moving")
MOTION_PHRASES = {
    "still": (
        ("stays still", "staying still"),
        ("does not move", "not moving"),
        ("rests in place", "resting in place"),
        ("stands still", "standing still"),
    ),
    "rotate": (
        ("rotates", "rotating"),
        ("spins", "spinning"),
        ("turns around", "turning around"),
        ("rotates in place", "rotating in place"),
    ),
    "grow": (
        ("grows", "growing"),
        ("gets bigger", "getting bigger"),
        ("expands", "expanding"),
        ("becomes larger", "becoming larger"),
    ),
    "shrink": (
        ("shrinks", "shrinking"),
        ("gets smaller", "getting smaller"),
        ("contracts", "contracting"),
        ("becomes smaller", "becoming smaller"),
    ),
    "up": (
        ("moves up", "moving up"),
        ("rises", "rising"),
        ("floats upwards", "floating upwards"),
        ("goes up", "going up"),
    ),
    "down": (
        ("moves down", "moving down"),
        ("falls", "falling"),
        ("sinks downwards", "sinking downwards"),
        ("goes down", "going down"),
    ),
} | {
    side: (
        (f"moves {side}", f"moving {side}"),
        (f"slides to the {side}", f"sliding to the {side}"),
        (f"drifts {side}", f"drifting {side}"),
        (f"travels to the {side}", f"travelling to the {side}"),
        (f"glides {side}wards", f"gliding {side}wards"),
    )
    for side in ("left", "right")
}
BACKGROUND_PHRASES = {
    "dark": ("on a dark background", "against a plain dark background", "in the dark"),
    "light": ("on a light background", "against a plain light background", "on a bright wall"),
    "gradient": ("on a gradient background", "against a grey gradient"),
    "stripes": ("on a striped background", "in front of stripes", "over grey stripes"),
    "checker": ("on a checkered background", "over a checkerboard", "on a grey checkerboard"),
}
_TEMPLATES = (
    "{object} {moves} {where}",
    "{object} {moving} {where}",
    "{where}, {object} {moves}",
    "{object} that {moves} {where}",
    "there is {object} {where} and it {moves}",
    "a video of {object} {moving} {where}",
    "{object} {where}, {moving}",
)
_TEMPLATES_WITHOUT_BACKGROUND = ("{object} {moves}", "{object} {moving}", "{object} that {moves}")
_SECOND_PHRASES = (
    "with {object} in the {corner} corner",
    "and there is {object} in the {corner} corner",
)
_SECOND_SIZES = ("small", "tiny", "little")
_PAN_PHRASES = ("while the camera pans {pan}", "as the camera pans to the {pan}")


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """An English sentence that says what the scene shows; without `rng` the plainest one.

    Shape, colour and motion are always named, a second object and a pan when there is one; one
    random caption in twelve leaves the background open.
    """

    def pick(choices):
        return choices[0] if rng is None else _pick(rng, choices)

    name = f"{pick(COLOUR_WORDS[scene.colour])} {pick(SHAPE_WORDS[scene.shape])}"
    moves, moving = pick(MOTION_PHRASES[scene.motion])
    states_background = rng is None or rng.random() >= 1 / 12
    template = pick(_TEMPLATES if states_background else _TEMPLATES_WITHOUT_BACKGROUND)
    where = pick(BACKGROUND_PHRASES[scene.background])
    parts = [template.format(object=_with_article(name), moves=moves, moving=moving, where=where)]
    if scene.second is not None:
        other = (
            f"{pick(_SECOND_SIZES)} {pick(COLOUR_WORDS[scene.second.colour])} "
            f"{pick(SHAPE_WORDS[scene.second.shape])}"
        )
        phrase = pick(_SECOND_PHRASES)
        parts.append(phrase.format(object=_with_article(other), corner=scene.second.corner))
    if scene.pan is not None:
        parts.append(pick(_PAN_PHRASES).format(pan=scene.pan))
    return " ".join(parts)


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def split_words(text: str) -> list[str]:
    """The lower-case words of a caption or a user's prompt, punctuation dropped."""
    return re.findall(r"[a-z]+", text.lower())


def _vocabulary() -> tuple[str, ...]:
    phrases = [*_TEMPLATES, *_SECOND_PHRASES, *_SECOND_SIZES, *_PAN_PHRASES, *CORNERS, *PANS, "an"]
    for table in (SHAPE_WORDS, COLOUR_WORDS, BACKGROUND_PHRASES):
        phrases += [phrase for choices in table.values() for phrase in choices]
    phrases += [form for pairs in MOTION_PHRASES.values() for pair in pairs for form in pair]
    plain = re.sub(r"\{\w+\}", " ", " ".join(phrases))
    return tuple(sorted(set(split_words(plain))))


VOCABULARY = _vocabulary()
"""Every word a caption can hold, lower case, sorted."""
