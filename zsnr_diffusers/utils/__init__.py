"""What knows nothing of diffusion: images, files, hashes, processes, tables and terminals."""
