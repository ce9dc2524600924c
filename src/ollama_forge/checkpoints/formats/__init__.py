"""Storage formats of quantised weights: which stored tensors hold one matrix, and how it is decoded and encoded."""
