"""Data of a run: images and captions out of folders, data sets and shards (tars, parquet files), as batches."""
