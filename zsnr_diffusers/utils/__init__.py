"""Utilities unrelated to diffusion: images, files, hashes, processes, tables and terminals."""
