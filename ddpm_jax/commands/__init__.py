"""The modes of the command line: each calls the library and writes files."""
