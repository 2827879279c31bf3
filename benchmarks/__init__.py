"""Measurements of this lab beside what people would use instead; see benchmarks/README.md."""
