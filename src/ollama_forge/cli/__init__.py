"""The command line: parse options, call the package, print results. Heavy modules are imported when a command runs."""
