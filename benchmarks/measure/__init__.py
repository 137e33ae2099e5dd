"""How seconds, memory and errors are measured."""
