"""New networks under a latency budget: a supernet, and latency-driven slimming of it."""
