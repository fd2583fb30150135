"""Sound files, VGGish's log-mel (one (1, 96, 64) patch of 0.96 s per video frame), and a cache of log-mels.

The log-mel is that of VGGish (Hershey et al., "CNN architectures for large-scale audio classification", ICASSP 2017):
25 ms periodic Hann windows every 10 ms, magnitude spectrum, 64 mel bands, logarithm, patches of 96 frames.
"""

import functools
import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torchaudio.compliance.kaldi import get_mel_banks

from dataloader.pickles import read_tensor
from utils.errors import DataError
from utils.files import atomic_path

SAMPLE_RATE = 16_000  # Hz
WINDOW_LENGTH = 400  # samples, 25 ms
HOP_LENGTH = 160  # samples, 10 ms
FFT_LENGTH = 512
MEL_BINS = 64
MEL_RANGE = (125.0, 7500.0)  # Hz
LOG_OFFSET = 0.01
PATCH_FRAMES = 96
PATCH_SHAPE = (1, PATCH_FRAMES, MEL_BINS)
MAX_SECONDS = 60.0
MAX_CHANNELS = 16


def log_mel(waveform: npt.ArrayLike | Tensor, sample_rate: int) -> Tensor:
    """VGGish's input for a waveform.

    Args:
        waveform: (samples,) or (samples, channels), floating point in [-1, 1] or int16; channels are averaged.
        sample_rate: in Hz; anything but 16 kHz is resampled (resampy, kaiser_best, as VGGish does).

    Returns:
        (n, 1, 96, 64) float32, n = whole 0.96 s patches; a partial patch at the end is dropped.

    Raises:
        ValueError: the waveform has more than two axes, or the rate is not positive.
    """
    samples = waveform.detach().cpu().numpy() if isinstance(waveform, Tensor) else np.asarray(waveform)
    if samples.ndim not in (1, 2):
        raise ValueError(f"a waveform is (samples,) or (samples, channels), got shape {samples.shape}")
    if sample_rate <= 0:
        raise ValueError(f"sample_rate must be positive, got {sample_rate}")
    samples = mono(samples)
    if len(samples) * SAMPLE_RATE < samples_for_patches(1) * sample_rate:
        return torch.zeros(0, *PATCH_SHAPE)
    if sample_rate != SAMPLE_RATE:
        import resampy  # imports numba (60 MB), not needed at 16 kHz

        samples = resampy.resample(samples, sample_rate, SAMPLE_RATE, filter="kaiser_best")
    signal = torch.from_numpy(np.ascontiguousarray(samples))
    frames = signal.unfold(0, WINDOW_LENGTH, HOP_LENGTH)  # (frames, WINDOW_LENGTH)
    window = torch.hann_window(WINDOW_LENGTH, periodic=True, dtype=torch.float64)
    magnitude = torch.fft.rfft(frames * window, n=FFT_LENGTH).abs()  # (frames, FFT_LENGTH / 2 + 1)
    mel = torch.log(magnitude[:, : FFT_LENGTH // 2] @ _mel_weights() + LOG_OFFSET)  # (frames, MEL_BINS)
    patches = len(mel) // PATCH_FRAMES
    return mel[: patches * PATCH_FRAMES].reshape(patches, *PATCH_SHAPE).float()


def mono(samples: npt.NDArray[np.generic]) -> npt.NDArray[np.float64]:
    """Samples (n,) or (n, channels), int16 or floating point, as (n,) float64 with full scale 1; channels averaged."""
    signal = samples.astype(np.float64) / 32768.0 if samples.dtype == np.int16 else samples.astype(np.float64)
    return signal.mean(axis=1) if signal.ndim == 2 else signal


def samples_for_patches(patches: int) -> int:
    """Least number of samples at 16 kHz that give `patches` whole log-mel patches."""
    return (patches * PATCH_FRAMES - 1) * HOP_LENGTH + WINDOW_LENGTH if patches else 0


@dataclass(frozen=True)
class FrontEnd:
    """From a waveform to the input of an audio encoder, one patch per frame of the clip.

    Attributes:
        name: as in the encoders' attribute `front_end`.
        version: part of every cache key; change it when the numbers change.
        shape: of a patch.
        length: (patches, sample rate in Hz) -> samples needed for these patches.
        patches: (samples (n,) or (n, channels), sample rate, patches) -> (patches, *shape) float32.
    """

    name: str
    version: str
    shape: tuple[int, ...]
    length: Callable[[int, int], int]
    patches: Callable[[npt.NDArray[np.generic], int, int], Tensor]


def _vggish_length(patches: int, sample_rate: int) -> int:
    return -(-samples_for_patches(patches) * sample_rate // SAMPLE_RATE) + 1  # + 1: resampling rounds the length down


def _vggish_patches(samples: npt.NDArray[np.generic], sample_rate: int, patches: int) -> Tensor:
    return log_mel(samples, sample_rate)[:patches]


VGGISH = FrontEnd(
    name="vggish",
    version="vggish-1",
    shape=PATCH_SHAPE,
    length=_vggish_length,
    patches=_vggish_patches,
)
"""`log_mel`: windows of 0.96 s without overlap."""


def read_wave(path: str | Path, *, max_seconds: float = MAX_SECONDS) -> tuple[npt.NDArray[np.int16], int]:
    """Read a sound file whole, after checking its header.

    Args:
        path: a file that libsndfile reads (wav, flac, ogg).
        max_seconds: longest sound accepted.

    Returns:
        (samples, channels) int16, and the sample rate in Hz.

    Raises:
        DataError: the file is missing, unreadable, empty or truncated, or its header announces more than `max_seconds`.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"the sound {path} is missing.")
    try:
        with soundfile.SoundFile(path) as file:
            rate, announced, channels = file.samplerate, file.frames, file.channels
            if rate < 1 or not 1 <= channels <= MAX_CHANNELS:
                raise DataError(
                    f"the sound {path} has {channels} channels at {rate} Hz; expected 1 to {MAX_CHANNELS} channels "
                    "and a positive rate."
                )
            size = path.stat().st_size
            seconds = max(announced / rate, 0.0)
            if seconds > max_seconds or _riff_bytes(path) > max(64, 4 * size):
                raise DataError(
                    f"the header of the sound {path} announces {_duration(path, rate, seconds)}, more than "
                    f"max_seconds={max_seconds:g}: cut the file, or raise max_seconds."
                )
            samples = file.read(dtype="int16", always_2d=True)
    except (soundfile.LibsndfileError, OSError, RuntimeError, ValueError, TypeError) as error:
        raise DataError(f"the sound {path} cannot be read ({_reason(error)}): replace it.") from error
    if len(samples) == 0:
        raise DataError(f"the sound {path} is empty.")
    if len(samples) < announced:
        raise DataError(f"the sound {path} is truncated: it has {len(samples)} of {announced} samples.")
    return samples, rate


def wave_log_mel(
    path: str | Path, *, patches: int, max_seconds: float = MAX_SECONDS, front_end: FrontEnd = VGGISH
) -> Tensor:
    """Log-mel of a sound file, for a clip that needs `patches` windows.

    A sound up to one second too short is padded with silence.

    Returns:
        (patches, *front_end.shape) float32.

    Raises:
        DataError: the file cannot be read, or is more than one second too short.
    """
    return clip_log_mel(*read_wave(path, max_seconds=max_seconds), path, patches=patches, front_end=front_end)


def clip_log_mel(
    samples: npt.NDArray[np.int16], rate: int, path: str | Path, *, patches: int, front_end: FrontEnd = VGGISH
) -> Tensor:
    """Log-mel of a sound's samples, see `wave_log_mel`.

    Args:
        samples: (samples, channels).
        rate: in Hz.
        path: where they come from, for the message.
        patches: windows of the clip.
        front_end: computes them.

    Raises:
        DataError: the sound is more than one second too short.
    """
    needed = front_end.length(patches, rate)
    missing = needed - len(samples)
    if missing > rate:
        raise DataError(
            f"the sound {path} lasts {len(samples) / rate:.2f} s, but {patches} frames need {needed / rate:.2f} s."
        )
    if missing > 0:
        samples = np.pad(samples, ((0, missing), (0, 0)))
    return front_end.patches(samples, rate, patches)


def check_log_mel(value: Tensor, path: str | Path, *, patches: int) -> Tensor:
    """The first `patches` windows of a stored log-mel, as float32 (patches, 1, 96, 64).

    Raises:
        DataError: another shape or type, fewer windows, or values that are not finite.
    """
    if value.ndim != 4 or tuple(value.shape[1:]) != PATCH_SHAPE or len(value) < patches:
        raise DataError(
            f"the log-mel {path} has shape {tuple(value.shape)}, expected ({patches}, 1, {PATCH_FRAMES}, {MEL_BINS})."
        )
    if not value.is_floating_point():
        raise DataError(f"the log-mel {path} holds {value.dtype}, expected floating point.")
    value = value.detach()[:patches].to(torch.float32, copy=True).contiguous()
    if not bool(torch.isfinite(value).all()):
        raise DataError(f"the log-mel {path} holds values that are not finite.")
    return value


LOG_MEL_KEY = "log_mel"
"""Name of the tensor in a log-mel's safetensors file."""


def read_stored_log_mel(path: str | Path) -> Tensor:
    """A log-mel stored as `.safetensors`, or as AVSBench's `.pkl`, unchecked.

    Raises:
        DataError: the file is missing, damaged, or holds something else.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        return read_tensor(path)
    try:
        with safe_open(path, framework="pt") as file:
            if LOG_MEL_KEY not in file.keys():  # noqa: SIM118
                raise DataError(f"the log-mel {path} holds {', '.join(file.keys()) or 'nothing'}, not {LOG_MEL_KEY!r}.")
            found: Tensor = file.get_tensor(LOG_MEL_KEY)
    except FileNotFoundError as error:
        raise DataError(f"the log-mel {path} is missing.") from error
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"the log-mel {path} cannot be read ({_reason(error)}): remove it, and make it anew."
        ) from error
    return found


class LogMelCache:
    """Computed log-mels on disk, keyed by the sound file's path, size and modification time and by the front end.

    Where the folder cannot be written, the last `memory_clips` results are kept in memory instead.

    Args:
        folder: of the cached files; None = memory only.
        front_end: computes them.
        memory_clips: clips kept in memory without a folder (0.1 MB each for 5 frames).
    """

    def __init__(self, folder: str | Path | None, front_end: FrontEnd = VGGISH, *, memory_clips: int = 2048) -> None:
        """See the class."""
        self.front_end = front_end
        self.folder = Path(folder) if folder is not None else None
        self.memory_clips = memory_clips
        self._memory: OrderedDict[str, Tensor] = OrderedDict()

    def get(self, path: str | Path, *, patches: int, max_seconds: float = MAX_SECONDS) -> Tensor:
        """`wave_log_mel(path, ...)`, from the cache if the file is unchanged."""
        path = Path(path)
        key = self._key(path, patches)
        if key in self._memory:
            self._memory.move_to_end(key)
            return self._memory[key].clone()
        stored = self._load(key, patches)
        if stored is not None:
            return stored
        value = wave_log_mel(path, patches=patches, max_seconds=max_seconds, front_end=self.front_end)
        if not self._store(key, value):
            self._memory[key] = value.clone()
            while len(self._memory) > self.memory_clips:
                self._memory.popitem(last=False)
        return value

    def _key(self, path: Path, patches: int) -> str:
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"the sound {path} is missing.") from error
        text = f"{self.front_end.version}|{path.resolve()}|{status.st_size}|{status.st_mtime_ns}|{patches}"
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]

    def _load(self, key: str, patches: int) -> Tensor | None:
        if self.folder is None:
            return None
        try:
            array = np.load(self.folder / f"{key}.npy", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None  # missing or truncated: computed again
        if array.dtype != np.float32 or array.shape != (patches, *self.front_end.shape):
            return None
        return torch.from_numpy(array)

    def _store(self, key: str, value: Tensor) -> bool:
        if self.folder is None:
            return False
        try:
            with atomic_path(self.folder / f"{key}.npy", durable=False) as part, part.open("wb") as file:
                np.save(file, value.numpy(), allow_pickle=False)
        except OSError:  # read-only or full
            return False
        return True


@functools.cache
def _mel_weights() -> Tensor:
    """(FFT_LENGTH / 2, MEL_BINS) float64: triangular filters, without a row for the highest FFT bin."""
    low, high = MEL_RANGE
    banks, _ = get_mel_banks(MEL_BINS, FFT_LENGTH, float(SAMPLE_RATE), low, high, 0.0, 0.0, 1.0)  # (MEL_BINS, 256)
    weights = banks.to(torch.float64).T.contiguous()
    weights[0] = 0.0  # VGGish leaves out the DC bin
    return weights


def _riff_bytes(path: Path) -> int:
    """Bytes of sound announced by a RIFF header, 0 for other files; libsndfile reports at most the bytes present."""
    with path.open("rb") as file:
        head = file.read(4096)
    if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        return 0
    at = 12  # chunks: id (4 bytes), length (4 bytes), data, padded to an even length
    while at + 8 <= len(head) and head[at : at + 4] != b"data":
        length = int.from_bytes(head[at + 4 : at + 8], "little")
        at += 8 + length + length % 2
    announced = int.from_bytes(head[at + 4 : at + 8], "little") if at + 8 <= len(head) else 0
    return 0 if announced == 0xFFFFFFFF else announced  # all ones: a stream of unknown length, as ffmpeg pipes write


def _duration(path: Path, rate: int, seconds: float) -> str:
    announced = max(seconds, _riff_bytes(path) / (2 * rate))
    return f"{announced:,.0f} s" if announced < 86_400 else f"{announced / 86_400:,.1f} days"


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
