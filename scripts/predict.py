"""Masks of what sounds in a video: python scripts/predict.py VIDEO... [options]."""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from utils.errors import ConfigError, DataError, UserError  # noqa: E402
from utils.runtime import USER_ERROR, run  # noqa: E402

INCOMPLETE = 3
"""Exit status where a file was damaged: the results end at the break, or leave out what could not be decoded."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="predict.sh",
        description="Segment the sounding objects of videos: DIR/NAME/overlay.mp4, masks and result.json for each.",
        epilog="Exit status: 0 all done; 2 a video or option was refused; 3 a video is damaged and was done in part. "
        "The same command again goes on where it was interrupted.",
    )
    parser.add_argument(
        "videos",
        nargs="+",
        metavar="VIDEO",
        help="a video; a folder of pictures with a sound; a picture (with --sound)",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="W",
        help="a packed model, by file or name, or weights of --config; default: the first model in model/packed/",
    )
    parser.add_argument("--config", metavar="C", help="config of the weights; default: the one inside a packed model")
    parser.add_argument("--out", metavar="DIR", default="predictions", help="default: predictions")
    parser.add_argument("--fps", type=float, default=1.0, help="masks per second, up to the video's rate; default: 1")
    parser.add_argument(
        "--between",
        default="hold",
        metavar="{hold,blend}",
        help="masks between two predictions: hold each for its time (default), or blend them linearly",
    )
    parser.add_argument(
        "--masks",
        default="png",
        metavar="{png,video,none}",
        help="a PNG per prediction (default), one video with alpha (QuickTime Animation), or none",
    )
    parser.add_argument("--threshold", type=float, default=0.5, help="of the painted probability; default: 0.5")
    parser.add_argument("--sound", metavar="FILE", type=Path, help="take this sound instead of the video's own")
    parser.add_argument("--silent", action="store_true", help="go on with silence where there is no sound")
    parser.add_argument(
        "--fps-in", type=float, default=1.0, help="pictures per second of a folder of pictures; default: 1"
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "32", "bf16", "16"),
        default="auto",
        help="default: auto, the fastest of 32 and bf16 on this device",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace results of other options")
    return parser.parse_args(arguments)


def main() -> int:
    """Predict all videos; failures are reported at the end."""
    given = parse()
    # Imported only now: --help should not wait for torch.
    from rich.console import Console

    from scripts.prediction import Options, Prediction, load_for_prediction, predict
    from scripts.prediction.run import result_name

    options = Options(
        fps=given.fps,
        between=given.between,
        masks=given.masks,
        threshold=given.threshold,
        silent=given.silent,
        sound=given.sound,
        fps_in=given.fps_in,
    )
    videos = list(dict.fromkeys(Path(name) for name in given.videos))
    names = [result_name(video) for video in videos]
    for video, name in zip(videos, names, strict=True):
        if names.count(name) > 1:
            raise ConfigError(
                f"{video} and another video would both write {given.out}/{name}: run them with two --out."
            )
    if not any(video.exists() for video in videos):
        raise DataError(f"{videos[0]} does not exist.")
    model = load_for_prediction(given.checkpoint, given.config, precision=given.precision)
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"model: {model.description['checkpoint']}, precision {model.precision}", markup=False)
    failed: list[str] = []
    damaged: list[str] = []
    for video in videos:
        try:
            done: Prediction = predict(
                model, video, given.out, options=options, overwrite=given.overwrite, console=console
            )
        except UserError as error:
            failed.append(f"error: {error}")
            if len(videos) > 1:
                console.print(failed[-1], markup=False)
            continue
        console.print(f"{video}: {done.count} masks over {done.seconds:.2f} s: {done.overlay}", markup=False)
        if done.damage:
            damaged.append(f"damaged: {done.damage} Everything before it is in {done.folder}.")
    for message in (*damaged, *failed):
        print(message, file=sys.stderr)
    if len(videos) > 1 and failed:
        print(f"{len(failed)} of {len(videos)} videos failed.", file=sys.stderr)
    return USER_ERROR if failed else INCOMPLETE if damaged else 0


if __name__ == "__main__":
    run(main)
