"""The experiments of the study: one file per experiment, and what they share.

An experiment is a module. Its docstring states the question (in the first paragraph), the method
and what it writes. It defines

    TITLE      the heading of its section
    TABLES     the names of its tables
    FIGURES    the files of its figures, and their captions
    run        Study -> the tables, as markdown, by their names; it also draws the figures

and study.py lists it. `run` leaves out a table that the settings of the study do not allow.

    keys.py        what kept results depend on
    estimates.py   estimates with errors, and the rows of a grid by setting
    tables.py      tables in markdown, and the markers in STUDY.md
    figures.py     what several figures share
    grid.py        cells: sampling, scoring, and what is kept of them
    variances.py   two further samplers: the large and the optimal variance of DDPM
    trainings.py   the study's own trainings
    denoiser.py    the exact denoiser, a model without a network, and mixtures of two models
    common.py      what every experiment is given
"""
