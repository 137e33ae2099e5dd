"""What was measured: its columns, tables and figures, and the data of each machine."""
