"""Kernels with one signature each: a plain form defines the numbers, and a table says which form runs where."""
