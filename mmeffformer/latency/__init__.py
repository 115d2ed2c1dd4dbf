"""Latency and memory of networks: benchmark, time by operator, and the search's lookup table."""
