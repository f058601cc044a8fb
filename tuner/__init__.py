"""The service behind ``mhc-tune``: search space, compile pool, correctness gate, timing, search, confirmation, profile."""
