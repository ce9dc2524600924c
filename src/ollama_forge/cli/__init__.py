"""The command line: parse, call, print. No logic, and nothing heavy imported before a command runs."""
