"""The table of algorithms. A new one is a file here, with its settings, its objective and one `Algorithm`, and a row.

Three families share code: `sft` and `judged` train on files (`files`), `rollout` on what the policy samples.
"""

from jlora.train.algorithms.algorithm import Algorithm
from jlora.train.algorithms.cpo import CPO
from jlora.train.algorithms.dft import DFT
from jlora.train.algorithms.dpo import DPO
from jlora.train.algorithms.grpo import GRPO
from jlora.train.algorithms.kto import KTO
from jlora.train.algorithms.orpo import ORPO
from jlora.train.algorithms.ppo import PPO
from jlora.train.algorithms.reward_model import REWARD
from jlora.train.algorithms.sft import SFT

# By the name that `algorithm` has in a run's settings.
ALGORITHMS: dict[str, Algorithm] = {
    "sft": SFT,
    "dft": DFT,
    "dpo": DPO,
    "cpo": CPO,
    "orpo": ORPO,
    "kto": KTO,
    "reward": REWARD,
    "grpo": GRPO,
    "ppo": PPO,
}
__all__ = ["ALGORITHMS", "Algorithm"]
