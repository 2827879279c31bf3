"""The plumbing of the lab: files, devices, processes, data, pictures. No method is in here.

Every script imports it first: what follows must happen before any file is opened.
"""

import os

# If stdin, stdout or stderr is closed, the next file to be opened would take its number, and would
# then receive what libraries print.
for _number in range(3):
    try:
        os.fstat(_number)
    except OSError:
        os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
