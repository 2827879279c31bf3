"""Measurements of this lab beside what people would use instead; see benchmarks/README.md."""

import os

# What the user set, copied before `lab` adds its own default for OMP_WAIT_POLICY.
USER_ENVIRONMENT = dict(os.environ)
