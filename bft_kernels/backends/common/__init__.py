"""What backends share: rows, GEMMs, plans, the chunked engine, CSR lists, the bound of lse."""
