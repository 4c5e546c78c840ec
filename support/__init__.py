"""Everything except the method: training loop, run folders, command line, torchrun, packing, PEFT's file format, text,
hosted models, judges, reports, plots, and the pretraining of the tiny model."""
