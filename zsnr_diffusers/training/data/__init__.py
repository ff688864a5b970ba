"""Data of a run: images and captions out of folders, datasets and shards (tars, parquet files), as batches."""
