"""Speed and memory of the fused loss against its peers, in one run, on whatever device is there."""
