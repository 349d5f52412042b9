"""DFT: supervised fine-tuning in which each token counts by the probability that the policy gives it."""

from jlora.losses import dft
from jlora.train.algorithms import sft

DFT = sft.algorithm(dft)
