"""Instruction lists: curated, from files or folders; sampled, and split into parts that never mix."""
