"""Data of a run: images and captions out of folders, data sets and tar shards, as batches."""
