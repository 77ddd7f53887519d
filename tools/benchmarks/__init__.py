"""What the benchmarks share: cases, measuring, and what is written of the results."""
