"""Kernels behind one signature each: the plain form of each defines its numbers, a table says which runs where."""
