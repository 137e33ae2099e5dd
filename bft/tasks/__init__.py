"""Tasks to train on and to measure with: a file a task builds its questions and splits them."""
