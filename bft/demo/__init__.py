"""What ``bft demo`` adds to a training run: a model out of a package, a comparison and a figure."""
