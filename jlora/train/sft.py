"""Supervised fine-tuning: cross-entropy on the tokens that the data marks as trained."""

import jax

from jlora.losses import cross_entropy
from jlora.models import Model
from jlora.train.step import Batch, Loss, Metrics
from jlora.types import Params


def sft_loss(model: Model, *, remat: bool = True, chunk: int = 512) -> Loss:
    """The loss function of `make_step`: summed negative log-likelihood and the sums that metrics are made of."""

    def loss(params: Params, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Metrics]:
        hidden, _ = model.hidden(
            params, batch["tokens"], batch["positions"], batch["segment_ids"], key=key, remat=remat
        )
        sums = cross_entropy(model.project, model.head(params), hidden, batch["targets"], batch["weights"], chunk=chunk)
        return sums.loss, sums._asdict()

    return loss
