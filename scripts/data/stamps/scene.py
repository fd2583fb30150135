"""One clip: positions of the objects, when each sounds, frames, masks and sound.

Frame t of the video corresponds to second t of the sound. VGGish cuts its windows at multiples of 0.96 s, so a sound
for frames a..b starts at a seconds and ends at 0.96 (b + 1) seconds: it is then inside the windows of its own frames,
those of one second and those of VGGish alike, and outside all others.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageFilter

from dataloader.audio import SAMPLE_RATE
from scripts.data.stamps.library import Kind, Library

_PATCH_SECONDS = 0.96
_FADE_SECONDS = 0.01
_LEVEL = 0.07  # RMS of a sound at 0 dB gain
_LONGEST_RUN = 6  # seconds
_TRIES = 40


@dataclass(frozen=True)
class Recipe:
    """Distribution of a clip's content.

    Args:
        frames: T, one per second.
        objects: probabilities of 1, 2, 3, ... objects in the clip.
        sounding: probabilities that 1, 2, 3, ... of them sound at some time; of two or more, at least one is silent.
        steady: the sounding object sounds from the first to the last second.
    """

    frames: int
    objects: tuple[float, ...]
    sounding: tuple[float, ...]
    steady: bool


@dataclass(frozen=True)
class Scene:
    """A finished clip.

    frames: (T, H, W, 3) uint8; owners: (T, H, W) uint8, 0 = background, k = the k-th object; kinds: class number of
    each object (from 1); heard: (T, objects) bool; sound: (samples,) float32 at 16 kHz.
    """

    frames: npt.NDArray[np.uint8]
    owners: npt.NDArray[np.uint8]
    kinds: npt.NDArray[np.uint8]
    heard: npt.NDArray[np.bool_]
    sound: npt.NDArray[np.float32]

    def all_objects(self) -> npt.NDArray[np.uint8]:
        """(T, H, W) uint8 class numbers of every object, sounding or not."""
        return np.concatenate([np.zeros(1, np.uint8), self.kinds])[self.owners]

    def sounding_objects(self) -> npt.NDArray[np.uint8]:
        """(T, H, W) uint8 class numbers of the objects that sound in each frame."""
        table = np.concatenate([np.zeros((len(self.heard), 1), np.uint8), self.kinds * self.heard], axis=1)
        return np.stack([table[frame][self.owners[frame]] for frame in range(len(table))])


def compose(
    library: Library,
    recipe: Recipe,
    *,
    size: int,
    held_out: bool,
    rng: np.random.Generator,
    first_kind: int | None = None,
    unseen: bool = False,
) -> Scene:
    """Draw a clip.

    Args:
        library: photographs, recordings and textures.
        recipe: distribution of its content.
        size: height and width, pixels.
        held_out: take the textures that are not used in training.
        rng: source of all random draws.
        first_kind: position in `library.kinds` of the first object, which sounds; None = any.
        unseen: take the second instances, `library.unseen`, instead of `library.kinds`.
    """
    material = library.unseen if unseen else dict(enumerate(library.kinds))
    kinds, heard = draw_content(recipe, sorted(material), rng=rng, first_kind=first_kind)
    instances = [material[kind] for kind in kinds.tolist()]
    frames, owners = _render(instances, library.textures, recipe.frames, size, held_out, rng)
    return Scene(frames, owners, (kinds + 1).astype(np.uint8), heard, _mix(instances, heard, rng))


def draw_content(
    recipe: Recipe, available: Sequence[int], *, rng: np.random.Generator, first_kind: int | None = None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """The first draws of a clip: which kinds are in it, and when each of them sounds.

    Args:
        recipe: distribution of its content.
        available: positions of the kinds to choose from.
        rng: source of the draws.
        first_kind: position of the first object, which sounds; None = any.

    Returns:
        (objects,) positions of the kinds, and (T, objects) whether each sounds.
    """
    count = 1 + int(rng.choice(len(recipe.objects), p=recipe.objects))
    count = min(count, len(available))
    kinds = np.asarray(available, np.int64)[rng.permutation(len(available))[:count]]
    if first_kind is not None:
        kinds = np.concatenate([[first_kind], kinds[kinds != first_kind]])[:count]
    return kinds, _schedule(recipe, count, rng)


def _schedule(recipe: Recipe, count: int, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """(T, count) bool: the first objects sound at some time, each in one or two runs of seconds."""
    heard = np.zeros((recipe.frames, count), bool)
    most = max(1, count - 1)
    sounding = min(most, 1 + int(rng.choice(len(recipe.sounding), p=recipe.sounding)))
    for position in range(sounding):
        if recipe.steady:
            heard[:, position] = True
            continue
        for _ in range(1 + int(rng.random() < recipe.frames / 20)):
            length = int(rng.integers(2, min(recipe.frames, _LONGEST_RUN) + 1))
            start = int(rng.integers(0, recipe.frames - length + 1))
            heard[start : start + length, position] = True
    return heard


def _mix(instances: list[Kind], heard: npt.NDArray[np.bool_], rng: np.random.Generator) -> npt.NDArray[np.float32]:
    length = len(heard) * SAMPLE_RATE
    sound = rng.normal(0.0, 10 ** (rng.uniform(-62, -52) / 20), length)
    for position, instance in enumerate(instances):
        for start, end in runs(heard[:, position]):
            first = start * SAMPLE_RATE
            last = min(length, round(_PATCH_SECONDS * end * SAMPLE_RATE))
            gain = _LEVEL * 10 ** (rng.uniform(-4, 4) / 20)
            sound[first:last] += gain * _excerpt(instance.sound, last - first, rng)
    peak = np.abs(sound).max()
    return (sound * min(1.0, 0.98 / peak)).astype(np.float32)


def runs(flags: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Stretches of True as (start, end), end excluded."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def _excerpt(recording: npt.NDArray[np.float32], length: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """`length` samples of a recording looped, from a random position, up to 4 % faster or slower."""
    positions = rng.uniform(0, len(recording)) + np.arange(length) * rng.uniform(0.96, 1.04)
    looped = np.append(recording, recording[0])
    excerpt = np.interp(positions % len(recording), np.arange(len(looped)), looped)
    ramp = np.minimum(1.0, np.arange(length) / (_FADE_SECONDS * SAMPLE_RATE))
    return excerpt * ramp * ramp[::-1]


def _render(
    instances: list[Kind],
    textures: list[Image.Image],
    frames: int,
    size: int,
    held_out: bool,
    rng: np.random.Generator,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Frames (T, H, W, 3) and, per pixel, the object in front (T, H, W), counted from 1."""
    margin = max(2, size // 24)
    ground = _background(textures, size + 2 * margin, held_out, rng)
    actors = [_prepare(instance.photograph, len(instances), size, rng) for instance in instances]
    centres = _centres(actors, size, rng)
    depth = rng.permutation(len(instances))  # the depth is independent of which object sounds
    sway = [_Sway(size, rng) for _ in instances]
    pan = _Sway(size, rng)
    light = rng.uniform(0.75, 1.15)
    images = np.empty((frames, size, size, 3), np.uint8)
    owners = np.zeros((frames, size, size), np.uint8)
    for frame in range(frames):
        left, top = (int(np.clip(margin + shift, 0, 2 * margin)) for shift in pan.shift(frame))
        canvas = ground.crop((left, top, left + size, top + size))
        for position in depth:
            actor, alpha = _posed(actors[position], centres[position], sway[position], frame, size)
            canvas.paste(actor, (0, 0), alpha)
            owners[frame][np.asarray(alpha) > 127] = position + 1
        images[frame] = np.asarray(ImageEnhance.Brightness(canvas).enhance(light))
    return images, owners


class _Sway:
    """Small smooth motion of one thing over the seconds."""

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        self.reach = rng.uniform(0.005, 0.03, 2) * size
        self.phase = rng.uniform(0, 2 * np.pi, 4)
        self.speed = rng.uniform(0.4, 1.3, 4)
        self.turn = rng.uniform(0, 6)
        self.growth = rng.uniform(0, 0.04)

    def shift(self, frame: int) -> tuple[float, float]:
        wave = np.sin(self.speed[:2] * frame + self.phase[:2]) * self.reach
        return float(wave[0]), float(wave[1])

    def degrees(self, frame: int) -> float:
        return float(np.sin(self.speed[2] * frame + self.phase[2]) * self.turn)

    def scale(self, frame: int) -> float:
        return float(1 + np.sin(self.speed[3] * frame + self.phase[3]) * self.growth)


def _prepare(photograph: Image.Image, crowd: int, size: int, rng: np.random.Generator) -> Image.Image:
    """A photograph at its size in this clip, perhaps mirrored, with its own light and colour."""
    side = size * rng.uniform(0.44, 0.68) * (1.0, 0.95, 0.88, 0.8)[min(crowd, 4) - 1]
    scale = side / np.sqrt(photograph.width * photograph.height)
    scale = min(scale, 0.85 * size / max(photograph.size))
    target = (max(4, round(photograph.width * scale)), max(4, round(photograph.height * scale)))
    actor = photograph.convert("RGBa").resize(target, Image.Resampling.LANCZOS).convert("RGBA")
    if rng.random() < 0.5:
        actor = actor.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    alpha = actor.getchannel("A")
    colour = ImageEnhance.Brightness(actor.convert("RGB")).enhance(rng.uniform(0.75, 1.25))
    colour = ImageEnhance.Color(colour).enhance(rng.uniform(0.7, 1.25))
    colour.putalpha(alpha)
    return colour


def _centres(actors: list[Image.Image], size: int, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Centres (x, y) in pixels that keep the objects inside, and apart as far as a fixed number of tries allows."""
    best: list[tuple[float, float]] = []
    least = np.inf
    for _ in range(_TRIES):
        centres = [
            (
                float(rng.uniform(min(actor.width / 2, size / 2), max(size - actor.width / 2, size / 2))),
                float(rng.uniform(min(actor.height / 2, size / 2), max(size - actor.height / 2, size / 2))),
            )
            for actor in actors
        ]
        overlap = sum(
            _shared(actors[one], centres[one], actors[two], centres[two])
            for one in range(len(actors))
            for two in range(one)
        )
        if overlap < least:
            best, least = centres, overlap
        if least < 0.05:
            break
    return best


def _shared(one: Image.Image, one_at: tuple[float, float], two: Image.Image, two_at: tuple[float, float]) -> float:
    """Share of the smaller box that the other covers."""
    width = min(one_at[0] + one.width / 2, two_at[0] + two.width / 2) - max(
        one_at[0] - one.width / 2, two_at[0] - two.width / 2
    )
    height = min(one_at[1] + one.height / 2, two_at[1] + two.height / 2) - max(
        one_at[1] - one.height / 2, two_at[1] - two.height / 2
    )
    return max(0.0, width) * max(0.0, height) / min(one.width * one.height, two.width * two.height)


def _posed(
    actor: Image.Image, centre: tuple[float, float], sway: _Sway, frame: int, size: int
) -> tuple[Image.Image, Image.Image]:
    """The object on a canvas of the frame's size: colours, and its alpha."""
    shift = sway.shift(frame)
    radians, scale = np.deg2rad(sway.degrees(frame)), sway.scale(frame)
    cosine, sine = np.cos(radians) / scale, np.sin(radians) / scale
    x, y = centre[0] + shift[0], centre[1] + shift[1]
    matrix = (
        cosine,
        sine,
        actor.width / 2 - cosine * x - sine * y,
        -sine,
        cosine,
        actor.height / 2 + sine * x - cosine * y,
    )
    posed = actor.convert("RGBa").transform(
        (size, size), Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR
    )
    posed = posed.convert("RGBA")
    return posed.convert("RGB"), posed.getchannel("A")


def _background(textures: list[Image.Image], size: int, held_out: bool, rng: np.random.Generator) -> Image.Image:
    """A wall, and in most clips a floor: crops of photographs, mirrored, tinted and out of focus."""
    chosen = [texture for number, texture in enumerate(textures) if (number % 4 == 3) == held_out]
    ground = _surface(chosen[int(rng.integers(len(chosen)))], size, rng)
    if rng.random() < 0.75:
        floor = _surface(chosen[int(rng.integers(len(chosen)))], size, rng)
        rows = np.arange(size)[:, None] + rng.uniform(-0.15, 0.15) * (np.arange(size)[None] - size / 2)
        edge = (rows - size * rng.uniform(0.35, 0.8)) / rng.uniform(1.0, size / 16)
        blend = Image.fromarray((255 / (1 + np.exp(-np.clip(edge, -30, 30)))).astype(np.uint8))
        ground.paste(floor, (0, 0), blend)
    return ground


def _surface(texture: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    side = max(8, int(texture.width * rng.uniform(0.45, 1.0)))
    left, top = (int(rng.integers(0, texture.width - side + 1)) for _ in range(2))
    tile = texture.crop((left, top, left + side, top + side))
    if rng.random() < 0.5:  # four mirrored copies: finer grain without seams
        mirrored = tile.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        wide = Image.new("RGB", (2 * side, 2 * side))
        for x, half in ((0, tile), (side, mirrored)):
            wide.paste(half, (x, 0))
            wide.paste(half.transpose(Image.Transpose.FLIP_TOP_BOTTOM), (x, side))
        tile = wide
    tile = tile.rotate(90 * int(rng.integers(4))).resize((size, size), Image.Resampling.BICUBIC)
    tile = tile.filter(ImageFilter.GaussianBlur(rng.uniform(0.0, 0.02) * size))
    tile = ImageEnhance.Color(tile).enhance(rng.uniform(0.2, 1.0))
    tile = ImageEnhance.Contrast(tile).enhance(rng.uniform(0.5, 1.0))
    return ImageEnhance.Brightness(tile).enhance(rng.uniform(0.6, 1.3))
