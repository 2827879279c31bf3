"""What every experiment is given: the settings of the study, its models, and its cells."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path

from lab.classifier import features
from lab.distributed import Process

from torch import Tensor
from tqdm import tqdm

import metrics
from experiments.estimates import Estimate, Results, estimate, short_names
from experiments.grid import (
    Cell,
    Subject,
    make_cells,
    missing_cells,
    read_images,
    read_rows,
    run_cells,
)
from experiments.trainings import (
    ETAS,
    STEPS,
    Training,
    load_trained,
    make_trainings,
    missing_trainings,
    run_trainings,
)

HEADLINE = (10, 20, 50)  # the step counts whose cells are repeated with every seed
MANY_SEEDS = 10  # of the smallest and the largest eta, at HEADLINE counts up to MANY_UP_TO
MANY_UP_TO = 20
LONG = 250  # cells of more steps than this have n_long images


@dataclass(frozen=True)
class Settings:
    """The settings of a study, of which most are options of study.py."""

    steps: tuple[int, ...]
    calls: tuple[int, ...]  # the numbers of steps at which samplers are compared
    etas: tuple[float, ...]
    n: int  # images per cell
    n_long: int  # images per cell of more than LONG steps
    seeds: int
    train_images: int  # the length of the study's own trainings; 0: none
    batch_size: int
    data_dir: str
    out: Path

    def images(self, steps: int) -> int:
        """Return the number of images per cell of this many steps."""
        return self.n_long if steps > LONG else self.n

    def repetitions(self, steps: int) -> int:
        """Return the number of seeds at this many steps."""
        return self.seeds if steps in HEADLINE else 1

    def grid_repetitions(self, steps: int, eta: float) -> int:
        """Return the number of seeds of a cell of the grid: `repetitions`, or MANY_SEEDS.

        Noise has a small effect, and most questions are about the two ends of eta.
        """
        is_end = eta in (self.etas[0], self.etas[-1])
        gets_many = is_end and steps in HEADLINE and steps <= MANY_UP_TO
        return MANY_SEEDS if gets_many and 3 <= self.seeds < MANY_SEEDS else self.repetitions(steps)


@dataclass
class Study:
    """A study in the making.

    Every process of a torchrun has one. All of them must call `grid`, `trained` and `measure`,
    which share the work. The results are on the first process; on the others they are empty.
    """

    settings: Settings
    process: Process
    subjects: list[Subject]
    command: str  # the command line that started it
    rows: dict[Cell, dict] = field(default_factory=dict)  # of the cells that were asked for
    bar: tqdm = field(default_factory=lambda: tqdm(disable=True))  # counts network calls
    known_features: dict[Cell, Tensor] = field(default_factory=dict)  # see `features_of`

    @property
    def out(self) -> Path:
        return self.settings.out

    @property
    def extremes(self) -> list[float]:
        """The smallest and the largest eta; one number if they are equal."""
        etas = self.settings.etas
        return list(dict.fromkeys((etas[0], etas[-1])))

    @property
    def names(self) -> dict[str, str]:
        """A short name for each subject's label."""
        return short_names({subject.label: subject.symbol for subject in self.subjects})

    @property
    def titles(self) -> dict[str, str]:
        """A long name for each subject's label, for captions."""
        return {subject.label: subject.title for subject in self.subjects}

    @property
    def trainings(self) -> list[Training]:
        s = self.settings
        return make_trainings(s.train_images, s.seeds) if s.train_images else []

    @property
    def grid_cells(self) -> list[Cell]:
        return self.cells_of(self.subjects, self.settings.steps)

    def cells_of(self, subjects: Sequence[Subject], steps: Sequence[int]) -> list[Cell]:
        """Return the cells of a grid {subject} x {steps} x {eta}."""
        s = self.settings
        cells: list[Cell] = []
        for eta in s.etas:
            seeds = partial(s.grid_repetitions, eta=eta)
            cells += make_cells(subjects, steps, [eta], s.images, seeds)
        return cells

    def grid(self) -> Results:
        """Return the results of the grid {checkpoint} x {steps} x {eta}."""
        return self.measure(self.grid_cells, self.subjects)

    def trained(self, trainings: Sequence[Training]) -> Results:
        """Return the results of some of the study's own trainings."""
        s, process, folder = self.settings, self.process, self.out / "trainings"
        missing = missing_trainings(trainings, process, folder)
        samples = s.n * STEPS * len(ETAS)  # network calls to sample a trained model
        if self.begins({t.name: t.calls + samples for t in missing}):
            run_trainings(missing, process, folder, s.data_dir, self.bar)
        else:
            trainings = [t for t in trainings if t not in missing]
        subjects = load_trained(trainings, process, folder)
        return self.measure(make_cells(subjects, [STEPS], ETAS, lambda _: s.n), subjects)

    def measure(self, cells: Sequence[Cell], subjects: Sequence[Subject]) -> Results:
        """Return the results of cells; those that are not kept yet are sampled and scored."""
        s, process, folder = self.settings, self.process, self.out / "cells"
        missing = missing_cells(cells, subjects, process, folder)
        if not self.begins({cell.name: cell.n * cell.steps for cell in missing}):
            return Results([])
        run_cells(missing, subjects, process, folder, s.batch_size, s.data_dir, self.bar)
        if not process.is_first:
            return Results([])
        rows = read_rows(cells, subjects, folder, s.data_dir)
        self.rows.update(zip(cells, rows, strict=True))
        return Results(rows)

    def begins(self, missing: Mapping[str, int]) -> bool:
        """Return whether work begins now. An experiment asks before all that takes long.

        Args:
            missing: the network calls (of one image) of each part of it that is not kept, by name.
        """
        return True

    def images(self, label: str, steps: int, eta: float) -> Tensor:
        """Return the images of a cell of the grid, with seed 0: (n, 1, 28, 28) uint8."""
        wanted = (label, steps, eta, 0)
        cell = next(c for c in self.grid_cells if (c.model, c.steps, c.eta, c.seed) == wanted)
        return self.images_of(cell)

    def images_of(self, cell: Cell) -> Tensor:
        """Return the images of a cell that has been measured: (n, 1, 28, 28) uint8."""
        return read_images(self.out / "cells", cell)

    def change(self, before: Sequence[Cell], after: Sequence[Cell]) -> Estimate:
        """Return by how much the Fréchet distance grows from `before` to `after`.

        Cells with the same seed start from the same noise, so their errors have much in common, and
        that cancels (see `metrics.frechet_change`). Seeds that only one side has are left out.

        Args:
            before, after: all with the same number of images.
        """
        same = {cell.seed: cell for cell in after}
        rows = []
        for pair in [(cell, same[cell.seed]) for cell in before if cell.seed in same]:
            both = map(self.features_of, pair)
            mean, se = metrics.frechet_change_of(*both, data_dir=self.settings.data_dir)
            rows.append({"change": mean, "change_se": se})
        return estimate(rows, "change")

    def features_of(self, cell: Cell) -> Tensor:
        """Return the features of the images of a measured cell, (n, 84). They are computed once."""
        if cell not in self.known_features:
            self.known_features[cell] = features(self.images_of(cell))[0]
        return self.known_features[cell]

    def reference(self, n: int) -> dict:
        """Return the scores of n real training images."""
        return _reference(n, self.settings.data_dir)


@dataclass
class Plan(Study):
    """A study that only counts its work, for the bar.

    No work begins, and an experiment gets no results, as on a process that is not the first.
    """

    missing: dict[str, int] = field(default_factory=dict)  # see `begins`

    @classmethod
    def of(cls, study: Study) -> "Plan":
        """Return the plan of a study, in which nothing is planned yet."""
        not_first = replace(study.process, rank=study.process.world)
        return cls(study.settings, not_first, study.subjects, study.command)

    def begins(self, missing: Mapping[str, int]) -> bool:
        self.missing |= missing
        return False


@cache
def _reference(n: int, data_dir: str) -> dict:
    return metrics.reference(n, data_dir=data_dir)
