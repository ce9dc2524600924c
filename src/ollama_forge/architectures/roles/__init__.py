"""Which parameters of a twin write to the residual stream or read it, found by experiment."""
