"""Two models on the same clips: how large is the difference of their mIoU, and may it be chance?"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats  # type: ignore[import-untyped]

RESAMPLES = 9999
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Comparison:
    """A difference of mIoU, other - first, 0 to 1.

    Attributes:
        difference: mean over clips.
        low: of the 95 % interval; NaN for a single clip.
        high: of the interval.
        p: two-sided.
        clips: compared.
    """

    difference: float
    low: float
    high: float
    p: float
    clips: int


def compare(first: Sequence[pd.Series], other: Sequence[pd.Series]) -> Comparison:
    """Compare two models, trained with the same seeds, clip by clip.

    d_c is the mean over seeds of the difference of the two mIoU of clip c, and their mean over clips the difference.
    Interval: paired bootstrap over clips, that is of d_c, bias-corrected and accelerated (Efron & Tibshirani, An
    Introduction to the Bootstrap, 1993, section 14.3; paired resampling of test items: Koehn, EMNLP 2004), by
    scipy.stats.bootstrap. p: share of random signs of d_c that give a mean at least as far from 0, the paired
    randomisation test of Fisher (1935), by scipy.stats.permutation_test. Both are about other clips with these trained
    weights; what another seed does is the deviation over seeds.

    Args:
        first: per seed, name of the clip -> mIoU, 0 to 1.
        other: of the same seeds and clips.

    Raises:
        ValueError: no seeds, numbers of seeds that differ, or different clips.
    """
    if not first or len(first) != len(other):
        raise ValueError(f"{len(first)} and {len(other)} seeds cannot be paired")
    clips = first[0].index
    if any(set(scores.index) != set(clips) or not scores.index.is_unique for scores in (*first, *other)):
        raise ValueError("the runs were scored on different clips: the data has changed between them")
    differences = np.mean([b.reindex(clips) - a.reindex(clips) for a, b in zip(first, other, strict=True)], axis=0)
    difference = float(differences.mean())
    if len(clips) < 2:
        return Comparison(difference, np.nan, np.nan, 1.0, len(clips))
    if np.ptp(differences) < 1e-12:  # a bootstrap has nothing to resample
        low = high = difference
    else:
        interval = stats.bootstrap(
            (differences,), np.mean, confidence_level=CONFIDENCE, n_resamples=RESAMPLES, rng=np.random.default_rng(0)
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    test = stats.permutation_test(
        (differences, np.zeros_like(differences)),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(0),
    )
    return Comparison(difference, low, high, float(test.pvalue), len(clips))
