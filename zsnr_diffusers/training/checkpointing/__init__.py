"""Persistence of a run: checkpoints, its state, its folder and lock, and signals that stop it."""
