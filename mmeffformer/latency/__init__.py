"""How long networks take on a machine, and how much memory."""
