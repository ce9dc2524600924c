"""A model on disk: where it is, its tensors read and written lazily, and which one plays which role in which layer."""
