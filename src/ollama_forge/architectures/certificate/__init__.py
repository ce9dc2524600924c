"""The proof that an edit of the twin, saved to disk, leaves nothing to write or read."""
