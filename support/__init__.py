"""Everything that is not the method: the training loop and its run folder, the command line, several processes, packed
rows, PEFT's file format, text, terminal, hosted models, judges, reports, plots, and how the tiny model was made."""
