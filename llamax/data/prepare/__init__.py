"""``llamax prepare``: text files and tables to a dataset of tokens."""
