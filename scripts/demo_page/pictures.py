"""Pictures of an answer: a strip of its masks, and a moment with the sound around it."""

import io
import math

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from dataloader import audio, front_ends
from scripts.demo_page.answer import Answer, Look
from scripts.demo_page.clip import Clip
from scripts.prediction.masks import OBJECT_COLOUR, Image8, class_colour, enlarged, opacity_table
from scripts.prediction.timing import time_of

COLUMNS = 5
MAX_TILES = 15
TILE = 180  # pixels, width
BAR = 36  # pixels, height of the line below a tile
FONT = 27  # pixels; the page shows the strip at about half its size
PAGE, TEXT = (255, 255, 255), (40, 40, 40)
MARK = "#d62728"
SECONDS = 0.96
"""Length of the sound that belongs to a mask, in all front ends."""
MEL_RANGES = {"vggish": audio.MEL_RANGE, "aisfx": (0.0, front_ends.SAMPLE_RATE / 2)}  # Hz
TICKS = (250, 1000, 2000, 4000, 8000, 16_000)  # Hz


def painted(answered: Answer, index: int, look: Look, width: int, height: int) -> Image8:
    """The frame of a mask with the mask painted in, (height, width, 3)."""
    frame = np.asarray(Image.fromarray(answered.frames[index]).resize((width, height), Image.Resampling.BILINEAR))
    planes = enlarged(answered.masks[index], width, height)
    opacity = opacity_table(look.threshold)[planes[0]][..., None].astype(np.float32) / 256
    colour = np.asarray(look.colour or OBJECT_COLOUR, np.float32)
    if look.colour is None and len(planes) == 2:
        table = np.array([class_colour(number) for number in range(255)], np.float32)
        colour = table[np.minimum(planes[1], 254)]
    return np.asarray((1 - opacity) * frame + opacity * colour).round().astype(np.uint8)


def mask_strip(answered: Answer, clip: Clip, look: Look, moment: float) -> Image8:
    """Frames with their masks in rows of COLUMNS, each with its time and painted share; the moment's is framed.

    Of more than MAX_TILES masks, as many, evenly spaced.
    """
    count = len(answered.masks)
    chosen = np.unique(np.linspace(0, count - 1, min(count, MAX_TILES)).round().astype(int))
    current = int(chosen[np.abs(chosen - answered.index(moment)).argmin()])
    height = max(8, min(round(TILE * clip.height / clip.width), 2 * TILE))
    rows = -(-len(chosen) // COLUMNS)
    image = Image.new("RGB", (COLUMNS * (TILE + 4) + 4, rows * (height + BAR + 4) + 4), PAGE)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=FONT)
    shares = answered.shares(look.threshold)
    for place, index in enumerate(chosen.tolist()):
        left, top = 4 + place % COLUMNS * (TILE + 4), 4 + place // COLUMNS * (height + BAR + 4)
        image.paste(Image.fromarray(painted(answered, index, look, TILE, height)), (left, top))
        text = f"{time_of(index, answered.fps):.1f} s: {shares[index]:.0%}"
        draw.text((left + 4, top + height + 2), text, fill=TEXT, font=font)
        if index == current:
            draw.rectangle((left - 3, top - 3, left + TILE + 2, top + height + 2), outline=MARK, width=3)
    return np.asarray(image)


def moment_picture(answered: Answer, clip: Clip, look: Look, moment: float) -> Image8:
    """The frame at a moment with its mask, and the log-mel that the model hears there, with the moment marked."""
    index = answered.index(moment)
    width = 480
    frame = painted(answered, index, look, width, max(8, min(round(width * clip.height / clip.width), 2 * width)))
    start = answered.window_start(index)
    mel, ticks, labels = _mel_image(answered, index)
    figure = Figure(figsize=(6.4, 2.75), dpi=150)
    # Fixed places: a layout that fits itself takes twice as long.
    left, right = figure.add_axes((0.01, 0.03, 0.37, 0.84)), figure.add_axes((0.52, 0.19, 0.465, 0.68))
    left.imshow(frame)
    left.set_axis_off()
    left.set_title(f"mask of {time_of(index, answered.fps):.2f} s", fontsize=11)
    span = float(np.ptp(mel))
    right.imshow(
        mel,
        origin="lower",
        aspect="auto",
        extent=(start, start + SECONDS, 0, len(mel)),
        cmap="magma",
        vmin=float(mel.min()),
        vmax=float(mel.max()) if span > 1e-6 else float(mel.min()) + 1,
    )
    marked = min(max(moment, start), start + SECONDS)
    right.axvline(marked, color="cyan", linewidth=2)
    right.set_title(f"log-mel, {moment:.2f} s marked" + ("" if span > 1e-6 else " (silent)"), fontsize=11)
    right.set_xlabel("seconds", fontsize=11)
    right.set_ylabel("Hz", fontsize=11)
    right.set_yticks(ticks, labels)
    right.tick_params(labelsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return np.asarray(Image.open(buffer).convert("RGB"))


def _mel_image(answered: Answer, index: int) -> tuple[npt.NDArray[np.float32], list[float], list[str]]:
    """A log-mel as (bands, columns), and where round frequencies lie among the bands."""
    patch = answered.log_mels[index]
    image = patch.reshape(-1, patch.shape[-1]).T
    if answered.front_end not in MEL_RANGES:
        return image, [], []
    low, high = (_mel(frequency) for frequency in MEL_RANGES[answered.front_end])
    places = {tick: (_mel(tick) - low) / (high - low) * len(image) for tick in TICKS}
    inside = [tick for tick in TICKS if 0 < places[tick] < len(image)]
    return image, [places[tick] for tick in inside], [f"{tick:,}" for tick in inside]


def _mel(frequency: float) -> float:
    """HTK's mel scale, of a frequency in Hz."""
    return 1127 * math.log(1 + frequency / 700)
