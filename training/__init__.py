"""Training: what train.py and distill.py share.

recipe.py     all that decides the weights, and which timesteps count how much
optim.py      learning rate, moving average, Muon
run.py        a run between two steps, and how it is saved and loaded
graph.py      a step of a run, on a CUDA GPU as a graph
run_files.py  the files of a run
loop.py       the training loop, and what is before and after it
"""
