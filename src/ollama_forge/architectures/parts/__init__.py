"""What each writer and reader is for: attention or MLP, q, k, v, gate or up, found by experiment."""
