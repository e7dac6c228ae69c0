"""Lightning and the command line: everything above the library."""
