"""The page in Gradio: its layout, and its controls wired to the desk."""

import html
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from scripts.demo_page.answer import Look
from scripts.demo_page.desk import MUTED, Desk, Shown
from scripts.demo_page.examples import Example
from scripts.prediction.masks import RGB

COLOURS: dict[str, RGB | None] = {
    "automatic": None,
    "orange": (255, 140, 0),
    "green": (0, 190, 90),
    "blue": (60, 120, 255),
    "magenta": (230, 40, 200),
}
OWN_SOUND = "a sound of yours"
FONTS = ("system-ui", "sans-serif")
MONO = ("ui-monospace", "monospace")
CSS = """
#clip video { max-height: 250px; }
#model input { font-size: 13px; text-overflow: ellipsis; }
#message p { margin: 0; padding: 10px 14px; border-radius: 6px; font-size: 16px; line-height: 1.4; }
#message .said { background: #eef3f8; color: #1c2733; }
#message .refused { background: #fdecea; color: #8a1f11; }
.strip, .moment { background: white; }
.strip img, .moment img { width: 100%; object-fit: contain; }
"""
QUEUE: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "page", "api_visibility": "private"}
"""All events wait in one queue."""
_CALLS = itertools.count()
PROGRESS = gr.Progress()
WELCOME = "Drop a video with sound, record one, or take an example."


def theme() -> Any:
    """Gradio's plain theme with fonts of the reader's system."""
    return gr.themes.Base(primary_hue="orange", font=FONTS, font_mono=MONO)


def build(desk: Desk, examples: Sequence[Example]) -> Any:
    """The page.

    Args:
        desk: of the models that it offers.
        examples: clips to try, and sounds to compare with.
    """
    sounds = {f"example {number}: {each.sounds}": each.wave for number, each in enumerate(examples, 1)}
    limits = desk.limits
    with gr.Blocks(
        title="What sounds in this video?", analytics_enabled=False, fill_width=True, delete_cache=(600, 7200)
    ) as page:
        gr.Markdown(
            "# What sounds in this video?\n"
            "The model paints what it takes to be sounding. Beside it, the same pictures muted or with another sound: "
            "if the masks stay the same, the model does not listen."
        )
        message = gr.HTML(_message(Shown(WELCOME)), elem_id="message", padding=False)
        with gr.Row():
            with gr.Column(scale=2, min_width=340):
                video = gr.Video(
                    label=f"video, up to {limits.seconds:.0f} s and {limits.megabytes:.0f} MB",
                    sources=["upload", "webcam"],
                    include_audio=True,
                    webcam_options=gr.WebcamOptions(mirror=False),
                    elem_id="clip",
                )
                gr.Markdown("Examples: what sounds, beside what is silent")
                buttons = [
                    gr.Button(f"{number}: {each.label}", size="sm", elem_id=f"example-{number}")
                    for number, each in enumerate(examples, 1)
                ]
                model = gr.Dropdown(desk.models.names, value=desk.models.names[0], label="model", elem_id="model")
                threshold = gr.Slider(0.05, 0.95, value=0.5, step=0.05, label="threshold", elem_id="threshold")
                colour = gr.Dropdown(list(COLOURS), value="automatic", label="colour", elem_id="colour")
                moment = gr.Slider(0, limits.seconds, value=0, step=0.05, label="moment, seconds", elem_id="moment")
                compare = gr.Radio(
                    [MUTED, *sounds, OWN_SOUND], value=MUTED, label="compare with the sound", elem_id="compare"
                )
                other_sound = gr.Audio(
                    label="the other sound, from its start on",
                    sources=["upload", "microphone"],
                    type="filepath",
                    visible=False,
                    elem_id="other-sound",
                )
            panels = [_panel("With its own sound", "own"), _panel(_title(MUTED), "other")]
        outputs = [message, *panels[0], *panels[1], moment]
        both = [*outputs, compare, other_sound, video]

        def on_clip(
            upload: str | None, name: str, share: float, tint: str, request: gr.Request, progress: Any = PROGRESS
        ) -> list[Any]:
            if upload is None:
                desk.close(_key(request))
                shown = Shown(WELCOME)
            else:
                shown = desk.show_clip(_key(request), Path(upload), name, _look(share, tint), _reporter(progress))
            file = gr.update(value=None) if shown.refused else gr.update()
            return [*_updates(shown), MUTED, gr.update(visible=False, value=None), file]

        def on_model(name: str, request: gr.Request, progress: Any = PROGRESS) -> list[Any]:
            return _updates(desk.change_model(_key(request), name, _reporter(progress)))

        def on_look(share: float, tint: str, request: gr.Request) -> list[Any]:
            return _updates(desk.change_look(_key(request), _look(share, tint)), clears=False)

        def on_moment(seconds: float, request: gr.Request) -> list[Any]:
            return _updates(desk.change_moment(_key(request), seconds), clears=False)

        def on_compare(name: str, upload: str | None, request: gr.Request, progress: Any = PROGRESS) -> list[Any]:
            visible = gr.update(visible=name == OWN_SOUND)
            if name == OWN_SOUND and upload is None:
                said = Shown("Drop a sound or a video with sound, or record one, to compare with.")
                return [*_updates(said, clears=False), visible]
            sound = Path(str(upload)) if name == OWN_SOUND else sounds.get(name)
            shown = desk.change_sound(_key(request), sound, name, _reporter(progress))
            return [*_updates(shown, clears=False), visible]

        def on_close(request: gr.Request) -> None:
            desk.close(_key(request))

        def on_seek(seconds: float) -> list[Any]:
            # A player seeks only where the position differs from the one it was given before.
            return [gr.update(playback_position=seconds + next(_CALLS) % 10 * 1e-3)] * 2

        clip_inputs = [video, model, threshold, colour]
        changes = [
            gr.on([video.upload, video.stop_recording, video.clear], on_clip, clip_inputs, both, **QUEUE),
            model.input(on_model, model, outputs, **QUEUE),
            gr.on(
                [threshold.input, colour.input],
                on_look,
                [threshold, colour],
                outputs,
                trigger_mode="always_last",
                **QUEUE,
            ),
            moment.input(on_moment, moment, outputs, trigger_mode="always_last", show_progress="hidden", **QUEUE),
            gr.on(
                [compare.input, other_sound.upload, other_sound.stop_recording],
                on_compare,
                [compare, other_sound],
                [*outputs, other_sound],
                **QUEUE,
            ),
        ]
        for button, example in zip(buttons, examples, strict=True):
            taken = button.click(lambda path=str(example.video): path, None, video, **QUEUE)
            changes.append(taken.then(on_clip, clip_inputs, both, **QUEUE))
        for change in changes:
            change.then(
                on_seek,
                moment,
                [panels[0][1], panels[1][1]],
                show_progress="hidden",
                api_visibility="private",
                queue=False,
            )
        page.unload(on_close)
    page.queue(max_size=16, api_open=False)
    return page


def _panel(title: str, name: str) -> list[Any]:
    """Title, overlay, strip of masks, moment."""
    shown: dict[str, Any] = {"show_label": False, "interactive": False}
    with gr.Column(scale=4, min_width=360):
        return [
            gr.Markdown(f"### {title}", elem_id=f"title-{name}"),
            gr.Video(height=400, buttons=["download"], elem_id=f"video-{name}", **shown),
            gr.Image(buttons=[], elem_id=f"strip-{name}", elem_classes="strip", **shown),
            gr.Image(buttons=[], elem_id=f"moment-{name}", elem_classes="moment", **shown),
        ]


def _title(sound: str) -> str:
    return "Muted" if sound == MUTED else f"With the sound of {sound}" if sound != OWN_SOUND else "With your sound"


def _updates(shown: Shown, *, clears: bool = True) -> list[Any]:
    """Values of the message, four outputs per panel, and the slider of the moment.

    Args:
        shown: what to show.
        clears: empty a panel that is not shown, instead of leaving it.
    """
    out: list[Any] = [_message(shown)]
    for panel, title in ((shown.own, gr.update()), (shown.other, f"### {_title(shown.other_name)}")):
        if panel is None:
            out += [gr.update(), *[None if clears else gr.update()] * 3]
        else:
            video = gr.update() if panel.video is None else str(panel.video)
            out += [title, video, str(panel.strip), str(panel.moment)]
    out.append(
        gr.update(maximum=round(shown.seconds, 2), value=round(shown.moment, 2)) if shown.seconds else gr.update()
    )
    return out


def _message(shown: Shown) -> str:
    return f'<p class="{"refused" if shown.refused else "said"}" role="status">{shown.message}</p>'


def _look(threshold: float, colour: str) -> Look:
    return Look(min(max(float(threshold), 0.01), 0.99), COLOURS.get(colour))


def _key(request: gr.Request) -> str:
    return str(request.session_hash)


def _reporter(progress: Any) -> Any:
    return lambda share, what: progress(share, desc=html.escape(what))
