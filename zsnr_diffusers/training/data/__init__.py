"""Training data: images and captions from folders, datasets and shards (tars, parquet files), as batches."""
