"""Read tensors, pickles, tars, images and JSON of any origin safely; write atomically. Imports nothing of ours."""
