"""The experiments of the study: one file per experiment, and what they share.

An experiment is a module. Its docstring states the question (in the first paragraph), the method
and what it writes. It defines

    TITLE      the heading of its section
    TABLES     the names of its tables
    FIGURES    the files of its figures, and their captions
    run        Study -> the tables, as markdown, by their names; it also draws the figures

and study.py lists it in EXPERIMENTS (and in NOT_QUICK, if `--quick` should leave it out). `run`
leaves out a table that the settings of the study do not allow. Under torchrun every process calls
`run`: all of them must call `study.grid` and `study.measure`, and only the first one gets results.
study.py first calls every `run` with a `Plan`, which counts the work for the bar and begins none of
it. So work that is not a cell or a training asks `study.begins` first, and then moves `study.bar`.
A table goes into STUDY.md between `<!-- table NAME -->` and `<!-- end -->`: add this place by hand
(only a new STUDY.md is made with the places of all tables).

    keys.py        what kept results depend on
    estimates.py   estimates with errors, and the rows of a grid by setting
    tables.py      tables in markdown, and the markers in STUDY.md
    figures.py     what several figures share
    duels.py       two settings side by side, with z
    grid.py        cells: sampling, scoring, and what is kept of them
    variances.py   two further samplers: the large and the optimal variance of DDPM
    trainings.py   the study's own trainings
    denoiser.py    the exact denoiser, a model without a network, and mixtures of two models
    common.py      what every experiment is given
"""
