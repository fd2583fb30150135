"""The overlay: the video with its masks painted in, a strip with sound and painted share below, the sound kept."""

import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from scripts.prediction.masks import OBJECT_COLOUR, RGB, Image8, Tint, class_colour, with_alpha
from scripts.prediction.media import open_media, read_channels
from scripts.prediction.model import Planes
from scripts.prediction.source import Frame, Source

CLOCK = Fraction(1, 60_000)
AAC_RATES = (8000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 64_000, 88_200, 96_000)  # Hz
AAC_LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}
COPIED = ("aac", "mp3", "ac3", "eac3", "alac")
"""Sounds that MP4 holds as they are; others are encoded as AAC."""
BACKGROUND, LINE, TEXT = (24, 24, 24), (190, 190, 190), (230, 230, 230)
CURSOR = 235
QUIET = 0.05  # peak of full scale; quieter sounds are not drawn at full height


def even(size: int) -> int:
    """The next even number; YUV 4:2:0 has half the colour pixels."""
    return size + size % 2


def strip_height(height: int) -> int:
    """Rows of the strip below a picture."""
    return even(min(max(48, height // 6), 160))


def draw_strip(
    width: int,
    height: int,
    peaks: npt.NDArray[np.float32],
    shares: npt.NDArray[np.float32],
    colour: RGB = OBJECT_COLOUR,
) -> Image.Image:
    """The strip, RGB of (width, height).

    Args:
        width: even, pixels.
        height: even, pixels.
        peaks: of the sound per column, full scale 1, (width,); drawn in proportion to the largest.
        shares: of the picture painted per column, 0 to 1, (width,); drawn likewise.
        colour: of the shares.
    """
    image = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(image)
    wave, low = height * 11 // 20, height - 3
    middle = wave // 2 + 1
    most = max(float(shares.max(initial=0)), 0.01)
    heights = peaks / max(float(peaks.max(initial=0)), QUIET) * (wave // 2 - 2)
    for column in range(width):
        draw.line([(column, middle - heights[column]), (column, middle + heights[column])], fill=LINE)
        if shares[column] > 0:
            draw.line([(column, low), (column, low - shares[column] / most * (low - wave - 2))], fill=colour)
    if width >= 160:
        style: dict[str, Any] = {"fill": TEXT, "font": _font(height), "stroke_width": 2, "stroke_fill": BACKGROUND}
        draw.text((4, 1), "sound", **style)
        draw.text((4, wave), f"painted share, up to {most:.0%}", **style)
    return image


def draw_legend(strip: Image.Image, names: Sequence[str], classes: Sequence[int]) -> Image.Image:
    """A copy of the strip with the names of classes in its upper right corner, behind squares of their colours."""
    out = strip.copy()
    draw, font = ImageDraw.Draw(out), _font(strip.height)
    side = max(9, strip.height // 8)
    right = strip.width - 4
    for name, index in reversed(list(zip(names, classes, strict=True))):
        right -= round(font.getlength(name))
        draw.text((right, 1), name, fill=TEXT, font=font)
        right -= side + 4
        draw.rectangle((right, 2, right + side, 2 + side), fill=class_colour(index))
        right -= side
    return out


def _font(height: int) -> Any:
    return ImageFont.load_default(size=max(9, height // 8))


def _planes_of(image: Image.Image) -> tuple[Image8, Image8, Image8]:
    picture = av.VideoFrame.from_ndarray(np.asarray(image), "rgb24").reformat(format="yuv420p")
    return split(np.asarray(picture.to_ndarray(), np.uint8), image.height)


def split(stacked: Image8, height: int) -> tuple[Image8, Image8, Image8]:
    """Y, U and V as views of the array (height * 3 / 2, width) of YUV 4:2:0."""
    width = stacked.shape[1]
    colour = stacked[height:].reshape(2, height // 2, width // 2)
    return stacked[:height], colour[0], colour[1]


class Track:
    """A picture track of a container that is written.

    Args:
        container: from `av.open(..., 'w')`.
        codec: name of the encoder.
        width, height: pixels.
        rate: pictures per second, on average.
        pixels: format, 'yuv420p' for example.
        options: of the encoder.
    """

    def __init__(
        self, container: Any, codec: str, width: int, height: int, rate: float, pixels: str, options: dict[str, str]
    ) -> None:
        self.container = container
        self.stream = container.add_stream(codec, rate=Fraction(rate).limit_denominator(1001), options=options)
        self.stream.width, self.stream.height, self.stream.pix_fmt = width, height, pixels
        self.stream.codec_context.time_base = CLOCK
        self._last = -1
        self._durations: dict[int, int] = {}  # by pts, of pictures inside the encoder

    def write(self, picture: av.VideoFrame, time: float, duration: float) -> None:
        """Encode a picture that is shown from `time` for `duration`, seconds."""
        self._last = max(round(time / CLOCK), self._last + 1)
        picture.pts, picture.time_base = self._last, CLOCK
        self._durations[self._last] = max(1, round(duration / CLOCK))
        self._mux(picture)

    def close(self) -> None:
        """Encode what is left."""
        self._mux(None)

    def _mux(self, picture: av.VideoFrame | None) -> None:
        for packet in self.stream.encode(picture):
            # The last picture has no successor that ends it.
            packet.duration = self._durations.pop(packet.pts, packet.duration)
            self.container.mux(packet)


class OverlayWriter:
    """Writes the overlay as MP4; a context manager.

    The sound is copied where MP4 holds it, else encoded as AAC. Pictures keep their times, so a variable frame rate
    stays one.

    Args:
        path: of the file.
        source: size, orientation and sound.
        strip: from `draw_strip`, of the even width.
        classes: names by class index, for the legend; two names for one kind of object, which has none.
        duration: of the pictures, seconds.
    """

    def __init__(
        self, path: Path, source: Source, strip: Image.Image, duration: float, classes: Sequence[str] = ()
    ) -> None:
        self.source, self.duration, self.classes = source, max(duration, 1e-6), classes
        self.width, self.height = even(source.width), even(source.height)
        rows = self.height + strip.height
        self.container = av.open(str(path), "w", format="mp4", options={"movflags": "faststart"})
        if "libx264" in av.codecs_available:
            codec, options = (
                "libx264",
                {"preset": "veryfast", "crf": "20", "bf": "0"},
            )  # B-frames shorten the last picture
        else:
            codec, options = "mpeg4", {"qscale": "3", "flags": "+qscale", "global_quality": str(3 * 118)}
        self.track = Track(self.container, codec, self.width, rows, source.rate, "yuv420p", options)
        if source.aspect != 1:
            aspect = 1 / source.aspect if source.orientation.swap else source.aspect
            self.track.stream.codec_context.sample_aspect_ratio = Fraction(aspect).limit_denominator(1000)
        self._sound = _sound(self.container, source, self.duration)
        self._sound_at = -1.0
        self._canvas = np.empty((rows * 3 // 2, self.width), np.uint8)
        self._planes = split(self._canvas, rows)
        self._plain, self._legend = strip, [-1]
        self.legend([])

    def __enter__(self) -> "OverlayWriter":
        """Nothing is written before the first picture."""
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Write what is left, unless an error is on its way, and close the file."""
        try:
            if kind is None:
                self._sound_until(float("inf"))
                self.track.close()
        finally:
            self.container.close()

    def legend(self, present: list[int]) -> None:
        """Name these classes in the strip, from the next picture on."""
        if present == self._legend:
            return
        self._legend = present
        names = [self.classes[index] for index in present]
        self.strip = _planes_of(draw_legend(self._plain, names, present) if present else self._plain)
        for plane, part in zip(self._planes, self.strip, strict=True):
            plane[-len(part) :] = part

    def write(self, frame: Frame, tint: Tint) -> None:
        """Write a picture with its mask."""
        planes = self._upright(frame)
        area = tuple(plane[: len(part)] for plane, part in zip(self._planes, planes, strict=True))
        for plane, part in zip(area, planes, strict=True):
            plane[:] = part
        tint.apply((area[0], area[1], area[2]))
        rows, column = len(self.strip[0]), self._column(frame.time)
        self._planes[0][-rows:, column : column + 2] = CURSOR
        self._sound_until(frame.time)
        picture = av.VideoFrame.from_ndarray(self._canvas, "yuv420p")
        picture.colorspace, picture.color_range = _tags(frame.picture)
        self.track.write(picture, frame.time, frame.duration)
        self._planes[0][-rows:, column : column + 2] = self.strip[0][:, column : column + 2]

    def _upright(self, frame: Frame) -> tuple[Image8, ...]:
        width, height = self.source.orientation.size(self.width, self.height)
        stored = np.asarray(frame.picture.reformat(width=width, height=height, format="yuv420p").to_ndarray(), np.uint8)
        return tuple(self.source.orientation.apply(plane) for plane in split(stored, height))

    def _column(self, time: float) -> int:
        return min(int(time / self.duration * self.width), self.width - 2) // 2 * 2

    def _sound_until(self, time: float) -> None:
        while self._sound_at <= time:
            try:
                self._sound_at = next(self._sound)
            except StopIteration:
                self._sound_at = float("inf")
                return


def open_masks_video(path: Path, source: Source) -> tuple[Any, Track]:
    """A container and its track for masks with alpha: QuickTime Animation in a .mov, which loses nothing.

    ProRes 4444 takes eight times as long, for a file of the same size.

    Returns:
        The container, to be closed, and the track; feed it with `mask_picture`.
    """
    container = av.open(str(path), "w", format="mov")
    return container, Track(container, "qtrle", even(source.width), even(source.height), source.rate, "argb", {})


def mask_picture(mask: Planes, source: Source) -> av.VideoFrame:
    """A mask (P, h, w) as a picture with alpha, of the source's size rounded up to even numbers."""
    rgba = with_alpha(mask, even(source.width), even(source.height))
    return av.VideoFrame.from_ndarray(rgba, "rgba").reformat(format="argb")


def _sound(container: Any, source: Source, duration: float) -> Iterator[float]:
    """Adds the sound track at once; the iterator writes it piece by piece, and gives the time reached, seconds."""
    track = source.sound_file
    if track is None:
        return iter(())
    with open_media(track.path) as file:
        stream = file.streams.audio[track.index]
        known = file.format.name.split(",")[0] in ("mov", "matroska")
        channels = stream.codec_context.layout.nb_channels
        copied = known and track.own and stream.codec_context.name in COPIED
        if copied:
            return _copied(container, source, container.add_stream_from_template(stream))
    rate = min(AAC_RATES, key=lambda rate: (abs(rate - track.rate), rate))
    layout = AAC_LAYOUTS.get(channels, "stereo")
    target = container.add_stream("aac", rate=rate, layout=layout)
    end = None if track.own else round(duration * rate)
    return _encoded(container, source, target, rate, layout, end)


def _copied(container: Any, source: Source, target: Any) -> Iterator[float]:
    track = source.sound_file
    assert track is not None
    with open_media(track.path) as file:
        stream = file.streams.audio[track.index]
        shift = round(track.zero / stream.time_base)
        packets, last = file.demux(stream), None
        while True:
            try:
                packet = next(packets, None)
            except av.FFmpegError as error:
                source.damage.note(f"{track.path}: the sound breaks off ({error}).")
                return
            if packet is None:
                return
            if packet.dts is None or packet.pts is None or packet.pts + (packet.duration or 0) <= shift:
                continue
            if last is not None and packet.dts <= last:  # a fault of the time stamps, which MP4 does not hold
                continue
            last = packet.dts
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            time = float(packet.pts * packet.time_base)
            packet.stream = target
            container.mux(packet)
            yield time


def _encoded(container: Any, source: Source, target: Any, rate: int, layout: str, end: int | None) -> Iterator[float]:
    track = source.sound_file
    assert track is not None
    resampler = av.AudioResampler(format="fltp", layout=layout, rate=rate)
    samples, written = 0, 0
    pieces = (_audio_frame(piece, layout, track.rate) for piece in read_channels(track, source.damage, layout))
    for frame in itertools.chain(pieces, [None]):
        if frame is not None:
            frame.pts, frame.time_base = samples, Fraction(1, track.rate)
            samples += frame.samples
        for part in resampler.resample(frame):
            sound = np.asarray(part.to_ndarray(), np.float32)[:, : None if end is None else max(0, end - written)]
            if sound.shape[1] == 0:
                continue
            out = _audio_frame(sound, layout, rate)
            out.pts, out.time_base = written, Fraction(1, rate)
            written += out.samples
            container.mux(target.encode(out))
        yield written / rate
        if end is not None and written >= end:
            break
    container.mux(target.encode(None))


def _audio_frame(samples: npt.NDArray[np.float32], layout: str, rate: int) -> av.AudioFrame:
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=layout)
    frame.rate = rate
    return frame


def _tags(picture: av.VideoFrame) -> tuple[int, int]:
    """Colour space and range of the overlay: the picture's, or BT.601 for one that was RGB; limited range."""
    rgb = picture.format.name.startswith(("rgb", "bgr", "gbr", "argb", "abgr", "pal", "gray"))
    return (6 if rgb else int(picture.colorspace)), 1
