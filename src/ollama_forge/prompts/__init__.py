"""Instruction lists: curated, downloaded or the user's own; sampled, and split into disjoint parts."""
