"""The plumbing of the lab: files, devices, processes, data, pictures. No method is in here.

Importing it comes first in every script, before torch, because one setting must be made by then.
"""

import os

# An OpenMP thread that waits sleeps instead of spinning. On a machine that does other work too, a
# spinning thread takes the core that the working thread needs: see benchmarks/README.md.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
