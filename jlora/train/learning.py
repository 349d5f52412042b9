"""What advances a run: its state, its jitted step, and how a step's metrics become numbers for the log."""

from jlora import lora
from jlora.optim import learning_rates, make_optimizer
from jlora.train.algorithms.algorithm import Base, Job, Learning, Numbers, placement
from jlora.train.config import RunConfig
from jlora.train.state import create_state
from jlora.train.step import Metrics, make_step


def learn(config: RunConfig, base: Base, job: Job, total_steps: int) -> Learning:
    """What advances one adapter, or several that are trained by one loss."""
    full = config.lora is None
    held = config.full.weights if full else None
    optimizer = make_optimizer(config.optim, total_steps, trained=config.trains, weights=held, seed=config.train.seed)
    # Weights that nothing else reads are the state's own: a second copy of a whole model would be too much.
    state = create_state(job.trainable, optimizer, config.train.seed, base.mesh, donate=full and not base.reference)
    rates = learning_rates(config.optim, total_steps)
    dropout = lora.drops(base.frozen)
    skip = config.train.on_nonfinite == "skip"

    def read(metrics: Metrics, number: int) -> Numbers:
        numbers = {"loss": float(metrics["loss"]), "grad_norm": float(metrics["grad_norm"])}
        return numbers | {"learning_rate": float(rates[number - 1])} | job.report(metrics)

    return Learning(state, make_step(job.objective, optimizer, placement(state), dropout=dropout, skip=skip), read)
