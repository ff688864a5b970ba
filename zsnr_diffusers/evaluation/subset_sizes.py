"""How many images a kernel distance is computed of; imports nothing, so that a command's help can say it."""

SUBSET_SIZE = 1000
"""Images in each subset of a kernel distance, as in most papers."""

NUM_SUBSETS = 100
MAX_FULL_KID = 20_000
"""Images in both sets together up to which the kernel distance is of all: about the work of `NUM_SUBSETS` subsets."""
