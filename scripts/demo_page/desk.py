"""What the page does, without Gradio: a session per open tab, and what each of its controls shows."""

import secrets
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import av
from PIL import Image

from scripts.demo_page.answer import Answer, Look, Progress, answer, draw_overlay
from scripts.demo_page.clip import Clip, Limits, read_clip, read_other_sound
from scripts.demo_page.models import Models
from scripts.demo_page.pictures import mask_strip, moment_picture
from scripts.demo_page.sentences import public
from scripts.prediction.media import reason
from scripts.prediction.timing import time_of
from utils.errors import DataError, UserError

MUTED = "muted"
MAX_IDLE = 3600.0  # seconds
MAX_SESSIONS = 20


@dataclass(frozen=True)
class Panel:
    """Files of one answer: the overlay, the strip of masks, the moment. None: as before."""

    video: Path | None
    strip: Path
    moment: Path


@dataclass(frozen=True)
class Shown:
    """What the page shows after a change.

    Attributes:
        message: a sentence, escaped for HTML.
        refused: whether it says why something was not done.
        own: with the clip's own sound.
        other: muted, or with another sound.
        other_name: of that sound, escaped for HTML.
        seconds: length of the clip; 0: there is none.
        moment: seconds.
    """

    message: str
    refused: bool = False
    own: Panel | None = None
    other: Panel | None = None
    other_name: str = MUTED
    seconds: float = 0.0
    moment: float = 0.0


@dataclass
class _Session:
    folder: Path
    clip: Clip | None = None
    upload: Path | None = None
    model: str = ""
    own: Answer | None = None
    other: Answer | None = None
    other_name: str = MUTED
    look: Look = field(default_factory=Look)
    moment: float = 0.0
    files: dict[str, list[Path]] = field(default_factory=dict)
    used: float = field(default_factory=time.monotonic)

    def file(self, name: str) -> Path:
        """A new file of a name's kind. The one before it stays, since the tab may still read it; older ones go."""
        kept = self.files.setdefault(name, [])
        while len(kept) > 1:
            kept.pop(0).unlink(missing_ok=True)
        kept.append(self.folder / f"{secrets.token_hex(8)}_{name}")
        return kept[-1]


class Desk:
    """Answers of the page.

    A session is named by a key of its tab. Its files are removed when a clip follows another, when the tab is closed,
    and after MAX_IDLE seconds without a call.

    Args:
        models: to choose from.
        folder: for the files of all sessions and uploads.
        fps: masks per second.
        limits: of uploads.
    """

    def __init__(self, models: Models, folder: Path, fps: float = 1.0, limits: Limits | None = None) -> None:
        self.models, self.folder, self.fps = models, folder, fps
        self.limits = limits or Limits()
        self._sessions: dict[str, _Session] = {}

    def show_clip(self, key: str, upload: Path, model: str, look: Look, progress: Progress | None = None) -> Shown:
        """Take a clip; answer with its own sound, and muted."""

        def work() -> Shown:
            self._drop_clip(key)
            session = self._session(key)
            session.upload, session.look, session.model = upload, look, model
            session.clip = read_clip(upload, session.folder, self.limits)
            return self._answer_both(session, progress)

        return self._guarded(work, upload, failed=lambda: self._drop_clip(key))

    def change_model(self, key: str, model: str, progress: Progress | None = None) -> Shown:
        """The same clip and sounds with another model."""

        def work() -> Shown:
            session = self._with_clip(key)
            session.model = model
            return self._answer_both(session, progress)

        return self._guarded(work)

    def change_sound(self, key: str, sound: Path | None, name: str, progress: Progress | None = None) -> Shown:
        """Compare with another sound; None: muted."""
        wave: list[Path] = []

        def work() -> Shown:
            session = self._with_clip(key)
            assert session.clip is not None
            if sound is not None:
                wave.append(session.folder / f"{secrets.token_hex(8)}.wav")
                read_other_sound(sound, wave[0], session.clip.seconds, self.limits)
            other = self._answer(session, wave[0] if wave else None, progress)
            self._forget(session.other)
            session.other, session.other_name = other, name
            return self._show(session, own_video=False)

        def failed() -> None:
            for path in wave:
                path.unlink(missing_ok=True)

        return self._guarded(work, sound, failed)

    def change_look(self, key: str, look: Look) -> Shown:
        """Draw both answers with another threshold or colour; no model runs."""

        def work() -> Shown:
            session = self._with_clip(key)
            session.look = look
            return self._show(session)

        return self._guarded(work)

    def change_moment(self, key: str, moment: float) -> Shown:
        """Mark another moment; no model runs, and the overlays stay."""

        def work() -> Shown:
            session = self._with_clip(key)
            session.moment = moment
            return self._show(session, own_video=False, other_video=False)

        return self._guarded(work)

    def close(self, key: str) -> None:
        """Remove a session with its files."""
        self._drop_clip(key)
        session = self._sessions.pop(key, None)
        if session is not None:
            shutil.rmtree(session.folder, ignore_errors=True)

    def _session(self, key: str) -> _Session:
        now = time.monotonic()
        for other, session in list(self._sessions.items()):
            if other != key and now - session.used > MAX_IDLE:
                self.close(other)
        while key not in self._sessions and len(self._sessions) >= MAX_SESSIONS:
            self.close(min(self._sessions, key=lambda other: self._sessions[other].used))
        if key not in self._sessions:
            folder = self.folder / secrets.token_hex(16)
            folder.mkdir(parents=True)
            self._sessions[key] = _Session(folder)
        self._sessions[key].used = now
        return self._sessions[key]

    def _with_clip(self, key: str) -> _Session:
        session = self._session(key)
        if session.clip is None or session.own is None:
            raise DataError("There is no clip yet: drop a video, record one, or take an example.")
        return session

    def _drop_clip(self, key: str) -> None:
        session = self._sessions.get(key)
        if session is None:
            return
        upload = session.upload
        shared = any(other is not session and other.upload == upload for other in self._sessions.values())
        if upload is not None and not shared and upload.is_relative_to(self.folder):
            upload.unlink(missing_ok=True)
        self._forget(session.other)
        if session.clip is not None:
            session.clip.remove()
        for paths in session.files.values():
            for path in paths:
                path.unlink(missing_ok=True)
        self._sessions[key] = _Session(session.folder)

    def _forget(self, answered: Answer | None) -> None:
        if answered is not None and answered.sound is not None:
            answered.sound.unlink(missing_ok=True)

    def _answer(self, session: _Session, sound: Path | None, progress: Progress | None) -> Answer:
        assert session.clip is not None
        return answer(self.models.get(session.model), session.clip, sound, self.fps, progress)

    def _answer_both(self, session: _Session, progress: Progress | None) -> Shown:
        assert session.clip is not None
        own = self._answer(session, session.clip.sound, progress)
        other = self._answer(session, session.other.sound if session.other is not None else None, progress)
        if session.own is None:
            most = int(own.shares(session.look.threshold).argmax())
            session.moment = min(time_of(most, own.fps), session.clip.seconds)
        session.own, session.other = own, other
        return self._show(session)

    def _show(self, session: _Session, *, own_video: bool = True, other_video: bool = True) -> Shown:
        assert session.clip is not None and session.own is not None and session.other is not None
        return Shown(
            message=_sentence(session),
            own=self._panel(session, session.own, "own", video=own_video),
            other=self._panel(session, session.other, "other", video=other_video),
            other_name=public(session.other_name),
            seconds=session.clip.seconds,
            moment=session.moment,
        )

    def _panel(self, session: _Session, answered: Answer, name: str, *, video: bool) -> Panel:
        clip, look, moment = session.clip, session.look, session.moment
        assert clip is not None
        overlay = session.file(f"{name}.mp4") if video else None
        if overlay is not None:
            draw_overlay(answered, clip, look, overlay)
        strip, picture = session.file(f"{name}_strip.png"), session.file(f"{name}_moment.png")
        Image.fromarray(mask_strip(answered, clip, look, moment)).save(strip, compress_level=1)
        Image.fromarray(moment_picture(answered, clip, look, moment)).save(picture, compress_level=1)
        return Panel(overlay, strip, picture)

    def _guarded(
        self, work: Callable[[], Shown], named: Path | None = None, failed: Callable[[], object] = lambda: None
    ) -> Shown:
        """The result of `work`; a failure becomes a sentence, after `failed` has cleaned up."""
        try:
            return work()
        except UserError as error:
            message = public(str(error), named)
        except av.FFmpegError as error:
            message = public(f"{named.name if named is not None else 'The clip'} cannot be read ({reason(error)}).")
        except OSError as error:
            message = public(f"The server cannot store the clip ({error.strerror or type(error).__name__}).")
        except Exception:
            traceback.print_exc()
            message = "The page failed at this; the console of the server says where."
        failed()
        return Shown(message, refused=True)


def _sentence(session: _Session) -> str:
    """What is painted with the two sounds, and what was wrong with the clip."""
    clip, own, other = session.clip, session.own, session.other
    assert clip is not None and own is not None and other is not None
    shares = [float(each.shares(session.look.threshold).mean()) for each in (own, other)]
    sound = "with its own sound" if clip.sound is not None else "without a sound track, as in silence,"
    name = MUTED if session.other_name == MUTED else "with the other sound"
    text = (
        f"{clip.name}, {clip.seconds:.1f} s: {sound} {shares[0]:.1%} of the picture is painted on average, "
        f"{name} {shares[1]:.1%}."
    )
    return public(f"{text} {clip.damage}".strip())
