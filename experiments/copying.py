"""Does a model copy its training images?

Of each model the setting with the smallest mean Fréchet distance is taken. Its images of seed 0
are compared with real training images. The novelty of a sample is the distance to its nearest
training image over that of test images: 1 is as new as a test image. Copies are the samples that
are nearer than 95 % of the test images, which is 5 % by chance. For the real images, novelty and
copies are those of test images. ± is two standard errors over the samples (recall: over the test
images).

Writes the table and pairs.png: the samples of each model that come closest to a training image,
each above that training image, and the same for test images, which nobody copied.
"""

from collections.abc import Mapping

import metrics
from experiments.common import Study
from experiments.tables import markdown_table, number

TITLE = "Is it copying?"
TABLES = ("copying",)
FIGURES = {"pairs.png": "The samples that come closest to a training image"}

MEASURES = {
    "novelty": ("novelty", ".2f"),
    "copies": ("copies", ".1%"),
    "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"),
    "mean confidence": ("confidence", ".3f"),
    "entropy of the digits, of 3.32 bits": ("label_entropy", ".3f"),
}


def run(study: Study) -> dict[str, str]:
    """Draw the figure and return the table."""
    results = study.grid()
    if not study.process.is_first:
        return {}
    data_dir = study.settings.data_dir
    columns, blocks = {"real images": study.reference(results.n)}, {}
    for label in results.symbols:
        steps, eta = results.best(label)
        columns[f"{label}, {steps} steps, η = {eta:g}"] = results.at(label, steps, eta)[0]
        images = study.images(label, steps, eta)
        caption = f"{label}, {steps} steps, eta {eta:g}: samples"
        blocks[caption] = metrics.score_and_pairs(images, data_dir=data_dir)[1]
    blocks["test images"] = metrics.pairs_of_test_images(data_dir=data_dir)
    metrics.save_pairs(study.out / "pairs.png", blocks)
    return {"copying": copying_table(columns)}


def copying_table(columns: Mapping[str, dict]) -> str:
    """Return the scores that tell copies from new images, one column per set of images."""
    rows = [
        (
            name,
            *(f"{number(s[key], f)} ± {number(2 * s[f'{key}_se'], f)}" for s in columns.values()),
        )
        for name, (key, f) in MEASURES.items()
    ]
    return markdown_table(["", *columns], rows)
