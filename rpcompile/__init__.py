"""rpcompile: a graph-partitioning compiler for fine-tuning models bigger than your GPUs."""
