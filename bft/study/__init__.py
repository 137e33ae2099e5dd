"""Studies of training schemes: which arms, how they are trained, what the numbers say."""
