"""Safe reading of tensors, pickles and tars; atomic writing; hashing. Imports nothing else of ours."""
