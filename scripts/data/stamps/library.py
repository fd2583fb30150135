"""The material: photographs with alpha, recordings and background textures, from Tux Paint's stamps or drawn."""

import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import librosa
import numpy as np
import numpy.typing as npt
import soundfile
from PIL import Image, ImageDraw, ImageFilter

from dataloader.audio import SAMPLE_RATE
from utils.errors import DataError

PACKAGE = "tuxpaint-stamps-default"
PACKAGE_FOLDER = Path("usr/share/tuxpaint/stamps")

# Class name -> stamp. The photographs are clean cut-outs and the recordings can be told apart: between any two of them
# the log-mels differ at least three times as much as two windows of the same one (median nearest distance). The order
# gives the class numbers: new kinds go to the end. Left out: giraffe, rhea, iguana and wombat (silent recordings),
# mountain goat and ram (the goat's recording), camel (the dromedary's), beaver (the badger's), bee, bat, cat, ghost and
# spider (drawings), scissors (smaller than 75 pixels), glass and lightning (transparent).
KINDS: dict[str, str] = {
    "dog": "animals/mammals/dogs/dog",
    "crow": "animals/birds/crow",
    "frog": "animals/amphibians/frog",
    "elephant": "animals/mammals/elephant",
    "sheep": "animals/mammals/bovines/sheep",
    "violin": "hobbies/music/string/violin",
    "owl": "animals/birds/owl",
    "zebra": "animals/mammals/equines/zebra",
    "firetruck": "vehicles/emergency/firetruck",
    "rooster": "animals/birds/rooster",
    "pig": "animals/mammals/pig",
    "drum": "hobbies/music/percussion/drumkit",
    "grasshopper": "animals/insects/grasshopper",
    "cow": "animals/mammals/bovines/cow",
    "penguin": "animals/birds/penguin",
    "toucan": "animals/birds/tucan",
    "lion": "animals/mammals/cats/lion",
    "kettle": "household/kettle",
    "hornet": "animals/insects/hornet",
    "seagull": "animals/birds/seagull",
    "dolphin": "animals/mammals/aquatic/dolphin",
    "cello": "hobbies/music/string/cello",
    "deer": "animals/mammals/deer/deer",
    "rubber-duck": "household/rubberduck",
    "fox": "animals/mammals/dogs/fox",
    "horse": "animals/mammals/equines/horse",
    "squirrel": "animals/mammals/rodents/squirrel",
    "vulture": "animals/birds/vulture",
    "koala": "animals/marsupials/koala",
    "hen": "animals/birds/hen",
    "sea-lion": "animals/mammals/aquatic/sea_lion",
    "goat": "animals/mammals/bovines/goat",
    "bull": "animals/mammals/bovines/bull",
    "cymbal": "hobbies/music/percussion/cymbal_crash",
    "donkey": "animals/mammals/equines/donkey",
    "dromedary": "animals/mammals/camel/dromedary",
    "duck": "animals/birds/duck",
    "hammer": "household/tools/hammer",
    "blackbird": "animals/birds/blackbird",
    "cuckoo": "animals/birds/cuckoo",
    "goose": "animals/birds/gander",
    "heron": "animals/birds/heron_greatblue_flying",
    "lark": "animals/birds/lark",
    "turkey": "animals/birds/turkey",
    "quetzal": "animals/birds/quetzal",
    "chimp": "animals/mammals/apes/chimp",
    "gorilla": "animals/mammals/apes/gorilla",
    "orca": "animals/mammals/aquatic/orca",
    "whale": "animals/mammals/aquatic/whale",
    "bear": "animals/mammals/bears/bear",
    "bison": "animals/mammals/bovines/bison",
    "tiger": "animals/mammals/cats/tiger",
    "caribou": "animals/mammals/deer/caribou",
    "ferret": "animals/mammals/ferret",
    "hippopotamus": "animals/mammals/hippopotamus",
    "badger": "animals/mammals/badger",
    "mouse": "animals/mammals/rodents/mouse",
    "rabbit": "animals/mammals/rodents/rabbit",
    "bassoon": "hobbies/music/wind/bassoon",
    "camera": "hobbies/camera_35mm",
    "toilet": "household/toilet",
    "saw": "household/tools/saw",
}
# Class name -> a second instance of the same kind, for the split `unseen` alone.
#   kept   sheep: lamb                  another age and colour, a bleat
#          pig: Tamworth pig            another breed and pose, a grunt
#          drum: floor tom              one drum instead of a kit, struck
#          cow: white cow               seen from the front, another moo
#          duck: drake                  another plumage, a quack
#          hammer: metal mallet         another head, a stroke
#   not    goat: mountain goat          the same recording
#          dromedary: camel             the camel's recording contains the dromedary's
#          hornet: bee                  a drawing
#          scissors: open, closed       photographs of less than 75 pixels
#          deer: doe, caribou           recordings without a common character
#          pig: second Tamworth pig     of the same breed as the first; one is enough
#          lion: tiger, crow: blackbird, horse: donkey, bull: bison, ...  other species, kinds of their own
SECOND: dict[str, str] = {
    "sheep": "animals/mammals/bovines/sheep_lamb",
    "pig": "animals/mammals/pig_golden",
    "drum": "hobbies/music/percussion/drum_tomtom_floor",
    "cow": "animals/mammals/bovines/cow_white",
    "duck": "animals/birds/drake",
    "hammer": "household/tools/mallet_metal",
}
# Photographs with a large opaque part: ground, walls, leaves.
TEXTURES = (
    "plants/flowers/anemone_red",
    "food/fruit/Apricot_whole",
    "food/fruit/orange_seville",
    "food/spices/ginger",
    "food/fruit/cherimoya",
    "household/tools/cementmixer",
    "seasonal/christmas/Roast_turkey",
    "space/planets/5_jupiter",
    "household/cylinder",
    "seasonal/christmas/Mince_Pie",
    "food/fruit/kiwi",
    "vehicles/wheel_tractor",
    "food/fruit/Strawberry2",
    "vehicles/garbagetruck",
    "town/monuments/inukshuk-photo",
    "plants/flowers/daffodil",
    "plants/trees/rambutan",
    "seasonal/christmas/Christmas_pudding",
    "household/home_compost_bin",
    "space/planets/8_neptune",
    "food/fruit/Cherry_Stella",
    "vehicles/masstransit/green_korean_bus",
    "seasonal/halloween/grave-i",
    "space/planets/7_uranus",
)
MAX_DRAWN_KINDS = 24
DRAWN_WAVEFORMS = ("sine", "square", "modulated")
"""Waveforms of drawn kinds, in turn."""
_PHOTOGRAPH_SIDE = 448  # pixels; larger photographs are reduced once, when they are read
_REMOVED_BELOW = 30.0  # dB below the loudest: pauses in a recording
_KEPT_PAUSE = 0.08  # seconds left where a pause was


@dataclass(frozen=True)
class Kind:
    """One thing that sounds.

    `photograph` is RGBA, cropped to what is visible; `sound` is (samples,) float32 at 16 kHz, without pauses, of RMS 1.
    """

    name: str
    photograph: Image.Image
    sound: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Library:
    """All material of a data set.

    Args:
        kinds: in the order of their class numbers.
        textures: square RGB photographs for backgrounds.
        unseen: second instances for the split `unseen`, by position in `kinds`.
    """

    kinds: list[Kind]
    textures: list[Image.Image] = field(default_factory=list)
    unseen: dict[int, Kind] = field(default_factory=dict)


def fetch_stamps(folder: Path) -> Path:
    """Download Debian's package of stamps and unpack what is needed into `folder`, without installing anything.

    Returns:
        The root of the stamps, which holds `animals/` and the others.

    Raises:
        DataError: apt-get or dpkg-deb is missing, or the download failed.
    """
    root = folder / "stamps"
    files = [Path(f"{stem}.png") for stem in TEXTURES]
    files += [Path(stem + suffix) for stem in (*KINDS.values(), *SECOND.values()) for suffix in (".png", ".ogg")]
    if all((root / file).is_file() for file in files):
        return root
    apt, unpacker = shutil.which("apt-get"), shutil.which("dpkg-deb")
    if apt is None or unpacker is None:
        raise DataError(
            f"apt-get and dpkg-deb are needed to fetch {PACKAGE}: give --stamps DIR with its files, or --drawn."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="download-") as temporary:
        work = Path(temporary)
        download = [apt, "download", "-q", PACKAGE]
        done = subprocess.run(download, cwd=work, capture_output=True, text=True, check=False)
        if done.returncode != 0:  # the lists of packages may be absent or old
            subprocess.run([apt, "update", "-q"], capture_output=True, text=True, check=False)
            done = subprocess.run(download, cwd=work, capture_output=True, text=True, check=False)
        packages = list(work.glob("*.deb"))
        if done.returncode != 0 or not packages:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise DataError(f"apt-get cannot download {PACKAGE} ({reason}): give --stamps DIR, or --drawn.")
        subprocess.run([unpacker, "-x", str(packages[0]), str(work / "unpacked")], check=True, capture_output=True)
        source = work / "unpacked" / PACKAGE_FOLDER
        chosen = work / "chosen"
        for file in files:
            if (source / file).is_file():
                (chosen / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.move(source / file, chosen / file)
        if root.is_dir():  # an earlier selection
            root.rename(work / "earlier")
        chosen.rename(root)
    return root


def load_stamps(root: Path, kinds: int) -> Library:
    """Read the first `kinds` stamps, their second instances and all textures.

    Args:
        root: holds `animals/` and the others; the package's own root or `usr/share/tuxpaint/stamps` may be above it.
        kinds: how many.

    Raises:
        DataError: a stamp is missing, or there are fewer kinds than `kinds`.
    """
    if kinds > len(KINDS):
        raise DataError(f"--kinds {kinds}: there are {len(KINDS)} kinds of stamps.")
    root = root / PACKAGE_FOLDER if (root / PACKAGE_FOLDER).is_dir() else root
    chosen = list(KINDS.items())[:kinds]
    second = {number: (name, SECOND[name]) for number, (name, _) in enumerate(chosen) if name in SECOND}
    for stem in [stem for _, stem in (*chosen, *second.values())] + list(TEXTURES):
        if not (root / f"{stem}.png").is_file():
            raise DataError(f"{root / stem}.png is missing: --stamps must name the unpacked files of {PACKAGE}.")
    return Library(
        kinds=[_stamp(root, name, stem) for name, stem in chosen],
        textures=[_opaque_square(root / f"{stem}.png") for stem in TEXTURES],
        unseen={number: _stamp(root, name, stem) for number, (name, stem) in second.items()},
    )


def kind_names(kinds: int, *, drawn: bool) -> list[str]:
    """Names of the first kinds, in the order of their class numbers."""
    return [f"shape-{number}" for number in range(kinds)] if drawn else list(KINDS)[:kinds]


def unseen_kinds(kinds: int, *, drawn: bool) -> list[int]:
    """Positions of the kinds with a second instance; empty where they are too few for clips of several objects.

    Args:
        kinds: number of kinds in use.
        drawn: drawn kinds, which all have one, instead of stamps.
    """
    positions = [number for number, name in enumerate(list(KINDS)[:kinds]) if name in SECOND]
    positions = list(range(kinds)) if drawn else positions
    return positions if len(positions) > 1 else []


def drawn_library(kinds: int, seed: int) -> Library:
    """A stand-in without any download: textured shapes, each with a synthesised sound of its own.

    Raises:
        DataError: more kinds than can be told apart.
    """
    if kinds > MAX_DRAWN_KINDS:
        raise DataError(f"--kinds {kinds}: at most {MAX_DRAWN_KINDS} can be drawn.")
    rng, rng_second = np.random.default_rng((seed, 7)), np.random.default_rng((seed, 8))
    return Library(
        kinds=[Kind(f"shape-{number}", _drawn_shape(number, rng), _drawn_sound(number)) for number in range(kinds)],
        textures=[_drawn_texture(rng) for _ in range(8)],
        unseen={
            number: Kind(f"shape-{number}", _drawn_shape(number, rng_second).rotate(20), _drawn_sound(number, 0.2))
            for number in range(kinds)
        },
    )


def _stamp(root: Path, name: str, stem: str) -> Kind:
    return Kind(name, _cut_out(root / f"{stem}.png"), _recording(root / f"{stem}.ogg"))


def _cut_out(path: Path) -> Image.Image:
    with Image.open(path) as image:
        stamp = image.convert("RGBA")
    box = stamp.getchannel("A").point(lambda alpha: 255 if alpha > 127 else 0).getbbox()
    stamp = stamp.crop(box)
    stamp.thumbnail((_PHOTOGRAPH_SIDE, _PHOTOGRAPH_SIDE), Image.Resampling.LANCZOS)
    return stamp


def _recording(path: Path) -> npt.NDArray[np.float32]:
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise DataError(f"the recording {path} cannot be read ({error}).") from error
    mono = librosa.resample(samples.mean(axis=1), orig_sr=rate, target_sr=SAMPLE_RATE)
    pause = np.zeros(round(_KEPT_PAUSE * SAMPLE_RATE), np.float32)
    loud = librosa.effects.split(mono, top_db=_REMOVED_BELOW, frame_length=512, hop_length=128)
    sound = np.concatenate([part for start, end in loud for part in (mono[start:end], pause)])
    return _unit_rms(sound)


def _opaque_square(path: Path) -> Image.Image:
    """The largest square of a photograph that is opaque throughout."""
    with Image.open(path) as image:
        photograph = image.convert("RGBA")
    scale = max(1.0, max(photograph.size) / 120)
    small = photograph.resize((max(1, int(photograph.width / scale)), max(1, int(photograph.height / scale))))
    opaque = np.asarray(small)[..., 3] > 250
    side, bottom, right = 0, 0, 0
    above = [0] * (opaque.shape[1] + 1)
    for row in range(opaque.shape[0]):  # sides of the squares that end at each pixel, row by row
        current = [0] * len(above)
        for column in range(opaque.shape[1]):
            if opaque[row, column]:
                current[column + 1] = 1 + min(above[column], above[column + 1], current[column])
                if current[column + 1] > side:
                    side, bottom, right = current[column + 1], row + 1, column + 1
        above = current
    left, top, right, bottom = (int(value * scale) for value in (right - side, bottom - side, right, bottom))
    return photograph.convert("RGB").crop((left, top, right, bottom))


def _unit_rms(sound: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    return (sound / np.sqrt(np.mean(np.square(sound)) + 1e-12)).astype(np.float32)


def _drawn_shape(number: int, rng: np.random.Generator) -> Image.Image:
    side = 256
    corners, hue = 3 + number % 6, (number * 97) % 256
    radius = np.tile([1.0, 0.45 if number % 2 else 0.85], corners) * side * 0.48
    angle = np.linspace(0, 2 * np.pi, 2 * corners, endpoint=False) - np.pi / 2
    outline = np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius[:, None] + side / 2
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).polygon([(float(x), float(y)) for x, y in outline], fill=255)
    grain = rng.integers(90, 256, (8 + number, 8 + number)).astype(np.uint8)
    value = Image.fromarray(grain).resize((side, side), Image.Resampling.NEAREST)
    flat = [Image.new("L", (side, side), level) for level in (hue, 140 + (number * 53) % 110)]
    shape = Image.merge("HSV", (flat[0], flat[1], value)).convert("RGB")
    shape.putalpha(mask)
    return shape.crop(mask.getbbox())


def _drawn_sound(number: int, shift: float = 0.0) -> npt.NDArray[np.float32]:
    time = np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE
    pitch = 160.0 * 2 ** ((number + shift) / 5.5)  # Hz
    beat = 2.0 + 1.7 * (number % 7 + shift)  # Hz
    makers: tuple[Callable[[], npt.NDArray[np.floating]], ...] = (
        lambda: np.sin(2 * np.pi * pitch * time),
        lambda: np.sign(np.sin(2 * np.pi * pitch * time)),
        lambda: np.sin(2 * np.pi * pitch * time + 4 * np.sin(2 * np.pi * beat * time)),
    )
    return _unit_rms(makers[number % 3]() * (0.55 + 0.45 * np.sin(2 * np.pi * beat * time)))


def _drawn_texture(rng: np.random.Generator) -> Image.Image:
    coarse = rng.integers(40, 220, (9, 9, 3)).astype(np.uint8)
    texture = Image.fromarray(coarse).resize((192, 192), Image.Resampling.BICUBIC)
    return texture.filter(ImageFilter.GaussianBlur(2))


def class_names(kinds: tuple[str, ...], classes: int = 71) -> dict[str, int]:
    """AVSS's `label2idx.json`: background, these kinds, and names of AVSBench-semantic that do not occur in the clips.

    Returns:
        Name -> class number, `classes` of them.
    """
    names = ["background", *kinds]
    names += [name for name in _OTHER_NAMES.split() if name not in names]
    names += [f"unused-{number}" for number in range(classes)]
    return {name: number for number, name in enumerate(names[:classes])}


# Class names of AVSBench-semantic (its label2idx.json), one word each.
_OTHER_NAMES = """
accordion airplane axe baby bassoon bell bird boat boy bus car cat clarinet clipper clock donkey duck emergency-car erhu
flute frying-food girl goose guitar gun guzheng hair-dryer handpan harmonica harp helicopter hen horse keyboard leopard
man marimba missile-rocket motorcycle mower parrot piano pipa saw saxophone sitar sorna squirrel tabla tank tiger
tractor train trombone truck trumpet tuba ukulele utv vacuum-cleaner wolf woman
"""
