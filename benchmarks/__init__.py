"""Measurements of this lab beside what people would use instead; see benchmarks/README.md."""

import os

# What the user set: the contestants get it as it is.
USER_ENVIRONMENT = dict(os.environ)
