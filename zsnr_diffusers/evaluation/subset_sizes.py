"""Subset sizes of the kernel distance; imports nothing, so that command-line help can use them."""

SUBSET_SIZE = 1000
"""Images in each subset of a kernel distance, as in most papers."""

NUM_SUBSETS = 100
MAX_FULL_KID = 20_000
"""Up to this total number of images, the kernel distance uses all of them: about the work of `NUM_SUBSETS` subsets."""
