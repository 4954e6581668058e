"""One module per command of ``llamax``: the only place that reads command lines."""
