"""Direction and settings -> factors per matrix -> an edit plan, and its application: to tensors on disk or as hooks."""
