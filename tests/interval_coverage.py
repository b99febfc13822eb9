"""How often intervals hold the truth where there is no difference: `python -m tests.interval_coverage [TRIALS]`.

Prints the table of docs/evidence.md: for each made-up world the share of intervals that hold 0, of the interval that
`aspo compare` writes, of percentiles of the same resamples, and of t over the seeds alone.
"""

import sys

import numpy as np

from aspo.compare.statistics import Table, interval, resampled, seed_interval
from aspo.evaluation.figures import ratio

ACCURACY = ratio("accuracy", "accuracy", "right", "asked")
WORLDS = (  # seeds, scenes, sd of seed, of system x scene, of noise
    (8, 1000, 0.05, 0.0, 0.3),
    (8, 1000, 0.05, 0.3, 0.1),
    (8, 1000, 0.02, 0.3, 0.1),
    (8, 1000, 0.1, 0.1, 0.05),
    (8, 5000, 0.1, 0.1, 0.05),
    (4, 1000, 0.05, 0.2, 0.1),
)


def table(right):
    """A system's counts of a (seeds, scenes) array of right answers."""
    right = np.asarray(right, dtype=np.float64)
    return Table(np.stack([right, np.ones_like(right)], axis=-1), ("right", "asked"))


def coverage(trials, seeds, scenes, seed_sd, system_by_scene_sd, noise_sd, resamples=400):
    """Share of intervals that hold the true difference, 0: (t on resamples, their percentiles, t over seeds alone)."""
    rng = np.random.default_rng(1)
    held = np.zeros(3)
    for trial in range(trials):
        scene = rng.normal(0, 1, scenes)

        def system(scene=scene):
            by_scene, by_seed = rng.normal(0, system_by_scene_sd, (1, scenes)), rng.normal(0, seed_sd, (seeds, 1))
            return rng.normal(0, noise_sd, (seeds, scenes)) + scene + by_scene + by_seed > 0

        a, b = system(), system()
        values = resampled({"a": table(a), "b": table(b)}, [ACCURACY], resamples, seed=trial)
        difference = values["b"]["accuracy"] - values["a"]["accuracy"]
        ours, alone = interval(difference, seeds), seed_interval((b.mean(1) - a.mean(1)).tolist())
        low, high = np.percentile(difference[1:], [2.5, 97.5])
        held += [ours.low <= 0 <= ours.high, low <= 0 <= high, alone.low <= 0 <= alone.high]
    return held / trials


if __name__ == "__main__":
    for world in WORLDS:
        print(*world, *(f"{share:.3f}" for share in coverage(int((sys.argv[1:] or [400])[0]), *world)), flush=True)
