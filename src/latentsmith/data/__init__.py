"""Sources, indexed shards, transforms, the latent cache, and the order of samples. Imports `files` alone of ours."""
