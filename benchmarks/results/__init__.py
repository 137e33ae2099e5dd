"""The results: their columns, tables and figures, and the data of each machine."""
