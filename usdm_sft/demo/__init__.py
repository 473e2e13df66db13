"""The demo and its files: a small spoken corpus, a toy unit model, and the output of the reference for them."""
