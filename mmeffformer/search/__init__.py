"""Search for networks of a given latency: a supernet and its latency-driven slimming."""
