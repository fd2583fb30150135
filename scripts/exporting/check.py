"""Whether a file computes what its model computes."""

import torch
from torch import Tensor

from model.avs_model import AVSModel
from model.moe import Top2Router
from scripts.exporting.formats import Run
from scripts.exporting.graph import Inputs, reason
from utils.errors import ConfigError
from utils.runtime import warn

TOLERANCE = 1e-3
"""Largest difference of a logit from the model's."""
DRAWS = 3
"""Random inputs that a model with routed experts is tried on, at most."""


class Differs(ConfigError):
    """A file's logits are not the model's."""


@torch.no_grad()
def check_agreement(run: Run, model: AVSModel, inputs: Inputs, what: str) -> float:
    """Compare a file with its model on random inputs of two lengths, one frame or clip and three (traced with two).

    A router of experts decides by comparing numbers: where two of them are equal but for rounding, a token goes to one
    expert in one runtime and to another in the next, and the logits around it differ. Of two models, 30 batches of 8
    random frames each were run with ONNX Runtime and one thread, and the three batches that differed were traced, in a
    file that outputs its routes too: its routers decide as PyTorch's do for the same tokens.

    A trained MoDAT (lite0, 128 pixels) differed in 1 batch, in one frame, by 0.078 at most and by more than TOLERANCE
    in 0.2 % of the batch's logits: the gates of one token's second and third expert, 0.195, lie 2.5e-7 apart in
    float64. Eager float32 takes the third; ONNX Runtime and eager float64 take the second, and agree to 1.6e-5. Noise
    of 1e-6 in the input makes eager float32 change sides in 7 of 12 draws, and then agree with the file to 3.4e-5.

    The packed stamps-62 (224 pixels) differed in 2 batches, by 0.31 and 0.18, each in 0.03 % of the logits. In one the
    compiled operators and PyTorch's own lead to different routes, and the file agrees with the latter to 7.4e-5. In the
    other a token's first and second expert, of gates 0.304, lie 5.1e-7 apart and change order; since first choices
    have priority, another token gets the place. In this choice eager float64 sides with eager
    float32, and noise of 1e-6 did not bring eager float32 to the file's side in 12 draws; other tokens are routed
    differently in float64, by which its logits differ from float32's by 1.4e-3.

    A model with routers that differs on one draw of a length is therefore tried on two more, and has to agree on one; a
    warning says so.

    Args:
        run: of the file.
        model: in evaluation mode.
        inputs: its inputs.
        what: names the file in messages.

    Returns:
        The largest difference of a logit, of the draws that agree.

    Raises:
        Differs: by more than TOLERANCE, or in shape.
        ConfigError: the file does not run.
    """
    draws = DRAWS if any(isinstance(module, Top2Router) for module in model.modules()) else 1
    largest = 0.0
    for count in (inputs.multiple, 3 * inputs.multiple):
        where = f"{what} at N = {count}"
        failures: list[Differs] = []
        for draw in range(draws):
            example = inputs.example(count, seed=count + 100 * draw)
            expected: Tensor = model(*example).logits
            try:
                found = run(*example)
            except Exception as error:  # of three runtimes, which have no common class of errors
                raise ConfigError(f"{where} does not run: {reason(error)}.") from error
            try:
                largest = max(largest, difference(found, expected, where))
                break
            except Differs as error:
                failures.append(error)
        if len(failures) == draws:
            raise failures[0]
        for failure in failures:
            warn(f"{failure} It agrees on other inputs: rounding sent a token to another expert.")
    return largest


def difference(found: Tensor, expected: Tensor, where: str) -> float:
    """The largest difference of a logit.

    Raises:
        Differs: it is above TOLERANCE, a value is not a number, or the shapes differ.
    """
    if found.shape != expected.shape:
        raise Differs(f"{where} gives {tuple(found.shape)}, the model {tuple(expected.shape)}.")
    distance = (found - expected).abs().nan_to_num(nan=torch.inf)
    largest = float(distance.max())
    if largest > TOLERANCE:
        share = float((distance > TOLERANCE).float().mean())
        raise Differs(
            f"{where} differs from the model by {largest:.2g} at most, and by more than {TOLERANCE} in "
            f"{100 * share:.3g} % of the logits."
        )
    return largest
