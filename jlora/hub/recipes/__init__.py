"""mergekit's recipes for merging whole models."""
